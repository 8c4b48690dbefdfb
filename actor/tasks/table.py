"""Data sets of any size: a memory-mapped table of rows, and prompts that are built only when they are read.

`datasets` reads a file once, writes it as Arrow into its own cache (HF_DATASETS_CACHE) and maps that into memory. Only
its readers of JSON, CSV and Parquet are used: a data set cannot bring code. Columns of images, sound and the like are
left out, since to read them opens whatever file or address a row names.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from actor.tasks.broken_rows import first_broken
from common.config import TaskConfig
from common.types import Prompt, UserError

if TYPE_CHECKING:  # slow to import: a process that scores completions needs none of it
    import datasets

Row = dict[str, Any]
Read = Callable[[Row, str], Prompt]
Split = Literal["train", "eval"]

READERS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
HUB_READERS = {*READERS.values(), "cache"}  # cache: the copy of a hub data set that was loaded before
BATCH_ROWS = 1000  # read at a time when all problems are read


def open_table(task: TaskConfig, split: Split) -> "datasets.Dataset":
    """All rows of task.data that `split` is drawn from, in their own order, mapped into memory.

    task.data is a file (.jsonl, .parquet, .csv), a folder with files whose names begin with task.train_split or
    task.eval_split, or a hub name. Raises UserError for data that cannot be read, or that has no rows.
    """
    if not task.data:
        raise UserError("task.data is not set; name a file (.jsonl, .parquet, .csv), a folder or a hub data set")
    _quiet_unless_watched()
    files = _files(Path(task.data), task, split)
    table = _local(files) if files else _hub(task, _split_name(task, split))
    if not len(table):
        raise UserError(f"{place(task, split)} is empty; task.data needs a row for each problem")
    opened = [name for name, feature in table.features.items() if _is_opened(feature)]
    return table.remove_columns(opened) if opened else table  # to remove none would change its fingerprint


def place(task: TaskConfig, split: Split) -> str:
    """What messages call the table of a split."""
    path = Path(task.data or "")
    if path.is_dir():
        files = _files_of(path, task, split)
        return str(files[0]) if len(files) == 1 else f"{path}[{_split_name(task, split)}]"
    return str(path) if path.exists() else f"{task.data}[{_split_name(task, split)}]"


def problems(task: TaskConfig, split: Split, read: Read) -> "Problems":
    """`task.num_train` (`task.num_eval`) problems drawn by `task.seed` without replacement; `read` makes their prompts.

    A larger number extends a smaller draw. Train and eval are drawn independently; if both have the same rows, eval is
    drawn from the end of the order that train begins, so that no row is in both. Raises UserError for too few rows.
    """
    table, where = open_table(task, split), place(task, split)
    wanted = task.num_train if split == "train" else task.num_eval
    order = list(range(len(table)))
    random.Random(task.seed).shuffle(order)
    if _one_table(task):
        if task.num_train + task.num_eval > len(order):
            raise UserError(
                f"task.num_train={task.num_train} and task.num_eval={task.num_eval} together exceed the {len(order)} "
                f"rows of {where}; lower one of the two"
            )
        order = order if split == "train" else order[::-1]
    elif wanted > len(order):
        raise UserError(f"task.num_{split}={wanted} exceeds the {len(order)} rows of {where}; lower it")
    return Problems(table, read, np.array(order[:wanted], dtype=np.int64), where)


class Problems(Sequence[Prompt]):
    """The prompts of some rows of a table. Each is built when it is read, so that they take no memory."""

    def __init__(self, table: "datasets.Dataset", read: Read, rows: np.ndarray, place: str) -> None:
        """`rows`, int64, are the table's rows in the order of the problems; `place` is where the table comes from.

        `read` makes the prompt of a row. It is also given the row's name, "train.jsonl row 7", for a UserError.
        """
        self.table = table
        self.read = read
        self.rows = rows
        self.place = place

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> "Problems": ...
    def __getitem__(self, index: int | slice) -> "Prompt | Problems":
        if isinstance(index, slice):
            return self.at(np.arange(len(self))[index])
        position = range(len(self))[index]  # IndexError past the end; negative from the end
        return self._prompt(self._row(position), position)

    def __iter__(self) -> Iterator[Prompt]:
        for first in range(0, len(self), BATCH_ROWS):
            positions = range(first, min(first + BATCH_ROWS, len(self)))
            try:
                columns = self.table[self.rows[first : first + BATCH_ROWS]]
                rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            except UnicodeDecodeError:
                rows = [self._row(position) for position in positions]  # to name the one
            yield from map(self._prompt, rows, positions)

    def at(self, positions: np.ndarray) -> "Problems":
        """The problems at these positions alone, in this order."""
        return Problems(self.table, self.read, self.rows[positions], self.place)

    def where(self, position: int) -> str:
        """The row of the problem at `position`, for a message; rows are counted from 1, without empty lines."""
        return f"{self.place} row {self.rows[position] + 1}"

    @property
    def fingerprint(self) -> str:
        """Of the whole table: another one if the data changed, the same in every process."""
        fingerprint: str = self.table._fingerprint
        return fingerprint

    def _row(self, position: int) -> Row:
        try:
            row: Row = self.table[int(self.rows[position])]
        except UnicodeDecodeError:
            raise UserError(f"{self.where(position)} is not UTF-8; correct or remove it") from None
        return row

    def _prompt(self, row: Row, position: int) -> Prompt:
        return replace(self.read(row, self.where(position)), index=position)


def _one_table(task: TaskConfig) -> bool:
    """Whether train and eval are drawn from the same rows."""
    return task.train_split == task.eval_split or Path(task.data or "").is_file()


def _split_name(task: TaskConfig, split: Split) -> str:
    return task.train_split if split == "train" else task.eval_split


def _files(path: Path, task: TaskConfig, split: Split) -> list[Path]:
    """The files that task.data names; none for a hub name."""
    try:
        if path.is_dir():
            return _files_of(path, task, split)
        return [path] if path.exists() or path.suffix in READERS else []
    except OSError as error:
        raise UserError(f"task.data={path} cannot be read ({error.strerror}); name a file or folder that can") from None


def _files_of(folder: Path, task: TaskConfig, split: Split) -> list[Path]:
    """The files of a split: train.jsonl, or train-00000-of-00002.parquet and so on, as the hub names them."""
    name = _split_name(task, split)
    for below in (folder, folder / "data", *([folder / task.configuration] if task.configuration else [])):
        found = sorted(path for path in (below.iterdir() if below.is_dir() else ()) if path.suffix in READERS)
        files = [path for path in found if path.stem == name or path.stem.startswith(f"{name}-")]
        if len({path.suffix for path in files}) > 1:
            raise UserError(f"{below} has {name} in several formats, {files[0].name} and {files[-1].name}; remove one")
        if files:
            return files
    raise UserError(
        f"task.data={folder} has no {name}.jsonl, .parquet or .csv; set task.{split}_split to the name of what it has"
    )


def _local(files: list[Path]) -> "datasets.Dataset":
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList

    for path in files:
        if path.exists() and not path.is_file():  # a pipe has no end
            raise UserError(f"{path} is not a file; task.data needs files of {', '.join(READERS)}")
        if path.suffix not in READERS:
            raise UserError(f"task.data={path} is none of {', '.join(READERS)}; name a file that is, or convert it")
        try:
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); task.data needs files that can") from None
    stamps = [(str(path.stat().st_mtime_ns), str(path.stat().st_size)) for path in files]
    # A list made here is taken as it is: a name with * or [ would otherwise be a pattern, one with :// an address.
    listed = DataFilesDict({"train": DataFilesList([str(path.resolve()) for path in files], stamps)})
    reader = READERS[files[0].suffix]
    options = {"json": {"parse_agent_traces": False}, "csv": {"keep_default_na": False}}.get(reader, {})
    try:
        table: datasets.Dataset = datasets.load_dataset(reader, data_files=listed, split="train", **options)
    except Exception as error:  # noqa: BLE001 (each reader raises types of its own, and so does a cache that is full)
        for path in files:
            if broken := first_broken(path):
                raise UserError(broken) from None
        raise UserError(f"{files[0]} cannot be read ({_reason(error)}); correct it, or name other data") from None
    return table


def _hub(task: TaskConfig, split_name: str) -> "datasets.Dataset":
    import datasets

    try:
        builder = datasets.load_dataset_builder(task.data, task.configuration)
        reader = type(builder).__module__.rpartition(".")[2]
        if reader in HUB_READERS:
            builder.download_and_prepare()
            table: datasets.Dataset = builder.as_dataset(split=split_name)
            return table
    except Exception as error:  # noqa: BLE001 (the hub's client and transports raise many unrelated types)
        raise UserError(
            f"task.data={task.data} is neither a file nor a directory and could not be loaded from the hub "
            f"({_reason(error)}); name a file (.jsonl, .parquet, .csv), a folder, or a hub data set and, where it has "
            "several, task.configuration"
        ) from None
    raise UserError(f"task.data={task.data} is read by {reader}; only data of {', '.join(READERS)} is read")


def _is_opened(feature: Any) -> bool:
    """Whether to read a column of this type opens what its rows name, a file or an address, as an image's does."""
    import datasets

    if isinstance(feature, dict):
        return any(map(_is_opened, feature.values()))
    if isinstance(feature, list):
        return any(map(_is_opened, feature))
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _is_opened(feature.feature)
    return hasattr(feature, "decode_example") and not isinstance(feature, datasets.Json)


def _reason(error: BaseException) -> str:
    """The first line of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _quiet_unless_watched() -> None:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the traceback of a file that it cannot read
    if sys.stderr.isatty():
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()
