"""Writers of a run's metrics (JSON lines and TensorBoard), and readers of JSON lines."""

import io
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from common.files import Appended, Warn, write_whole
from common.types import UserError


class JsonLines:
    """A file with one JSON object per line. With `warn`, a failed write is no more than a line for it."""

    def __init__(self, path: Path, warn: Warn | None = None) -> None:
        self.file = Appended(path, warn)

    def write(self, *records: Mapping[str, Any]) -> None:
        """Append a line for each record, all or none of them. Raises NotWritten, unless it is to warn."""
        self.file.append(_lines(records).encode(errors="replace"))

    def close(self) -> None:
        self.file.close()


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


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
        write_whole(path, _lines(record for record in read_lines(path) if keep(record)))


class MetricsWriter:
    """metrics.jsonl and the TensorBoard file of one run; `warn` gets a line where the latter cannot be written."""

    def __init__(self, folder: Path, warn: Warn) -> None:
        path = folder / "metrics.jsonl"
        next_step = max((record["step"] for record in read_lines(path)), default=0) + 1
        self.lines = JsonLines(path)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self.board = Appended(folder / "tensorboard" / name, warn)
        # TensorBoard then forgets the steps that a resumed run makes again.
        session = _event(step=next_step, session_log=SessionLog(status=SessionLog.START))
        self.start = _event(file_version="brain.Event:2") + session  # of the file, written with the first step

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of one step. A value that is not finite is written as null: JSON has no NaN. Raises NotWritten."""
        self.lines.write({"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()})
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        if self.board.append(self.start + _event(step=step, summary=Summary(value=values))):
            self.start = b""

    def close(self) -> None:
        self.lines.close()
        self.board.close()


def _event(**fields: Any) -> bytes:
    """One record of TensorBoard's format."""
    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return record.getvalue()


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN without values."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan
