"""The table of methods: one row each, words and numbers only (../README.md, "Methods").

A field names a pure function of the learner (`advantage` -> learner/advantage.py, ...) or holds one of its
numbers. Every field can be overridden on the command line as --method.FIELD, so rows compose.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Method(BaseModel):
    """One way to turn rewards and entropies into the streams of the loss.

    loss = - sum_{i,t} token_weight_{i,t} * surrogate(ratio_{i,t}, advantage_i) + beta * KL - entropy_bonus * entropy
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    paper: str
    """Where the row comes from."""
    equation: str
    """Its numbers there."""
    advantage: Literal["group_std", "group_mean"] = "group_std"
    """How rewards become advantages, within a group."""
    token_weight: Literal["uniform", "horizon"] = "uniform"
    """How much each token counts: all the same, or by its entropy (horizon)."""
    alpha: float = Field(0.0, allow_inf_nan=False)
    """Horizon discount; negative amplifies uncertain tokens."""
    selective: bool = False
    """Discount only rollouts of negative advantage (Eq. 8)."""
    weight_gradient: bool = False
    """Let the gradient through the token weights as well."""
    top_entropy_fraction: float = Field(1.0, gt=0, le=1)
    """Only this fraction of the step's tokens, those of highest entropy, has a weight (arXiv 2506.01939: 0.2)."""
    entropy: Literal["exact", "topk-partial", "topk-renormalised"] = "exact"
    """Of the whole vocabulary, or one of two estimates from the likeliest tokens."""
    entropy_topk: int = Field(500, ge=1)
    """K of the two estimates."""
    entropy_temperature: Literal["sampling", "one"] = "sampling"
    """Entropy at actor.temperature or at 1."""
    normaliser: Literal["sequence-mean", "token-mean", "group", "step"] = "group"
    """What the token weights are divided by: number of tokens of each sequence or of the step, or the weights' sum."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """The ratio counts from 1 - clip_low,"""
    clip_high: float = Field(0.2, ge=0)
    """to 1 + clip_high."""
    kl: Literal["none", "k1", "k2", "k3"] = "k3"
    """Estimator of the divergence from the frozen model."""
    beta: float = Field(0.04, ge=0, allow_inf_nan=False)
    """Weight of that divergence in the loss."""
    entropy_bonus: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the mean entropy in the objective; with entropy_target, the weight that the run starts with."""
    entropy_target: float | None = Field(None, ge=0)
    """Nats. The bonus then adapts (arXiv 2505.22312): it grows while the entropy is lower, else shrinks and is off."""
    entropy_bonus_step: float = Field(0.005, gt=0)
    """By how much it adapts in a step."""
    entropy_bonus_max: float = Field(1.0, gt=0)
    """How far it grows."""
    drop_zero_variance: bool = False
    """Groups whose rewards are all equal take no part, not even in the KL."""
    reward_threshold: float | None = Field(None, ge=0)
    """Groups whose rewards spread (population std) less than this take no part."""

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the objective holds the entropy itself."""
        return self.entropy_bonus > 0 or self.entropy_target is not None


METHODS: dict[str, Method] = {
    "grpo": Method(
        paper="arXiv 2606.05434 (after 2402.03300)",
        equation="2",
        normaliser="sequence-mean",
    ),
    "ah-grpo": Method(
        paper="arXiv 2606.05434",
        equation="3-6",
        token_weight="horizon",
        alpha=0.5,
    ),
    "sa-ah-grpo": Method(
        paper="arXiv 2606.05434",
        equation="3-5, 7-9",
        token_weight="horizon",
        alpha=0.5,
        selective=True,
    ),
}
