"""Group advantages: pure functions rewards_PG -> advantages_PG, for P prompts with G rollouts each."""

from collections.abc import Callable

from torch import Tensor

EPSILON = 1e-6


def group_std(rewards_PG: Tensor, *, ddof: int = 0) -> Tensor:
    """(r_i - mean r) / (std r + 1e-6) within each group (arXiv 2606.05434, Eq. 1).

    ddof 0 is the population's std, 1 the sample's, which makes all advantages of a group sqrt((G - 1) / G) as large.
    A group of equal rewards has advantage 0 everywhere, and so has a group of one.
    """
    centred_PG = group_mean(rewards_PG)
    divisor = max(1, rewards_PG.shape[-1] - ddof)
    return centred_PG / ((centred_PG.square().sum(dim=-1, keepdim=True) / divisor).sqrt() + EPSILON)


def group_mean(rewards_PG: Tensor) -> Tensor:
    """r_i - mean r within each group: no division by the standard deviation (Dr. GRPO, arXiv 2503.20783)."""
    return rewards_PG - rewards_PG.mean(dim=-1, keepdim=True)


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """r_i - mean of the others' rewards = G / (G - 1) `group_mean` (RLOO, arXiv 2402.14740); 0 in a group of one."""
    return group_mean(rewards_PG) * (rewards_PG.shape[-1] / max(1, rewards_PG.shape[-1] - 1))


def decoupled(rewards_KG: Tensor, weights_K: Tensor, advantage: Callable[[Tensor], Tensor] = group_std) -> Tensor:
    """[G]: the sum over K rewards of weight times advantage, each reward's within the group (GDPO, arXiv 2601.05242,
    Eq. 4 and 5). The weights come after the normalisation, which would cancel them.

    `standardised` is its last part (Eq. 6). The paper divides by the sample standard deviation, ours is the
    population's, as in `group_std`: in groups of one size Eq. 6 cancels the difference.
    """
    return weights_K @ advantage(rewards_KG)


def standardised(advantages_B: Tensor) -> Tensor:
    """(A_i - mean A) / (std A + 1e-6) over all rollouts of a step, population std (GDPO, arXiv 2601.05242, Eq. 6)."""
    return group_std(advantages_B[None])[0]


def asymmetric(correct_PG: Tensor, *, beta_pos: float, beta_neg: float) -> Tensor:
    """((1 - p) / p)^beta_pos for a correct rollout, -(p / (1 - p))^beta_neg for an incorrect one (arXiv 2604.04894).

    correct_PG holds 1 for a correct rollout and 0 for an incorrect one; p is the fraction of correct ones in the group.
    In a group without both kinds all advantages are 0 for a beta above 0, and 1 or -1 for beta 0, since 0^0 = 1. beta
    .5 and .5 is `group_std` without its epsilon. For other betas the advantages of a group do not sum to zero, as the
    paper intends.
    """
    p_P1 = correct_PG.mean(dim=-1, keepdim=True)
    return (((1 - p_P1) / p_P1) ** beta_pos).where(correct_PG > 0, -((p_P1 / (1 - p_P1)) ** beta_neg))
