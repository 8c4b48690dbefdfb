"""The best checkpoint, the number of those that are kept, and the early stop.

All follow from evaluations.jsonl and the checkpoints' names, so that a resumed run goes on with the same.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import Config
from common.files import NotWritten
from common.metrics import read_lines
from learner import checkpoint

Record = Mapping[str, Any]  # a line of evaluations.jsonl


def is_best(config: Config, step: int) -> bool:
    """Whether the evaluation at `step` is the best so far, so that its checkpoint is to be kept."""
    return config.evaluation.best is not None and best_step(_evaluations(config), config.evaluation.best) == step


def tidy(config: Config, saved: Path) -> None:
    """After the checkpoint `saved` was written: keep the best one, and delete those that are too many.

    The best is copied first, also one that a crash has kept from being copied. Raises NotWritten.
    """
    if config.evaluation.best is not None:
        step = best_step(_evaluations(config), config.evaluation.best)
        if step is not None:
            checkpoint.keep_best(saved.with_name(checkpoint.name(step)))
    if config.run.keep_checkpoints is not None:
        try:
            checkpoint.delete_old(saved, config.run.keep_checkpoints)
        except OSError as error:
            raise NotWritten(saved.parent, error) from None


def stopped(config: Config, step: int) -> str | None:
    """Why a run ends after `step` without its later steps, in a line; None if it goes on."""
    metric, patience = config.evaluation.best, config.run.patience
    if metric is None or patience is None:
        return None
    records = [record for record in _evaluations(config) if record["step"] <= step]
    best = best_step(records, metric)
    num_since = sum(record["step"] > (best or 0) for record in records)
    if num_since < patience:
        return None
    reached = "none has one" if best is None else f"{_values(records, metric)[best]:.3f} at step {best} is the best"
    since = f"{num_since} evaluation{'s' if num_since > 1 else ''} without a better {metric}"
    return f"stopped after step {step}: {since}, {reached} (run.patience={patience})"


def best_step(records: Sequence[Record], metric: str) -> int | None:
    """The step of the highest value, the first one of equal ones; None without any.

    Step 0 does not count: it is the model before training, which has no checkpoint.
    """
    values = _values(records, metric)
    return max(values, key=lambda step: (values[step], -step), default=None)


def _values(records: Sequence[Record], metric: str) -> dict[int, float]:
    """The metric, such as math500/pass_at_1, by step; without those that are no numbers."""
    name, _, number = metric.rpartition("/")
    found = {}
    for record in records:
        value: Any = record
        for key in (*(("sets", name) if name else ()), number):
            value = value.get(key) if isinstance(value, Mapping) else None
        if record["step"] > 0 and isinstance(value, float) and math.isfinite(value):
            found[record["step"]] = value
    return found


def _evaluations(config: Config) -> list[dict[str, Any]]:
    return read_lines(config.run.dir / "evaluations.jsonl")
