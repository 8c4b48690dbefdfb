"""Writers and readers of JSON lines, such as a run's metrics."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from common.files import Appended, Warn, write_whole
from common.types import UserError


class JsonLines:
    """A file with one JSON object per line. With `warn`, a failed write is no more than a line for it."""

    def __init__(self, path: Path, warn: Warn | None = None) -> None:
        self.file = Appended(path, warn)

    def write(self, *records: Mapping[str, Any]) -> None:
        """Append a line for each record, all or none of them. Raises NotWritten, unless it is to warn."""
        self.file.append(json_lines(records).encode(errors="replace"))

    def close(self) -> None:
        self.file.close()


def json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """A line for each record. A number that is not finite becomes null: JSON has no NaN."""
    return "".join(_json(record) + "\n" for record in records)


def _json(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:  # rare: the search below takes longer than the writing
        return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, each of a step; [] if it does not exist.

    A last line that a crash cut off is left out. Raises UserError for a line that no run writes.
    """
    if not path.is_file():
        return []
    return [_record(path, number, line) for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1)]


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
        if not isinstance(record, dict) or not is_count(record.get("step")):
            raise ValueError("not an object with a step")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged (line {number}: {error}); restore it, or leave the run out") from None
    return record


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value that was read is a whole number from 0 on, of a size that a step may have."""
    return type(value) is int and 0 <= value < 2**31


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON-lines file, atomically, with the records that `keep` accepts. Raises NotWritten, and UserError."""
    if path.exists():
        write_whole(path, json_lines(record for record in read_lines(path) if keep(record)))


class MetricsWriter:
    """metrics.jsonl of one run."""

    def __init__(self, path: Path) -> None:
        self.lines = JsonLines(path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of one step; null for one that is not finite. Raises NotWritten."""
        self.lines.write({"step": step, **metrics})

    def close(self) -> None:
        self.lines.close()


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN without values."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan
