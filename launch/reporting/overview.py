"""The first screen: what was trained, reward and accuracy before and after, steps and time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launch.reporting.data.groups import Group
from launch.reporting.data.measures import at_end, at_start, base, evaluated, mean_idle, pass_at
from launch.reporting.data.runs import Run
from launch.reporting.data.statistics import Estimate, bootstrap, finite
from launch.reporting.table import ABSENT, Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    label: str
    value: str
    note: str = ""  # its intervals, and what else it needs, one a line


def title(groups: Sequence[Group]) -> str:
    """Method and model of one experiment, or how many there are."""
    if len(groups) == 1:
        return f"{groups[0].label} on {groups[0].runs[0].model}"
    models = {run.model for group in groups for run in group.runs}
    return f"{len(groups)} experiments on {models.pop() if len(models) == 1 else f'{len(models)} models'}"


def setup(runs: Sequence[Run]) -> list[str]:
    """What all runs have in common of task, batch and optimizer."""
    of_runs = [_setup(run) for run in runs]
    return [words for words in of_runs[0] if all(words in other for other in of_runs)]


def _setup(run: Run) -> list[str]:
    get = run.settings.get
    task = f"{get('task.gym')} (reasoning-gym)" if get("task.name") == "gym" else get("task.name")
    return [
        f"task {task}",
        f"{get('run.prompts_per_step')} prompts × {get('actor.group_size')} completions per step",
        f"at most {get('actor.max_tokens')} tokens per completion",
        f"LoRA rank {get('model.lora_rank')}",
        f"learning rate {get('learner.learning_rate')}",
    ]


def facts(group: Group) -> list[Fact]:
    """The numbers of a group that a reader wants first."""
    return [
        _change("reward", *_edges(group, "reward/mean"), digits=2),
        _accuracy(group),
        _change("tokens per completion", *_edges(group, "completion/length_mean"), digits=0),
        Fact(label="steps", value=group.progress, note="" if group.finished else "not finished"),
        Fact(label="seeds", value=str(len(group.seeds)), note=f"run.seed {', '.join(map(str, group.seeds))}"),
        _time(group),
    ]


def _change(label: str, before: Estimate, after: Estimate, *, digits: int, note: str = "") -> Fact:
    cells = [Cell(value=estimate, digits=digits) for estimate in (before, after)]
    intervals = [cell.interval or ABSENT for cell in cells] if any(cell.interval for cell in cells) else []
    return Fact(
        label=label,
        value=" → ".join(cell.number for cell in cells),
        note="\n".join(filter(None, (" → ".join(intervals), note))),
    )


def _edges(group: Group, metric: str) -> tuple[Estimate, Estimate]:
    """A metric over the first and over the last steps."""
    before, after = (group.per_seed(lambda run: at_start(run, metric)), group.per_seed(lambda run: at_end(run, metric)))
    return bootstrap(before), bootstrap(after)


def _accuracy(group: Group) -> Fact:
    """Pass@1 before training and at the last evaluation; without evaluations, the training rollouts'."""
    if not group.evaluated_steps:
        training = _edges(group, "reward/correct_fraction")
        return _change("accuracy", *training, digits=3, note="of training rollouts: no evaluation")
    last = group.evaluated_steps[-1]
    before, after = evaluated(group, group.per_seed(base)), pass_at(group, last) if last else Estimate(value=np.nan)
    problems = max(run.num_problems for run in group.runs)
    return _change("accuracy", before, after, digits=3, note=f"step {last}, {problems} problems")


def _time(group: Group) -> Fact:
    """Of the steps of one run: mean over runs of the sum, median of a step, and how idle the devices were meanwhile."""
    times = [seconds for run in group.runs if len(seconds := finite(run.series("time/step_seconds")))]
    if not times:
        return Fact(label="time per run", value=ABSENT)
    median = float(np.median(np.concatenate(times)))
    total = float(np.mean([each.sum() for each in times]))
    idle = finite(group.per_seed(mean_idle))
    devices = f"devices idle {100 * idle.mean():.0f} %" if len(idle) else ""
    note = "\n".join(filter(None, (f"{median:.1f} s/step", devices)))
    return Fact(label="time per run", value=_duration(total), note=note)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
