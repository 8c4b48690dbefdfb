"""A sample of the groups in rollouts.jsonl, however large it is, for inspection."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.reporting.data.runs import Run, is_step, number

MAX_BYTES = 3_000_000  # of records in one report, over all runs: a browser opens that without delay
HEAD = re.compile(
    rb'\{"step": (\d{1,15}), "prompt_index": (\d{1,15}), '
)  # the beginning of a line that the recorder wrote


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The chosen rollouts of one run, whole groups only, in order of steps; and how many were recorded."""

    groups: tuple[tuple[dict[str, Any], ...], ...]
    num_recorded: int

    @property
    def num_shown(self) -> int:
        return sum(map(len, self.groups))


def _head(line: bytes) -> tuple[int, int] | None:
    """Step and prompt of a line, if possible without parsing the rest of it; None for a foreign line."""
    if not line.endswith(b"}\n"):
        return None
    if found := HEAD.match(line):
        return int(found[1]), int(found[2])
    try:
        record = json.loads(line)
        step, prompt = record["step"], record.get("prompt_index", 0)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    return (step, prompt) if is_step(step) and is_step(prompt) else None


def _positions(path: Path) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(step, prompt) -> (offset, length) of its lines, in bytes."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    if path.is_file():
        offset = 0
        with path.open("rb") as file:
            for line in file:
                if head := _head(line):
                    found.setdefault(head, []).append((offset, len(line)))
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
        if size > max_bytes and chosen:
            continue  # a smaller one may still fit
        max_bytes -= size
        chosen.append(key)
    groups = _read(path, [positions[key] for key in sorted(chosen)])
    return Samples(groups=groups, num_recorded=sum(map(len, positions.values())))


def _read(path: Path, groups: Sequence[Sequence[tuple[int, int]]]) -> tuple[tuple[dict[str, Any], ...], ...]:
    """The records at the given positions; foreign ones are skipped."""
    made = []
    for positions in groups:
        records = []
        with path.open("rb") as file:
            for offset, length in positions:
                file.seek(offset)
                try:
                    record = json.loads(file.read(length).decode("utf-8", errors="replace"))
                except (ValueError, RecursionError):
                    continue
                if _is_rollout(record):
                    records.append(_tidy(record))
        made.append(tuple(records))
    return tuple(filter(None, made))


def _is_rollout(record: Any) -> bool:
    """Whether its fields have the types of a rollout's record."""
    lists = ("tokens", "entropies", "weights")
    return (
        isinstance(record, dict)
        and is_step(record.get("step"))
        and all(isinstance(record.get(key), list | None) for key in lists)
        and isinstance(record.get("parts"), dict | None)
        and isinstance(record.get("correct"), bool | None)
        and all(isinstance(record.get(key), str | None) for key in ("finish_reason", "reward_error"))
    )


def _tidy(record: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a rollout; a number that is missing or not finite becomes null."""
    per_token = {key: [_rounded(x) for x in record.get(key) or ()] for key in ("entropies", "weights")}
    return {
        "step": record.get("step"),
        "prompt": str(record.get("prompt", "")),
        "answer": str(record.get("answer", "")),
        "text": str(record.get("text", "")),
        "tokens": [str(token) for token in record.get("tokens") or ()],
        "finish": record.get("finish_reason"),
        "error": record.get("reward_error"),
        "reward": _rounded(record.get("reward")),
        "correct": record.get("correct"),
        "parts": {str(name): _rounded(value) for name, value in (record.get("parts") or {}).items()},
        "advantage": _rounded(record.get("advantage")),
        **per_token,
    }


def _rounded(value: Any) -> float | None:
    found = number(value)
    return None if found != found else round(found, 3)


def all_samples(runs: Sequence[Run], max_bytes: int = MAX_BYTES) -> list[Samples]:
    """Samples of every run; each run gets the same share of the bytes."""
    return [choose(run.folder / "rollouts.jsonl", max_bytes // max(len(runs), 1)) for run in runs]
