"""Run folders as the report reads them: a torn last line or a missing file is no error; every run has a unique name."""

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from common.config import Config, options
from common.methods import METHODS
from common.metrics import is_count, read_lines
from common.section import COSMETIC, MACHINE, PLACEMENT, REPETITION
from common.types import UserError

# Settings in which the repetitions of one experiment may differ.
OF_ONE_RUN = {name for role in (COSMETIC, PLACEMENT, REPETITION, MACHINE) for name in options(role)}
FILES = ("config.toml", "metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl", "timeline.jsonl")  # that a report reads

LARGEST = 1e100  # of float32 it is 3e38; the square of a larger one may not be finite


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder. Whatever a file lacks is NaN or absent, never an error: the run may not be finished."""

    folder: Path
    name: str  # of the folder, made unique within a report
    settings: Mapping[str, Any]  # "section.key" -> value, with the method's and the configuration's defaults filled in
    metrics: tuple[Mapping[str, Any], ...]  # one record per step, in order of the steps
    evaluations: tuple[Mapping[str, Any], ...]  # in order of the steps; step 0 is the base model
    timeline: tuple[Mapping[str, Any], ...] = ()  # the work that ended up to each step (launch/recording/timeline.py)

    @property
    def seed(self) -> int:
        return int(self.settings["run.seed"])

    @property
    def model(self) -> str:
        return Path(str(self.settings["model.path"])).name

    @cached_property
    def steps(self) -> np.ndarray:
        """int [steps], the optimizer steps that were recorded."""
        return np.array([record["step"] for record in self.metrics], dtype=int)

    @property
    def num_steps(self) -> int:
        """The last recorded step."""
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def finished(self) -> bool:
        return self.num_steps >= int(self.settings["run.steps"])

    def series(self, metric: str) -> np.ndarray:
        """float [steps], one metric; NaN where a step has none, or one beyond all that a run computes with."""
        values = np.array([record.get(metric) for record in self.metrics], dtype=float)  # None becomes NaN
        return np.where(np.abs(values) < LARGEST, values, np.nan)

    def pass_at_1(self) -> dict[int, float]:
        """Step -> greedy Pass@1; step 0 is the base model."""
        return {record["step"]: record["pass_at_1"] for record in self.evaluations}

    @property
    def num_problems(self) -> int:
        """Of an evaluation; 0 if there was none."""
        return max((record["num_problems"] for record in self.evaluations), default=0)


def _by_step(path: Path, check: Callable[[Mapping[str, Any]], bool] = bool) -> tuple[dict[str, Any], ...]:
    """A file's records in order of their steps; of a step that was recorded twice, the later record.

    Without the last line if that is cut off: by a crash, or because the run is writing it. Raises UserError for a line
    that launch/run.py does not write.
    """
    latest = {record["step"]: record for record in read_lines(path)}
    for step, record in latest.items():
        if not check(record):
            raise UserError(
                f"{path} is damaged (step {step} has no numbers of a run); restore it, or leave the run out"
            )
    return tuple(latest[step] for step in sorted(latest))


def _of_metrics(record: Mapping[str, Any]) -> bool:
    return all(value is None or _is_number(value) for value in record.values())


def _of_evaluations(record: Mapping[str, Any]) -> bool:
    fraction = record.get("pass_at_1")
    return _is_number(fraction) and 0 <= fraction <= 1 and is_count(record.get("num_problems"))


def _of_timeline(record: Mapping[str, Any]) -> bool:
    idle, spans = record.get("idle_fractions"), record.get("spans")
    if not (isinstance(idle, list) and isinstance(spans, list) and spans and _takes_time(record)):
        return False
    shares = all(_is_number(share) and 0 <= share <= 1 for share in idle)
    return shares and record["start_seconds"] < record["end_seconds"] and all(_is_span(s, len(idle)) for s in spans)


def _is_span(span: object, num_devices: int) -> bool:
    """Whether it is a worker's work on one of the devices."""
    return (
        isinstance(span, Mapping)
        and _takes_time(span)
        and isinstance(span.get("worker"), str)
        and isinstance(span.get("work"), str)
        and (is_count(span.get("version")) or span["work"] != "sample")
        and is_count(span.get("device"))
        and span["device"] < num_devices
    )


def _takes_time(record: Mapping[str, Any]) -> bool:
    moments = record.get("start_seconds"), record.get("end_seconds")
    return all(_is_number(moment) and abs(moment) < 1e9 for moment in moments)  # 30 years


def _is_number(value: object) -> TypeGuard[float]:
    """Whether float holds it; NaN and infinities are numbers here."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**300)


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Two levels of tables as "section.key"."""
    tables = [(section, table) for section, table in tree.items() if isinstance(table, Mapping)]
    return {f"{section}.{key}": value for section, table in tables for key, value in table.items()}


def read(folder: Path) -> Run:
    """The run in `folder`. Raises UserError, in one line, if there is none."""
    file = folder / "config.toml"
    if not file.is_file():
        raise UserError(
            f"{folder} is not a run folder (no config.toml in it, nor in a folder in it); name a folder that "
            "launch/run.py wrote, or a grid's"
        )
    for name in FILES:
        if (folder / name).is_symlink():  # it may show any file of the reader's machine to whoever gets the report
            raise UserError(
                f"{folder / name} is a symbolic link; put the file itself in its place, or leave the run out"
            )
    try:
        written = flat(tomllib.loads(file.read_text(encoding="utf-8")))
        repr(written)  # the page shows it; RecursionError: it is nested too deeply for that
    except (ValueError, RecursionError) as error:  # ValueError: TOML's, UTF-8's, and a number of too many digits
        raise UserError(f"{file} is not valid TOML: {error}; name a folder that launch/run.py wrote") from None
    defaults = flat(Config().model_dump(mode="json", exclude_none=True))
    method = METHODS.get(str(written.get("method.name")))
    fields = method.values() if method else {}  # an older config.toml holds only the fields that were set
    settings = defaults | {f"method.{key}": value for key, value in fields.items()} | written
    for key in ("run.seed", "run.steps", "method.alpha"):
        value = settings.get(key, 0)
        if not (_is_number(value) and math.isfinite(value) if key == "method.alpha" else is_count(value)):
            raise UserError(f"{file}: {key}={value!r} is not a number; name a folder that launch/run.py wrote")
    return Run(
        folder=folder,
        name=folder.resolve().name,
        settings=settings,
        metrics=_by_step(folder / "metrics.jsonl", _of_metrics),
        evaluations=_by_step(folder / "evaluations.jsonl", _of_evaluations),
        timeline=_by_step(folder / "timeline.jsonl", _of_timeline),
    )


def expanded(folders: Sequence[Path]) -> list[Path]:
    """The folders; a grid's folder becomes those of its runs, any other stays for `read` to reject."""
    found: list[Path] = []
    for folder in folders:
        inside = [] if (folder / "config.toml").is_file() else sorted(folder.glob("*/config.toml"))
        found += [file.parent for file in inside] or [folder]
    return found


def read_all(folders: Sequence[Path]) -> list[Run]:
    """The runs of the folders, each once, under unique names."""
    runs = [read(folder) for folder in {folder.resolve(): folder for folder in expanded(folders)}.values()]
    for depth in range(2, 20):
        if len({run.name for run in runs}) == len(runs):
            break
        runs = [replace(run, name="/".join(run.folder.resolve().parts[-depth:])) for run in runs]
    return runs
