"""A sample of the groups in rollouts.jsonl, however large it is, for inspection."""

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.types import UserError
from launch.reporting.data.runs import Run

MAX_BYTES = 3_000_000  # of records in one report, over all runs: a browser opens that without delay
LINE = re.compile(
    rb'\{"step": (\d{1,9}), "prompt_index": (\d{1,9}), .*\}\n'
)  # as the recorder writes it; none that is cut off
SHOWN = ("step", "prompt", "answer", "text", "tokens", "correct", "finish_reason", "reward_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The chosen rollouts of one run, whole groups only, in order of steps; and how many were recorded."""

    groups: tuple[tuple[dict[str, Any], ...], ...]
    num_recorded: int


def _positions(path: Path) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(step, prompt) -> (offset, length) of its lines, in bytes. Does not parse them: there may be very many."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    if path.is_file():
        offset = 0
        with path.open("rb") as file:
            for line in file:
                if head := LINE.fullmatch(line):
                    found.setdefault((int(head[1]), int(head[2])), []).append((offset, len(line)))
                offset += len(line)
    return found


def _bisected(items: Sequence[int]) -> list[int]:
    """The items in an order whose every prefix covers their whole range evenly: the ends, then midpoints."""
    queue, order = [(0, len(items) - 1)], [0, len(items) - 1]
    for low, high in queue:
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            queue += [(low, middle), (middle, high)]
    return [items[i] for i in dict.fromkeys(order)] if items else []


def choose(path: Path, max_bytes: int) -> Samples:
    """Groups over the whole range of steps, one per step before a second of any, up to `max_bytes` of records."""
    positions = _positions(path)
    by_step: dict[int, list[tuple[int, int]]] = {}
    for key in positions:
        by_step.setdefault(key[0], []).append(key)
    generator = random.Random(0)  # the same file gives the same samples
    for keys in by_step.values():
        generator.shuffle(keys)
    chosen: list[tuple[int, int]] = []
    rounds = range(max(map(len, by_step.values()), default=0))
    steps = _bisected(sorted(by_step))
    for key in (by_step[step][i] for i in rounds for step in steps if i < len(by_step[step])):
        size = sum(length for _, length in positions[key])
        if size > (max_bytes if chosen else MAX_BYTES):
            continue  # a smaller one may still fit
        max_bytes -= size
        chosen.append(key)
    groups = tuple(_read(path, positions[key]) for key in sorted(chosen))
    return Samples(groups=groups, num_recorded=sum(map(len, positions.values())))


def _read(path: Path, positions: Sequence[tuple[int, int]]) -> tuple[dict[str, Any], ...]:
    """The rollouts of one group. Raises UserError for a line that no run writes."""
    records = []
    with path.open("rb") as file:
        for offset, length in positions:
            file.seek(offset)
            try:
                records.append(_shown(json.loads(file.read(length))))
            except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                raise UserError(
                    f"{path} is damaged (at byte {offset}: {error}); restore it, or leave the run out"
                ) from None
    return tuple(records)


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a rollout; a number that is missing or not finite becomes null.

    Raises TypeError and the like for other contents.
    """
    for key in SHOWN:
        values = record[key] if key == "tokens" else [record.get(key)]
        if not isinstance(values, list) or not all(isinstance(value, str | int | None) for value in values):
            raise TypeError(f"{key} is of another kind")
    return {
        **{key: record.get(key) for key in SHOWN},
        "reward": _rounded(record.get("reward")),
        "advantage": _rounded(record.get("advantage")),
        "parts": {name: _rounded(value) for name, value in record.get("parts", {}).items()},
        "entropies": [_rounded(value) for value in record.get("entropies", ())],
        "weights": [_rounded(value) for value in record.get("weights", ())],
    }


def _rounded(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None


def all_samples(runs: Sequence[Run]) -> list[Samples]:
    """Samples of every run; each run gets the same share of the bytes."""
    return [choose(run.folder / "rollouts.jsonl", MAX_BYTES // len(runs)) for run in runs]
