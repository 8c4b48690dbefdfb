"""The table of methods: one entry each, words and numbers only (../README.md, "Methods").

A method may also be a user's own: METHOD in a module that --method.name names, with functions of that module by dotted
path.
"""

import importlib
from typing import Any

from pydantic import model_validator

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
        remark="from notes that agree, not from its text; right means the exact answer",
        advantage="asymmetric",
        beta_pos=0.9,
        beta_neg=0.4,
        normaliser="sequence-mean",
    ),
    Method(
        name="erpo",
        paper="arXiv 2603.28204",
        equation="-",
        remark="its parts from one secondary source, their assembly ours; no results of its authors were found",
        token_advantage="erpo-additive",
        normaliser="sequence-mean",
    ),
    Method(
        name="arca",
        paper="arXiv 2606.00257",
        equation="its code",
        remark="its text has power 1; its own result is no win: greedy .590 against uniform .620",
        token_weight="residual",
        normaliser="sequence-mean",
    ),
    Method(
        name="reft",
        paper="arXiv 2605.28295",
        equation="-",
        remark="its opening on GRPO; the paper has G 8, here actor.group_size must be a multiple of opening_distinct",
        opening="reft",
        normaliser="sequence-mean",
    ),
    Method(
        name="holder",
        paper="arXiv 2605.12058",
        equation="its code",
        remark="p has no effect without several learner.inner_updates; the paper makes 8",
        ratio="power-mean",
        normaliser="sequence-mean",
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
        remark="the paper's overlong_buffer is 4,096 of 20,480 tokens; set a share of actor.max_tokens",
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
        remark="without several learner.inner_updates its ratio is 1 and it is grpo",
        ratio="sequence",
        normaliser="sequence-mean",
        clip_low=3e-4,
        clip_high=4e-4,
    ),
    Method(
        name="cispo",
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
    Method(
        name="entropy-mask",
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
    Method(
        name="rloo",
        paper="arXiv 2402.14740",
        equation="-",
        remark="its advantage in GRPO's loss, the KL in the loss rather than in the reward",
        advantage="leave_one_out",
        normaliser="sequence-mean",
    ),
)
METHODS = {method.name: method for method in _TABLE}


class MethodConfig(Fields):
    """The configuration's section: every field of the method that runs."""

    name: str = "sa-ah-grpo"
    """Method: see README.md, Methods."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Fields that are unset, or null, are the named method's. Where none is, the method is not looked up: a run's
        config.toml means what it did when the table has changed."""
        given = {key: value for key, value in given.items() if value is not None}
        if cls.model_fields.keys() <= given.keys():
            return given
        return find(given.get("name", cls.model_fields["name"].default)).values() | given


def find(name: str) -> Method:
    """The method of the table, or METHOD of the module that `name` is the path of. Raises ValueError for neither."""
    if name in METHODS:
        return METHODS[name]
    try:
        method = importlib.import_module(name).METHOD
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"method.name={name} is unknown{suggest(name, METHODS)} (nor is it a module with a METHOD: {error})"
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
