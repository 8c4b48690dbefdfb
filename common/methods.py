"""METHODS: one entry per method, words and numbers only (../learner/README.md).

Users can add their own: --method.name takes the dotted path of a module with a METHOD, whose fields may name functions
by dotted path.
"""

from typing import Any

from pydantic import model_validator

from common.files import user_module
from common.method import Fields, Method
from common.types import suggest

__all__ = ["METHODS", "Method", "MethodConfig", "find", "parameters", "table"]

_TABLE = (
    Method(
        name="grpo",
        paper="arXiv 2606.05434",
        equation="2",
        remark="after 2402.03300; the recipe's own baseline is sa-ah-grpo with alpha 0, a token mean",
        normaliser="sequence-mean",
    ),
    Method(
        name="ah-grpo",
        paper="arXiv 2606.05434",
        equation="3-6",
        remark="discounts every rollout",
        token_weight="horizon",
        alpha=0.5,
    ),
    Method(
        name="sa-ah-grpo",
        paper="arXiv 2606.05434",
        equation="3-5, 7-9",
        remark="discounts rollouts of negative advantage",
        token_weight="horizon",
        alpha=0.5,
        selective=True,
    ),
    Method(
        name="asym-grpo",
        paper="arXiv 2604.04894",
        equation="-",
        remark="from notes that agree, not from the paper's text; correct means the exact answer; KL and normaliser "
        "are ours; its runs have learner.mini_batches=2",
        advantage="asymmetric",
        beta_pos=0.9,
        beta_neg=0.4,
        normaliser="sequence-mean",
    ),
    Method(
        name="erpo",
        paper="arXiv 2603.28204",
        equation="7-10",
        remark="from notes that agree on Eq. 7-10; how the parts are added up after Eq. 10 is ours; no accuracy of its "
        "authors was found",
        token_advantage="erpo-additive",
        normaliser="sequence-mean",
    ),
    Method(
        name="arca",
        paper="arXiv 2606.00257",
        equation="its code",
        remark="its code has no clip either; the paper's text has power 1; its own result is worse than uniform: "
        "greedy 0.590 against 0.620",
        std_ddof=1,
        token_weight="residual",
        normaliser="sequence-mean",
        kl="none",
        beta=0.0,
    ),
    Method(
        name="reft",
        paper="arXiv 2605.28295",
        equation="-",
        remark="its opening with GRPO; the paper has G = 8; actor.group_size must be a multiple of opening_distinct; "
        "where the format begins with a tag, set opening_after to it (composite reward: `<start_working_out>\\n`)",
        opening="reft",
        normaliser="sequence-mean",
    ),
    Method(
        name="holder",
        paper="arXiv 2605.12058",
        equation="its code",
        remark="p has no effect with one update a step: its runs have learner.mini_batches=8, and p falls over "
        "power_steps=500 in one of them; truncated completions, which score 0 there, keep their reward",
        std_ddof=1,
        ratio="power-mean",
        normaliser="sequence-mean",
        kl="none",
        beta=0.0,
    ),
    Method(
        name="dr-grpo",
        paper="arXiv 2503.20783",
        equation="-",
        remark="the constant is actor.max_tokens",
        advantage="group_mean",
        normaliser="constant",
        kl="none",
        beta=0.0,
    ),
    Method(
        name="dapo",
        paper="arXiv 2503.14476",
        equation="8-13",
        remark="the paper's overlong_buffer is 4,096 of 20,480 tokens; set it in proportion to actor.max_tokens",
        normaliser="token-mean",
        clip_high=0.28,
        kl="none",
        beta=0.0,
        group_filter="accuracy",
        refill_rounds=3,
    ),
    Method(
        name="gspo",
        paper="arXiv 2507.18071",
        equation="5, 7",
        remark="with one update a step its ratio is 1, and it equals grpo without KL: its runs have "
        "learner.mini_batches=4",
        ratio="sequence",
        normaliser="sequence-mean",
        clip_low=3e-4,
        clip_high=4e-4,
        kl="none",
        beta=0.0,
    ),
    Method(
        name="cispo",
        paper="arXiv 2506.13585",
        equation="4, 5",
        remark="no lower bound; the upper bound is ours, the paper gives none; its runs have learner.mini_batches=16 "
        "and DAPO's length penalty: set overlong_buffer",
        ratio="stop-gradient",
        normaliser="token-mean",
        clip_low=1.0,
        clip_high=0.28,
        kl="none",
        beta=0.0,
        group_filter="accuracy",
        refill_rounds=3,
    ),
    Method(
        name="entropy-mask",
        paper="arXiv 2506.01939",
        equation="-",
        remark="the top 20 % of the step's tokens, with DAPO's loss",
        top_entropy_fraction=0.2,
        normaliser="token-mean",
        clip_high=0.28,
        kl="none",
        beta=0.0,
        group_filter="accuracy",
        refill_rounds=3,
    ),
    Method(
        name="rloo",
        paper="arXiv 2402.14740",
        equation="-",
        remark="its paper's sum over a completion, divided by actor.max_tokens; the clip is GRPO's, and the KL is in "
        "the loss rather than in the reward",
        advantage="leave_one_out",
        normaliser="constant",
    ),
)
METHODS = {method.name: method for method in _TABLE}


class MethodConfig(Fields):
    """The configuration's [method] section: every field of the method that a run uses."""

    name: str = "sa-ah-grpo"
    """Method: see README.md, Methods."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Fill fields that are unset, or null, from the named method. If all are set, the method is not looked up, so
        that a run's config.toml keeps its meaning when METHODS changes."""
        if cls.model_fields.keys() <= given.keys():
            return given
        return find(given.get("name", cls.model_fields["name"].default)).values() | given


def find(name: str) -> Method:
    """The method in METHODS, or METHOD of the module at the path `name`. Raises ValueError if there is neither."""
    if name in METHODS:
        return METHODS[name]
    try:
        method = user_module(name).METHOD
    except (ImportError, ValueError, TypeError, AttributeError, SyntaxError) as error:
        raise ValueError(
            f"method.name={name} is unknown{suggest(name, METHODS)} (and it is not a module with a METHOD: {error})"
        ) from None
    if not isinstance(method, Method):
        raise ValueError(f"method.name={name}: its METHOD is not a common.methods.Method")
    return method


def parameters() -> dict[str, tuple[Any, str]]:
    """Every field that --method.FIELD can change: its default and its meaning."""
    return {
        name: (field.default, field.description or "") for name, field in Fields.model_fields.items() if name != "name"
    }


def table() -> str:
    """The methods in Markdown: name, source, the fields that differ from the defaults, and the remark."""
    lines = ["| `--method.name` | paper | equation | its fields | remark |", "|---|---|---|---|---|"]
    defaults = {field: default for field, (default, _) in parameters().items()}
    for method in METHODS.values():
        fields = ", ".join(f"{field} {value}" for field, value in method.values().items() if value != defaults[field])
        lines.append(f"| `{method.name}` | {method.paper} | {method.equation} | {fields} | {method.remark} |")
    return "\n".join(lines)
