"""Which rollouts take part in a step, and with what advantage."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.methods import Method
from common.types import Group, Rollout
from learner import advantage

ADVANTAGES = {
    "group_std": advantage.group_std,
    "group_mean": advantage.group_mean,
    "leave_one_out": advantage.leave_one_out,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The part of a step's groups that is trained on: B rollouts in P groups."""

    groups: tuple[Group, ...]  # without rollouts whose reward failed; without dropped groups
    advantages_B: Tensor  # float64
    group_B: Tensor  # int64, 0..P-1
    place_B: tuple[int, ...]  # of each rollout among all rollouts of the step
    num_dropped_groups: int


def select(groups: Sequence[Group], method: Method) -> Selection:
    """Leave out rollouts without a reward, and the groups that `method` drops; advantages of the rest.

    A group's advantages are taken over its scored rollouts alone.
    """
    kept: list[Group] = []
    advantages: list[Tensor] = []
    places: list[int] = []
    start = 0
    for group in groups:
        scored = [i for i, rollout in enumerate(group.rollouts) if rollout.score is not None]
        rewards_1G = torch.tensor([[_reward(group.rollouts[i]) for i in scored]], dtype=torch.float64)
        correct_1G = torch.tensor([[_correct(group.rollouts[i]) for i in scored]], dtype=torch.float64)
        if scored and not _dropped(rewards_1G, correct_1G, method):
            kept.append(replace(group, rollouts=tuple(group.rollouts[i] for i in scored)))
            advantages.append(_advantages(rewards_1G, correct_1G, method)[0])
            places += [start + i for i in scored]
        start += len(group.rollouts)
    sizes = torch.tensor([len(group.rollouts) for group in kept], dtype=torch.int64)
    return Selection(
        groups=tuple(kept),
        advantages_B=torch.cat(advantages) if advantages else torch.empty(0, dtype=torch.float64),
        group_B=torch.repeat_interleave(torch.arange(len(kept)), sizes),
        place_B=tuple(places),
        num_dropped_groups=len(groups) - len(kept),
    )


def _advantages(rewards_1G: Tensor, correct_1G: Tensor, method: Method) -> Tensor:
    if method.advantage == "asymmetric":
        return advantage.asymmetric(correct_1G, beta_pos=method.beta_pos, beta_neg=method.beta_neg)
    return ADVANTAGES[method.advantage](rewards_1G)


def _reward(rollout: Rollout) -> float:
    assert rollout.score is not None, "only scored rollouts have a reward"
    return rollout.score.total


def _correct(rollout: Rollout) -> float:
    assert rollout.score is not None, "only scored rollouts are right or wrong"
    return float(rollout.score.correct)


def _dropped(rewards_1G: Tensor, correct_1G: Tensor, method: Method) -> bool:
    spread = rewards_1G.std(correction=0).item()
    if method.group_filter == "zero-variance" and spread == 0:
        return True
    if method.group_filter == "accuracy" and correct_1G.mean().item() in (0.0, 1.0):
        return True
    return method.reward_threshold is not None and spread < method.reward_threshold
