"""The table of methods: one row each, words and numbers only (../README.md, "Methods").

A field names a pure function of the learner (`advantage` -> learner/advantage.py, ...) or holds one of its
numbers. Every field can be overridden on the command line as --method.FIELD, so rows compose. A row may also be a
user's own: METHOD in a module that --method.name names, with functions of that module by dotted path.
"""

import importlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def function(path: str) -> Callable[..., Any]:
    """The function that a dotted path names. Raises ValueError, in one line, where there is none."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} names no function ({error}); is its folder in PYTHONPATH?") from None
    if not callable(found):
        raise ValueError(f"{path} is no function")
    return found


def _one_of(field: str, *known: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known and "." not in value:  # whether the function exists is asked once its module is whole
            raise ValueError(f"method.{field}={value} is none of {', '.join(known)}, nor the dotted path of a function")
        return value

    return AfterValidator(check)


FACTS = ("paper", "equation", "remark")  # the fields of a row that nobody changes


class Method(BaseModel):
    """One way to turn rewards and entropies into the streams of the loss.

    loss = - sum_{i,t} token_weight_{i,t} * surrogate(ratio_{i,t}, advantage_i) + beta * KL - entropy_bonus * entropy
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    paper: str
    """Where the row comes from."""
    equation: str
    """Its numbers there."""
    remark: str = ""
    """What the paper supports, and what is ours."""
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
    """How rewards (asymmetric: right and wrong answers) become advantages; or your rewards_PG -> advantages_PG."""
    beta_pos: float = Field(0.5, allow_inf_nan=False)
    """asymmetric: the power for right answers; 0.5 and 0.5 is group_std."""
    beta_neg: float = Field(0.5, allow_inf_nan=False)
    """asymmetric: the power for wrong ones."""
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
    entropy_target: float | None = Field(None, ge=0)
    """Nats. The bonus then adapts (arXiv 2505.22312): it grows while the entropy is lower, else shrinks and is off."""
    entropy_bonus_step: float = Field(0.005, gt=0)
    """By how much it adapts in a step."""
    entropy_bonus_max: float = Field(1.0, gt=0)
    """How far it grows."""
    group_filter: Literal["none", "zero-variance", "accuracy"] = "none"
    """Groups that take no part, not even in the KL: of equal rewards, or with all answers right or all wrong."""
    reward_threshold: float | None = Field(None, ge=0)
    """Groups whose rewards spread (population std) less than this take no part."""
    refill_rounds: int = Field(0, ge=0)
    """How many times a step samples new prompts in place of groups that take no part."""
    overlong_buffer: int = Field(0, ge=0)
    """Tokens before actor.max_tokens over which a length penalty grows from 0 to overlong_penalty; 0: none."""
    overlong_penalty: float = Field(1.0, ge=0, allow_inf_nan=False)
    """What a completion of full length loses."""
    importance: Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"] = "none"
    """Weight of pi_learner / pi_actor for what the actor sampled otherwise than the learner sees it."""
    importance_cap: float = Field(2.0, gt=0)
    """Weights above it are cut to it (truncate) or to 0 (mask)."""

    @property
    def has_kl(self) -> bool:
        """Whether the objective holds a divergence from the frozen model."""
        return self.kl != "none" and self.beta > 0

    @property
    def needs_evaluation_mode(self) -> bool:
        """Whether the adapter-on and adapter-off passes are compared, so that dropout would be taken for progress."""
        return self.token_advantage != "broadcast" or self.token_weight == "residual"


METHODS: dict[str, Method] = {
    "grpo": Method(
        paper="arXiv 2606.05434",
        equation="2",
        remark="after 2402.03300; the recipe's own baseline is sa-ah-grpo with alpha 0, a token mean",
        normaliser="sequence-mean",
    ),
    "ah-grpo": Method(
        paper="arXiv 2606.05434",
        equation="3-6",
        remark="discounts every rollout",
        token_weight="horizon",
        alpha=0.5,
    ),
    "sa-ah-grpo": Method(
        paper="arXiv 2606.05434",
        equation="3-5, 7-9",
        remark="discounts rollouts of negative advantage",
        token_weight="horizon",
        alpha=0.5,
        selective=True,
    ),
    "asym-grpo": Method(
        paper="arXiv 2604.04894",
        equation="-",
        remark="from notes that agree, not from its text; right means the exact answer",
        advantage="asymmetric",
        beta_pos=0.9,
        beta_neg=0.4,
        normaliser="sequence-mean",
    ),
    "erpo": Method(
        paper="arXiv 2603.28204",
        equation="-",
        remark="its parts from one secondary source, their assembly ours; no results of its authors were found",
        token_advantage="erpo-additive",
        normaliser="sequence-mean",
    ),
    "arca": Method(
        paper="arXiv 2606.00257",
        equation="its code",
        remark="its text has power 1; its own result is no win: greedy .590 against uniform .620",
        token_weight="residual",
        normaliser="sequence-mean",
    ),
    "reft": Method(
        paper="arXiv 2605.28295",
        equation="-",
        remark="its opening on GRPO; the paper has G 8, here actor.group_size must be a multiple of opening_distinct",
        opening="reft",
        normaliser="sequence-mean",
    ),
    "holder": Method(
        paper="arXiv 2605.12058",
        equation="its code",
        remark="p has no effect without several learner.inner_updates; the paper makes 8",
        ratio="power-mean",
        normaliser="sequence-mean",
    ),
    "dr-grpo": Method(
        paper="arXiv 2503.20783",
        equation="-",
        remark="the constant is actor.max_tokens",
        advantage="group_mean",
        normaliser="constant",
        kl="none",
        beta=0.0,
    ),
    "dapo": Method(
        paper="arXiv 2503.14476",
        equation="8-13",
        remark="the paper's overlong_buffer is 4,096 of 20,480 tokens; set a share of actor.max_tokens",
        normaliser="token-mean",
        clip_high=0.28,
        kl="none",
        beta=0.0,
        group_filter="accuracy",
        refill_rounds=3,
    ),
    "gspo": Method(
        paper="arXiv 2507.18071",
        equation="5, 7",
        remark="without several learner.inner_updates its ratio is 1 and it is grpo",
        ratio="sequence",
        normaliser="sequence-mean",
        clip_low=3e-4,
        clip_high=4e-4,
    ),
    "cispo": Method(
        paper="arXiv 2506.13585",
        equation="4, 5",
        remark="no lower bound; the upper one is ours, the paper names none",
        ratio="stop-gradient",
        normaliser="token-mean",
        clip_low=1.0,
        clip_high=0.28,
        kl="none",
        beta=0.0,
    ),
    "entropy-mask": Method(
        paper="arXiv 2506.01939",
        equation="-",
        remark="the top 20 % of the step's tokens, on DAPO's loss",
        top_entropy_fraction=0.2,
        normaliser="token-mean",
        clip_high=0.28,
        kl="none",
        beta=0.0,
        group_filter="accuracy",
        refill_rounds=3,
    ),
    "rloo": Method(
        paper="arXiv 2402.14740",
        equation="-",
        remark="its advantage in GRPO's loss, the KL in the loss rather than in the reward",
        advantage="leave_one_out",
        normaliser="sequence-mean",
    ),
}


def find(name: str) -> Method:
    """The row of the table, or METHOD of the module that `name` is the path of. Raises ValueError for neither."""
    if name in METHODS:
        return METHODS[name]
    try:
        row = importlib.import_module(name).METHOD
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"neither a row nor a module with a METHOD: {error}") from None
    if not isinstance(row, Method):
        raise ValueError("METHOD of that module is no common.methods.Method")
    return row


def parameters() -> dict[str, tuple[Any, str]]:
    """Every field that --method.FIELD can change: its default and its meaning."""
    return {
        name: (field.default, field.description or "")
        for name, field in Method.model_fields.items()
        if name not in FACTS
    }


def table() -> str:
    """The rows in Markdown: name, source, the fields that differ from the defaults, and what there is to say."""
    lines = ["| `--method.name` | paper | equation | its fields | remark |", "|---|---|---|---|---|"]
    for name, row in METHODS.items():
        changed = {field: getattr(row, field) for field, (default, _) in parameters().items()}
        changed = {field: value for field, value in changed.items() if value != parameters()[field][0]}
        fields = ", ".join(f"{field} {value}" for field, value in changed.items())
        lines.append(f"| `{name}` | {row.paper} | {row.equation} | {fields} | {row.remark} |")
    return "\n".join(lines)
