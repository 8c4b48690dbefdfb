"""Some groups of rollouts out of rollouts.jsonl, however large it is: for looking at."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.reporting.data.runs import Run, is_step, number

MAX_BYTES = 3_000_000  # of the records shown in one report, all runs together: what a browser opens at once
HEAD = re.compile(rb'\{"step": (\d{1,15}), "prompt_index": (\d{1,15}), ')  # how the recorder begins a line


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The chosen rollouts of one run, whole groups only, in order of steps; and how many there were."""

    groups: tuple[tuple[dict[str, Any], ...], ...]
    num_recorded: int

    @property
    def num_shown(self) -> int:
        return sum(map(len, self.groups))


def _head(line: bytes) -> tuple[int, int] | None:
    """Step and prompt of a line, without reading the rest of it where that can be avoided; None of a foreign line."""
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


def _places(path: Path) -> dict[tuple[int, int], list[tuple[int, int]]]:
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


def _spread(items: Sequence[int]) -> list[int]:
    """The items so ordered that every beginning of the list is spread over all of them: the ends, then halves."""
    queue, order = [(0, len(items) - 1)], [0, len(items) - 1]
    for low, high in queue:
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            queue += [(low, middle), (middle, high)]
    return [items[i] for i in dict.fromkeys(order)] if items else []


def choose(path: Path, max_bytes: int) -> Samples:
    """Groups spread over all steps, one of each step before a second of any, up to `max_bytes` of records."""
    places = _places(path)
    by_step: dict[int, list[tuple[int, int]]] = {}
    for key in places:
        by_step.setdefault(key[0], []).append(key)
    generator = random.Random(0)  # the same file gives the same samples
    for keys in by_step.values():
        generator.shuffle(keys)
    chosen: list[tuple[int, int]] = []
    rounds = range(max(map(len, by_step.values()), default=0))
    steps = _spread(sorted(by_step))
    for key in (by_step[step][turn] for turn in rounds for step in steps if turn < len(by_step[step])):
        size = sum(length for _, length in places[key])
        if size > max_bytes and chosen:
            continue  # a smaller one may still fit
        max_bytes -= size
        chosen.append(key)
    groups = _read(path, [places[key] for key in sorted(chosen)])
    return Samples(groups=groups, num_recorded=sum(map(len, places.values())))


def _read(path: Path, groups: Sequence[Sequence[tuple[int, int]]]) -> tuple[tuple[dict[str, Any], ...], ...]:
    """The records at the given places; one that no run has written is left out."""
    made = []
    for places in groups:
        records = []
        with path.open("rb") as file:
            for offset, length in places:
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
    """Whether what is there has the types of a rollout's record."""
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
    streams = {key: [_rounded(x) for x in record.get(key) or ()] for key in ("entropies", "weights")}
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
        **streams,
    }


def _rounded(value: Any) -> float | None:
    found = number(value)
    return None if found != found else round(found, 3)


def all_samples(runs: Sequence[Run], max_bytes: int = MAX_BYTES) -> list[Samples]:
    """Samples of every run; they share the room evenly."""
    return [choose(run.folder / "rollouts.jsonl", max_bytes // max(len(runs), 1)) for run in runs]
