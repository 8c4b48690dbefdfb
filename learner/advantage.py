"""Group advantages: pure functions rewards_PG -> advantages_PG, for P prompts with G rollouts each."""

from torch import Tensor

EPSILON = 1e-6


def group_std(rewards_PG: Tensor) -> Tensor:
    """(r_i - mean r) / (std r + 1e-6) within each group, population std (arXiv 2606.05434, Eq. 1).

    A group of equal rewards has advantage 0 everywhere.
    """
    centred_PG = group_mean(rewards_PG)
    return centred_PG / (centred_PG.square().mean(dim=-1, keepdim=True).sqrt() + EPSILON)


def group_mean(rewards_PG: Tensor) -> Tensor:
    """r_i - mean r within each group: no division by the standard deviation (Dr. GRPO, arXiv 2503.20783)."""
    return rewards_PG - rewards_PG.mean(dim=-1, keepdim=True)


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """r_i - mean of the others' rewards = G / (G - 1) `group_mean` (RLOO, arXiv 2402.14740); 0 in a group of one."""
    return group_mean(rewards_PG) * (rewards_PG.shape[-1] / max(1, rewards_PG.shape[-1] - 1))


def asymmetric(correct_PG: Tensor, *, beta_pos: float, beta_neg: float) -> Tensor:
    """((1 - p) / p)^beta_pos for a correct rollout, -(p / (1 - p))^beta_neg for an incorrect one (arXiv 2604.04894).

    correct_PG holds 1 for a correct rollout and 0 for an incorrect one; p is the fraction of correct ones in the group.
    All advantages of a group without both kinds are 0. beta .5 and .5 is `group_std` without its epsilon. For other
    betas the advantages of a group do not sum to zero, as the paper intends.
    """
    p_P1 = correct_PG.mean(dim=-1, keepdim=True)
    mixed_P1 = (p_P1 > 0) & (p_P1 < 1)
    odds_P1 = ((1 - p_P1) / p_P1).where(mixed_P1, p_P1.new_ones(()))  # of an incorrect rollout
    advantages_PG = (odds_P1**beta_pos).where(correct_PG > 0, -(odds_P1**-beta_neg))
    return advantages_PG * mixed_P1
