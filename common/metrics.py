"""Writers of a run's metrics (JSON lines and TensorBoard), and readers of JSON lines."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class JsonLines:
    """A file with one JSON object per line, flushed after each."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; [] if it does not exist. A last line cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # the last one is empty, or cut off


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON-lines file, atomically, with the records that `keep` accepts."""
    if path.exists():
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in read_lines(path) if keep(r)))
        temporary.replace(path)


class MetricsWriter:
    """metrics.jsonl and the TensorBoard files of one run."""

    def __init__(self, folder: Path) -> None:
        self.lines = JsonLines(folder / "metrics.jsonl")
        self.board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of one step. A value that is not finite is written as null: JSON has no NaN."""
        self.lines.write({"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()})
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()

    def close(self) -> None:
        self.lines.close()
        self.board.close()


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN without values."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan
