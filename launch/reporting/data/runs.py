"""Run folders as the report reads them: torn or missing files are not an error, and every run has a unique name."""

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.config import Config, options
from common.methods import METHODS
from common.section import COSMETIC, MACHINE, REPETITION
from common.types import UserError

# Settings in which the repetitions of one experiment may differ.
OF_ONE_RUN = {name for role in (COSMETIC, REPETITION, MACHINE) for name in options(role)}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder. Whatever a file lacks is NaN or absent, never an error: the run may be old, or not finished."""

    folder: Path
    name: str  # of the folder, made unique within a report
    settings: Mapping[str, Any]  # "section.key" -> value, with the method's and the configuration's defaults filled in
    metrics: tuple[Mapping[str, Any], ...]  # one record per step, in order of the steps
    evaluations: tuple[Mapping[str, Any], ...]  # in order of the steps; step 0 is the base model

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
        """float [steps], one metric; NaN where a step has no number."""
        return np.array([number(record.get(metric)) for record in self.metrics], dtype=float)

    def pass_at_1(self) -> dict[int, float]:
        """Step -> greedy Pass@1; step 0 is the base model."""
        return {record["step"]: number(record.get("pass_at_1")) for record in self.evaluations}

    @property
    def num_problems(self) -> int:
        """Of an evaluation; 0 if there was none."""
        return max((int(e["num_problems"]) for e in self.evaluations if number(e.get("num_problems")) > 0), default=0)


def number(value: Any) -> float:
    """The value as a float, NaN for anything that is not a finite number."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    try:
        return float(value) if good else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan


def is_step(value: Any) -> bool:
    """Whether it can be the number of a step."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, read as a stream; none if there is no file. Torn or foreign lines are skipped."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and is_step(record.get("step")):
                yield record


def _by_step(path: Path) -> tuple[dict[str, Any], ...]:
    """A file's records in order of their steps; of a step that was recorded twice, the later record."""
    latest = {record["step"]: record for record in records(path)}
    return tuple(latest[step] for step in sorted(latest))


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Two levels of tables as "section.key"."""
    return {
        f"{section}.{key}": value
        for section, table in tree.items()
        if isinstance(table, Mapping)
        for key, value in table.items()
    }


def read(folder: Path) -> Run:
    """The run in `folder`. Raises UserError, in one line, if there is none."""
    file = folder / "config.toml"
    if not file.is_file():
        raise UserError(
            f"{folder} is not a run folder (no config.toml in it, nor in a folder in it); name a folder that "
            "launch/run.py wrote, or a grid's"
        )
    try:
        written = flat(tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}; name a folder that launch/run.py wrote") from None
    defaults = flat(Config().model_dump(mode="json", exclude_none=True))
    method = METHODS.get(str(written.get("method.name")))
    fields = method.values() if method else {}  # an older config.toml holds only the fields that were set
    settings = defaults | {f"method.{key}": value for key, value in fields.items()} | written
    for key in ("run.seed", "run.steps", "method.alpha"):
        if math.isnan(number(settings.get(key, 0))):
            raise UserError(f"{file}: {key}={settings[key]!r} is not a number; name a folder that launch/run.py wrote")
    return Run(
        folder=folder,
        name=folder.resolve().name,
        settings=settings,
        metrics=_by_step(folder / "metrics.jsonl"),
        evaluations=_by_step(folder / "evaluations.jsonl"),
    )


def expanded(folders: Sequence[Path]) -> list[Path]:
    """The folders; a grid's folder becomes those of its runs, any other stays for `read` to reject."""
    found: list[Path] = []
    for folder in folders:
        inside = [] if (folder / "config.toml").is_file() else sorted(folder.glob("*/config.toml"))
        found += [file.parent for file in inside if file.is_file()] or [folder]
    return found


def read_all(folders: Sequence[Path]) -> list[Run]:
    """The runs of the folders, each once, under unique names."""
    runs = [read(folder) for folder in {folder.resolve(): folder for folder in expanded(folders)}.values()]
    for depth in range(2, 20):
        if len({run.name for run in runs}) == len(runs):
            break
        runs = [replace(run, name="/".join(run.folder.resolve().parts[-depth:])) for run in runs]
    return runs
