"""Which rollouts a step trains on, and the advantage of each."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from common.method import Fields, function
from common.types import Group, Rollout, Score
from learner import advantage

ADVANTAGES = {"group_mean": advantage.group_mean, "leave_one_out": advantage.leave_one_out}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The part of a step's groups that is trained on: B rollouts in P groups."""

    groups: tuple[Group, ...]  # without rollouts whose reward failed; without dropped groups
    advantages_B: Tensor  # float64
    group_B: Tensor  # int64, 0..P-1
    index_B: tuple[int, ...]  # each rollout's index among all rollouts of the step
    dropped: Mapping[str, int]  # number of groups by their drop_reason

    def metrics(self) -> dict[str, float]:
        """The number of excluded groups, in all and by reason."""
        by_reason = {f"groups/dropped_{reason}": float(count) for reason, count in self.dropped.items()}
        return {"groups/dropped": float(sum(self.dropped.values())), **by_reason}


def select(groups: Sequence[Group], method: Fields, *, max_tokens: int, rewards: Mapping[str, float]) -> Selection:
    """Exclude rollouts without a reward and the groups that `method` drops, and compute the advantages of the rest.

    The advantages of a group are computed from its scored rollouts alone, and decoupled ones (GDPO) are standardised
    over those of the step. max_tokens is `actor.max_tokens`, rewards `task.rewards`.
    """
    kept: list[Group] = []
    advantages: list[Tensor] = []
    indices: list[int] = []
    dropped: Counter[str] = Counter()
    start = 0
    for group in groups:
        if reason := drop_reason(group, method, rewards):
            dropped[reason] += 1
        else:
            scored = [i for i, rollout in enumerate(group.rollouts) if rollout.score is not None]
            kept.append(replace(group, rollouts=tuple(group.rollouts[i] for i in scored)))
            advantages.append(_advantages(kept[-1], method, max_tokens, rewards))
            indices += [start + i for i in scored]
        start += len(group.rollouts)
    sizes = torch.tensor([len(group.rollouts) for group in kept], dtype=torch.int64)
    advantages_B = torch.cat(advantages) if advantages else torch.empty(0, dtype=torch.float64)
    return Selection(
        groups=tuple(kept),
        advantages_B=advantage.standardised(advantages_B) if method.decoupled_rewards else advantages_B,
        group_B=torch.repeat_interleave(torch.arange(len(kept)), sizes),
        index_B=tuple(indices),
        dropped=dropped,
    )


def drop_reason(group: Group, method: Fields, rewards: Mapping[str, float]) -> str | None:
    """Why `method` excludes this group, in a word; None where it does not. rewards is `task.rewards`."""
    scores = [rollout.score for rollout in group.rollouts if rollout.score is not None]
    if not scores:
        return "unscored"
    num_correct = sum(score.correct for score in scores)
    if method.group_filter == "accuracy" and num_correct in (0, len(scores)):
        return "all-correct" if num_correct else "all-incorrect"
    std = torch.tensor([score.total for score in scores], dtype=torch.float64).std(correction=0).item()
    if method.group_filter == "zero-variance" and _equal(scores, method, rewards):
        return "zero-variance"
    if std < method.reward_threshold:
        return "low-variance"
    return None


def _equal(scores: Sequence[Score], method: Fields, rewards: Mapping[str, float]) -> bool:
    """Whether the rewards of a group are equal: decoupled ones may differ where their sums are equal."""
    if method.decoupled_rewards:
        return all(score.parts[name] == scores[0].parts[name] for score in scores for name in _weighted(rewards))
    return len({score.total for score in scores}) == 1


def _weighted(rewards: Mapping[str, float]) -> dict[str, float]:
    """Without those of weight 0, which are only logged: a score lacks one that has failed."""
    return {name: weight for name, weight in rewards.items() if weight}


def overlong(num_tokens: int, method: Fields, *, max_tokens: int) -> float:
    """The reward that a completion loses for its length: 0 up to max_tokens - overlong_buffer, then linear up to
    overlong_penalty at max_tokens (DAPO, arXiv 2503.14476, Eq. 13)."""
    if method.overlong_buffer == 0:
        return 0.0
    over = num_tokens - (max_tokens - method.overlong_buffer)
    return method.overlong_penalty * min(1.0, max(0.0, over / method.overlong_buffer))


def _advantages(group: Group, method: Fields, max_tokens: int, weights: Mapping[str, float]) -> Tensor:
    """[G] float64, for a group whose rollouts are all scored."""
    scores = [_score(rollout) for rollout in group.rollouts]
    if method.advantage == "asymmetric":
        correct_1G = torch.tensor([[score.correct for score in scores]], dtype=torch.float64)
        return advantage.asymmetric(correct_1G, beta_pos=method.beta_pos, beta_neg=method.beta_neg)[0]
    if method.advantage == "group_std":
        compute: Callable[..., Tensor] = partial(advantage.group_std, ddof=method.std_ddof)
    else:
        compute = ADVANTAGES.get(method.advantage) or function(method.advantage)
    if method.decoupled_rewards:
        weights = _weighted(weights)
        rewards_KG = torch.tensor([[score.parts[name] for score in scores] for name in weights], dtype=torch.float64)
        return advantage.decoupled(rewards_KG, rewards_KG.new_tensor(list(weights.values())), compute)
    rewards = [
        _score(rollout).total - overlong(rollout.num_completion_tokens, method, max_tokens=max_tokens)
        for rollout in group.rollouts
    ]
    return compute(torch.tensor([rewards], dtype=torch.float64))[0]


def _score(rollout: Rollout) -> Score:
    assert rollout.score is not None, "`select` keeps scored rollouts only"
    return rollout.score
