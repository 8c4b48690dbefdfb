"""Which rollouts take part in a step, and with what advantage."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.methods import Method
from common.types import Group, Rollout
from learner import advantage

ADVANTAGES = {"group_std": advantage.group_std, "group_mean": advantage.group_mean}


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
        if scored and not _dropped(rewards_1G, method):
            kept.append(replace(group, rollouts=tuple(group.rollouts[i] for i in scored)))
            advantages.append(ADVANTAGES[method.advantage](rewards_1G)[0])
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


def _reward(rollout: Rollout) -> float:
    assert rollout.score is not None, "only scored rollouts have a reward"
    return rollout.score.total


def _dropped(rewards_1G: Tensor, method: Method) -> bool:
    spread = rewards_1G.std(correction=0).item()
    if method.drop_zero_variance and spread == 0:
        return True
    return method.reward_threshold is not None and spread < method.reward_threshold
