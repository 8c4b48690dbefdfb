"""The fields that define a method. The methods themselves are in common/methods.py.

A field names a pure function of the learner (`advantage` -> learner/advantage.py, ...) or is a number that it uses.
The command line can override every field as --method.FIELD, so methods compose.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from common.files import user_module
from common.section import PLANNED, Section


def function(path: str) -> Callable[..., Any]:
    """The function at a dotted path. Raises ValueError, in one line, if there is none."""
    module, _, name = path.rpartition(".")
    try:
        found: Any = getattr(user_module(module), name)
    except Exception as error:  # noqa: BLE001 (a user's module may raise anything)
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: no such function ({reason}); is its folder in PYTHONPATH?") from None
    if not callable(found):
        raise ValueError(f"{path} is not a function")
    called: Callable[..., Any] = found
    return called


def _one_of(field: str, *known: str) -> AfterValidator:
    def check(value: str) -> str:
        # Config looks up a dotted path later, since a module may define METHOD before the function that it names.
        if value not in known and "." not in value:
            raise ValueError(
                f"unknown method.{field}={value}; choose one of {', '.join(known)}, or the dotted path of a function"
            )
        return value

    return AfterValidator(check)


class Fields(Section):
    """How rewards and entropies become the per-token targets of the loss.

    loss = - sum_{i,t} token_weight_{i,t} * surrogate(ratio_{i,t}, advantage_i) + beta * KL - entropy_bonus * entropy
    """

    name: str = ""
    """The method's key in METHODS."""
    opening: Literal["plain", "reft"] = "plain"
    """How a training completion begins: sampled, or with one of the policy's most likely first tokens (REFT)."""
    opening_candidates: int = Field(20, ge=1)
    """reft: N, number of candidate first tokens."""
    opening_distinct: int = Field(4, ge=1)
    """reft: K, number of candidates that are picked; each begins an equal share of a group."""
    opening_learned: bool = True
    """reft: whether the first token is in the loss."""
    opening_after: str = ""
    """reft: text that is forced before the opener, such as a reasoning marker. It is part of the completion, for the
    reward and for actor.max_tokens, but not in the loss."""
    advantage: Annotated[str, _one_of("advantage", "group_std", "group_mean", "leave_one_out", "asymmetric")] = (
        "group_std"
    )
    """How rewards (asymmetric: correct answers) become advantages; or your own function of rewards_PG."""
    std_ddof: Literal[0, 1] = 0
    """group_std: the variance of a group's G rewards is a sum of squares divided by G - std_ddof."""
    beta_pos: float = Field(0.5, ge=0)
    """asymmetric: the power for correct answers; with both powers 0.5 it equals group_std."""
    beta_neg: float = Field(0.5, ge=0)
    """asymmetric: the power for incorrect answers."""
    decoupled_rewards: bool = False
    """Each reward of task.rewards becomes an advantage within its group before the weighted sum, which is standardised
    over the step (GDPO, arXiv 2601.05242, Eq. 4-6): for rewards that differ in scale."""
    token_advantage: Literal["broadcast", "erpo-additive", "erpo-gated-outcome", "erpo-multiplicative"] = "broadcast"
    """How a rollout's advantage becomes token advantages; the three ERPO variants need a reference pass."""
    erpo_gate: float = Field(5.0)
    """ERPO: sharpness gamma of the entropy gate."""
    erpo_weight: float = Field(0.2, ge=0)
    """ERPO: eta, weight of the progress term relative to the outcome."""
    erpo_progress: float = Field(0.1, ge=0)
    """ERPO: beta_s, the scale of log pi - log pi_ref."""
    erpo_buckets: int = Field(10, ge=1)
    """ERPO: K, number of segments of the rollouts within which progress is standardised."""
    token_weight: Annotated[str, _one_of("token_weight", "uniform", "horizon", "residual")] = "uniform"
    """Token weights: equal, by entropy, or by the adapter's effect; or your function of (entropy, mask, advantages)."""
    residual_power: float = Field(2.0, ge=0)
    """residual: kappa, the power of the hidden states' distance."""
    alpha: float = Field(0.0)
    """Horizon discount; negative amplifies uncertain tokens."""
    alpha_end: float | Literal["alpha"] = "alpha"
    """The discount at the last step; it changes linearly from alpha at the first. alpha: it stays what it is."""
    selective: bool = False
    """Discount only rollouts of negative advantage (Eq. 8)."""
    weight_gradient: bool = False
    """Let gradients flow through the token weights too."""
    top_entropy_fraction: float = Field(1.0, gt=0, le=1)
    """Only this fraction of the step's tokens, those of highest entropy, is weighted (arXiv 2506.01939: 0.2)."""
    entropy: Literal["exact", "topk-partial", "topk-renormalised"] = "exact"
    """Of the whole vocabulary, or one of two estimates from the K most likely tokens."""
    entropy_topk: int = Field(500, ge=1)
    """K of the two top-K estimates."""
    entropy_temperature: Literal["sampling", "one"] = "sampling"
    """Temperature of the entropy: actor.temperature, or 1."""
    normaliser: Literal["sequence-mean", "token-mean", "constant", "group", "step"] = "group"
    """Divisor of the token weights: the number of tokens of each sequence (sequence-mean) or of the step (token-mean),
    actor.max_tokens (constant), or the sum of the weights of each group (group) or of the step (step)."""
    ratio: Literal["token", "sequence", "power-mean", "stop-gradient"] = "token"
    """Importance ratio per token, per rollout (GSPO; power-mean: HölderPO), or per token without gradient (CISPO)."""
    power_start: float = Field(2.0)
    """power-mean: p at the first step; it changes linearly to power_end."""
    power_end: float = Field(-2.0)
    """power-mean: p from step power_steps on."""
    power_steps: int = Field(0, ge=0)
    """power-mean: p reaches power_end after so many steps; 0: at the last step of the run."""
    power_clip: Literal["sequence", "token", "both"] = "sequence"
    """power-mean: clip the mean (sequence), or each token's ratio before the mean (token), or first each token's ratio,
    to 1 / (1 + clip_low) .. 1 + clip_high whatever its advantage, and then the mean (both)."""
    clip_low: float = Field(0.2, ge=0, le=1)
    """The ratio is clipped below 1 - clip_low; 1: no lower bound."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped above 1 + clip_high."""
    kl: Literal["none", "k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence from the frozen model."""
    beta: float = Field(0.04, ge=0)
    """Weight of the KL divergence in the loss: of its mean over the tokens of the update, whatever the normaliser."""
    entropy_bonus: float = Field(0.0, ge=0)
    """Weight of the mean entropy in the objective; with entropy_target, its initial value."""
    entropy_target: float = Field(0.0, ge=0)
    """Nats. The bonus adapts (arXiv 2505.22312): it grows while the entropy is below the target; otherwise it shrinks
    and is not applied. 0: the bonus is constant."""
    entropy_bonus_step: float = Field(0.005, gt=0)
    """Change of the adaptive bonus per step."""
    entropy_bonus_max: float = Field(1.0, gt=0)
    """Upper bound of the adaptive bonus."""
    group_filter: Literal["none", "zero-variance", "accuracy"] = "none"
    """Excludes groups, from the KL too, of equal rewards, or with all answers correct or all incorrect."""
    reward_threshold: float = Field(0.0, ge=0)
    """Excludes groups whose rewards have a population standard deviation below this."""
    refill_rounds: int = Field(0, ge=0)
    """How many times a step samples new prompts to replace excluded groups."""
    overlong_buffer: int = Field(0, ge=0)
    """Number of last tokens before actor.max_tokens over which a penalty grows to overlong_penalty; 0: none."""
    overlong_penalty: float = Field(1.0, ge=0)
    """Penalty of a completion of actor.max_tokens tokens."""
    importance: Annotated[
        Literal["auto", "none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"], PLANNED
    ] = "auto"
    """Off-policy correction by weights pi_learner / pi_actor, for rollouts of an older version. auto: token-truncate
    with run.max_staleness, else none."""
    importance_cap: float = Field(2.0, gt=0)
    """Importance weights above it become it (truncate) or 0 (mask)."""


class Method(Fields):
    """An entry of METHODS: field values and their source."""

    paper: str
    """Source of the method."""
    equation: str
    """Numbers of its equations in the paper."""
    remark: str = ""
    """Differences from the paper, and limits."""

    def values(self) -> dict[str, Any]:
        """The fields that a configuration copies from the method."""
        return {name: getattr(self, name) for name in Fields.model_fields if name != "name"}
