"""A grid varies one run's configuration. This module reads its TOML file and makes the cells, each an ordinary run.

The file has the tables of a run's configuration, which all cells share, and

    [grid]
    seeds = [1, 2, 3]                              # run.seed
    models = ["Qwen/Qwen2.5-1.5B-Instruct"]        # model.path; default: that of [model]
    variants = [
        { name = "ah-grpo_alpha-0.5", method = { name = "ah-grpo", alpha = 0.5 } },
        { name = "holder", method = { name = "holder" }, learner = { mini_batches = 8 } },
    ]

    [scale.cpu.run]                                # --scale cpu: overrides the tables above, [grid] included
    steps = 30

A variant's tables override the shared ones; command-line options override both. A cell is one variant with one model
and one seed, in the folder VARIANT[_MODEL]_seed-N (MODEL if grid.models is set). All cells have equal steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, NonNegativeInt, ValidationError

from common.command_line import Tables, build, merged, parse, read
from common.config import Config, with_values
from common.files import usable
from common.section import Section
from common.types import UserError, suggest

OWNED = {  # options that a grid sets itself, and what to use instead
    "run.dir": "use --dir",
    "run.seed": "use grid.seeds",
    "run.resume": "a grid always resumes",
}


class Variant(Section):
    """A name, and the tables that override the shared ones."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=r"^\w[\w.-]*$")
    """The first part of the names of its cells' folders."""


class Grid(Section):
    """The [grid] table."""

    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """run.seed of the cells. All cells have the same task.seed, and so the same data."""
    models: tuple[str, ...] = ()
    """model.path of the cells; empty: the shared one."""
    variants: tuple[Variant, ...] = Field(min_length=1)
    """The runs to be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a grid."""

    name: str
    kind: str  # the name without the seed: cells of a kind differ only in run.seed and run.dir
    config: Config


def cells(
    path: Path,
    folder: Path,
    *,
    scale: str | None = None,
    options: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
) -> list[Cell]:
    """The cells of the grid file `path`, with run folders in `folder`; of some of its `seeds` alone if they are given.

    They are ordered by seed, so that an unfinished grid has runs of every variant. Raises UserError for an invalid file
    or invalid options.
    """
    grid, shared = _read(path, scale)
    given = parse(options)
    _refuse_owned(grid, shared, given)
    build(shared, given)  # reports an error of the shared tables without naming a variant
    kinds: list[tuple[str, Config]] = []
    for model in grid.models or (None,):
        for variant in grid.variants:
            name = f"{variant.name}_{Path(model).name}" if model else variant.name
            try:
                own = merged(variant.model_extra or {})
                _refuse_owned(grid, own)
                if "steps" in own.get("run", {}):
                    raise UserError("run.steps is the same for all cells; set it in [run]")
                of_model = {"model": {"path": model}} if model else {}
                kinds.append((name, build(shared, own, of_model, given)))
            except UserError as error:
                raise UserError(f"variant {variant.name}: {error}") from None
    _check_distinct(kinds, grid.seeds)
    if unknown := sorted(set(seeds or ()) - set(grid.seeds)):
        raise UserError(f"--seeds {unknown[0]} is not in grid.seeds={list(grid.seeds)}; name some of these")
    made = []
    for seed, (kind, config) in product([s for s in grid.seeds if seeds is None or s in seeds], kinds):
        name = f"{kind}_seed-{seed}"
        config = with_values(config, {"run.dir": usable(folder / name), "run.seed": seed})
        made.append(Cell(name=name, kind=kind, config=config))
    return made


def _read(path: Path, scale: str | None) -> tuple[Grid, Tables]:
    """The [grid] table and the shared tables, with those of a scale merged in."""
    tables = read(path)
    if "grid" not in tables:
        raise UserError(f"--config {path} has no table [grid]; start a single run with launch/run.py")
    scales = merged(tables.pop("scale", {}))
    if scale is not None and scale not in scales:
        raise UserError(f"--scale {scale} is not in {path}{suggest(scale, scales) if scales else '; leave it out'}")
    shared = merged(tables, scales[scale] if scale else {})
    try:
        return Grid(**shared.pop("grid")), shared
    except ValidationError as error:
        raise UserError("; ".join(_explain(e) for e in error.errors())) from None


def _explain(error: Any) -> str:
    where = ".".join(map(str, ("grid", *error["loc"])))
    if error["type"] == "extra_forbidden":
        return f"{where}={error['input']!r} is an unknown key{suggest(str(error['loc'][-1]), Grid.model_fields)}"
    if error["type"] == "missing":
        return f"{where} is missing; add it"
    return f"{where}={error['input']!r}: {error['msg']}"


def _refuse_owned(grid: Grid, *layers: Tables) -> None:
    """Refuse an option that the grid sets itself."""
    owned = {**OWNED, "model.path": "use grid.models"} if grid.models else OWNED
    given = {f"{section}.{key}" for layer in layers for section, table in layer.items() for key in table}
    for name in sorted(given & set(owned)):
        raise UserError(f"{name} is set by the grid; {owned[name]}")


def _check_distinct(kinds: Sequence[tuple[str, Config]], seeds: Sequence[int]) -> None:
    """Refuse two cells that would share a folder or be the same run."""
    for number, (name, config) in enumerate(kinds):
        for other, config_before in kinds[:number]:
            if name == other:
                raise UserError(f"two cells are called {name}; give each variant and each model's folder its own name")
            if config == config_before:
                raise UserError(f"{other} and {name} are the same run; leave one out, or the option that makes them so")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"grid.seeds={list(seeds)} names a seed twice; name each once")
