"""What a method is made of: its fields. The methods themselves are in common/methods.py.

A field names a pure function of the learner (`advantage` -> learner/advantage.py, ...) or holds one of its numbers.
Every field can be overridden on the command line as --method.FIELD, so methods compose.
"""

import importlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from common.section import PLANNED, Section


def function(path: str) -> Callable[..., Any]:
    """The function that a dotted path names. Raises ValueError, in one line, where there is none."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: no such function ({error}); is its folder in PYTHONPATH?") from None
    if not callable(found):
        raise ValueError(f"{path} is not a function")
    return found


def _one_of(field: str, *known: str) -> AfterValidator:
    def check(value: str) -> str:
        # A dotted path is looked up later (Config): the module that defines METHOD may not have defined it yet.
        if value not in known and "." not in value:
            raise ValueError(f"method.{field}={value} is none of {', '.join(known)}, nor the dotted path of a function")
        return value

    return AfterValidator(check)


class Fields(Section):
    """One way to turn rewards and entropies into the per-token targets of the loss.

    loss = - sum_{i,t} token_weight_{i,t} * surrogate(ratio_{i,t}, advantage_i) + beta * KL - entropy_bonus * entropy
    """

    name: str = ""
    """In the table."""
    opening: Literal["plain", "reft"] = "plain"
    """How a completion begins in training: sampled, or with one of the policy's likeliest first tokens (REFT)."""
    opening_candidates: int = Field(20, ge=1)
    """reft: N, how many first tokens are candidates."""
    opening_distinct: int = Field(4, ge=1)
    """reft: K of them begin equal shares of a group."""
    opening_learned: bool = True
    """reft: whether the first token is in the loss."""
    advantage: Annotated[str, _one_of("advantage", "group_std", "group_mean", "leave_one_out", "asymmetric")] = (
        "group_std"
    )
    """How rewards (asymmetric: correct answers) become advantages; or your own rewards_PG -> advantages_PG."""
    beta_pos: float = Field(0.5, allow_inf_nan=False)
    """asymmetric: the power for correct answers; 0.5 and 0.5 is group_std."""
    beta_neg: float = Field(0.5, allow_inf_nan=False)
    """asymmetric: the power for incorrect ones."""
    token_advantage: Literal["broadcast", "erpo-additive", "erpo-gated-outcome", "erpo-multiplicative"] = "broadcast"
    """How a rollout's advantage becomes its tokens'; the three assemblies of ERPO need a reference pass."""
    erpo_gate: float = Field(5.0, allow_inf_nan=False)
    """ERPO: sharpness gamma of the entropy gate."""
    erpo_weight: float = Field(0.2, ge=0, allow_inf_nan=False)
    """ERPO: eta, how much progress counts beside the outcome."""
    erpo_progress: float = Field(0.1, ge=0, allow_inf_nan=False)
    """ERPO: beta_s, the scale of log pi - log pi_ref."""
    erpo_buckets: int = Field(10, ge=1)
    """ERPO: K parts of the rollouts, within which progress is standardised."""
    token_weight: Annotated[str, _one_of("token_weight", "uniform", "horizon", "residual")] = "uniform"
    """How much tokens count: equally, by entropy, by the adapter; or your (entropy, mask, advantages) -> weights_BT."""
    residual_power: float = Field(2.0, ge=0, allow_inf_nan=False)
    """residual: kappa, the power of the hidden states' distance."""
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
    normaliser: Literal["sequence-mean", "token-mean", "constant", "group", "step"] = "group"
    """Weights are divided by the tokens of each sequence or of the step, the longest possible, or the weights' sum."""
    ratio: Literal["token", "sequence", "power-mean", "stop-gradient"] = "token"
    """Of each token, of the rollout (GSPO, HölderPO), or of each token as a constant factor (CISPO)."""
    power_start: float = Field(2.0, allow_inf_nan=False)
    """power-mean: p at the first step,"""
    power_end: float = Field(-2.0, allow_inf_nan=False)
    """and at the last; linear between."""
    power_clip: Literal["sequence", "token"] = "sequence"
    """power-mean: clip the mean, or each token's ratio within it."""
    clip_low: float = Field(0.2, ge=0, le=1)
    """The ratio counts from 1 - clip_low (1: from 0, no bound),"""
    clip_high: float = Field(0.2, ge=0)
    """to 1 + clip_high."""
    kl: Literal["none", "k1", "k2", "k3"] = "k3"
    """Estimator of the divergence from the frozen model."""
    beta: float = Field(0.04, ge=0, allow_inf_nan=False)
    """Weight of that divergence in the loss."""
    entropy_bonus: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the mean entropy in the objective; with entropy_target, the weight that the run starts with."""
    entropy_target: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Nats. The bonus then adapts (arXiv 2505.22312): it grows while the entropy is lower, else shrinks and is off.
    0: it stays constant."""
    entropy_bonus_step: float = Field(0.005, gt=0)
    """By how much it adapts in a step."""
    entropy_bonus_max: float = Field(1.0, gt=0)
    """How far it grows."""
    group_filter: Literal["none", "zero-variance", "accuracy"] = "none"
    """Groups that are excluded, from the KL too: of equal rewards, or with all answers correct or all incorrect."""
    reward_threshold: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Groups whose rewards have a population standard deviation below this are excluded."""
    refill_rounds: int = Field(0, ge=0)
    """How many times a step samples new prompts in place of excluded groups."""
    overlong_buffer: int = Field(0, ge=0)
    """Tokens before actor.max_tokens over which a length penalty grows from 0 to overlong_penalty; 0: none."""
    overlong_penalty: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Penalty of a completion of full length."""
    importance: Annotated[
        Literal["auto", "none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"], PLANNED
    ] = "auto"
    """Weights pi_learner / pi_actor, for rollouts that another policy sampled than the one that learns. auto:
    token-truncate with run.max_staleness, else none."""
    importance_cap: float = Field(2.0, gt=0)
    """Weights above it are cut to it (truncate) or to 0 (mask)."""


class Method(Fields):
    """An entry of the table: fields, and where they come from."""

    paper: str
    """Source of the method."""
    equation: str
    """Its numbers there."""
    remark: str = ""
    """What the paper supports, and what is ours."""

    def values(self) -> dict[str, Any]:
        """The fields that a configuration takes over."""
        return {name: getattr(self, name) for name in Fields.model_fields if name != "name"}
