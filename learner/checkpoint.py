"""Checkpoints: folders that appear only when they are complete, with a checksum of each file; only data is in them."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.files import NotWritten, remove
from common.metrics import is_count
from common.types import UserError

TENSORS, NUMBERS = "learner_state.safetensors", "learner_state.json"
CHECKSUMS = "checksums.json"  # name of each other file -> SHA-256 of its bytes
DATA = (".safetensors", ".json", ".md")  # files that cannot run code when they are read; PEFT writes a README.md
BEST = "best"  # the folder of the best checkpoint, beside those that are named by their steps
DELETED = ".deleted"  # the end of the name of a folder that is being deleted
MAX_JSON_BYTES = 2**20


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; once its files and their checksums are on the disk, rename it to `folder`.

    A crash before that leaves only the temporary folder, which the next call removes. A damaged checkpoint in the
    place is replaced. Raises NotWritten if a file cannot be written, here or in the block, and leaves nothing then.
    """
    temporary = folder.with_name(folder.name + ".partial")
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        sums = {path.name: _checksum(path) for path in sorted(temporary.iterdir())}
        (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        remove(folder)
        temporary.rename(folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise NotWritten(folder, error) from None


def latest(folder: Path) -> Path | None:
    """The whole checkpoint of the highest step in `folder` (step-000030, ...); None if there are none.

    Raises UserError, in one line, if there are some and none is whole.
    """
    checkpoints = _newest_first(folder)
    whole = next((checkpoint for checkpoint in checkpoints if damage(checkpoint) is None), None)
    if checkpoints and whole is None:
        raise UserError(f"no checkpoint in {folder} is whole: {passed_over(folder)[0]}; restore one, or start again")
    return whole


def passed_over(folder: Path) -> list[str]:
    """What is wrong with each checkpoint in `folder` that is newer than `latest`, one line each."""
    newer = takewhile(itemgetter(1), ((each, damage(each)) for each in _newest_first(folder)))
    return [f"{each.name} is damaged: {reason}" for each, reason in newer]


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.name == name(step_of(path))]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps that a checkpoint's folder name states; -1 if it is another folder's name."""
    digits = checkpoint.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() and len(digits) < 10 else -1


def name(step: int) -> str:
    """The folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:06d}"


def damage(checkpoint: Path) -> str | None:
    """Why a folder is not a checkpoint as it was written, in a few words; None if it is one."""
    reason = _damage(checkpoint)
    return reason if reason is None or reason.isprintable() else repr(reason)


def _damage(checkpoint: Path) -> str | None:
    try:
        files = {path.name: path for path in checkpoint.iterdir()}
        for found, path in files.items():
            if path.is_symlink() or not path.is_file():
                return f"{found} is not a plain file"
            if path.suffix not in DATA:
                return f"{found} is neither safetensors nor JSON, so that reading it could run code"
        if CHECKSUMS not in files:
            return f"{CHECKSUMS} is missing"
        sums = read_object(files.pop(CHECKSUMS))
        if lacking := sorted(sums.keys() ^ files.keys()):
            return f"{lacking[0]} is {'missing' if lacking[0] in sums else f'not in {CHECKSUMS}'}"
        for found, path in files.items():
            if _checksum(path) != sums[found]:
                return f"{found} has another checksum than when it was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def check(checkpoint: Path) -> None:
    """Raise UserError, in one line, for a checkpoint that is not whole."""
    if reason := damage(checkpoint):
        raise UserError(f"{checkpoint} is damaged: {reason}; use another checkpoint")


def keep_best(saved: Path) -> None:
    """Copy a checkpoint to `best` beside it, whole or not at all, unless it is there; it is never resumed by itself.

    Does nothing for a checkpoint that is missing or damaged. Raises NotWritten.
    """
    best = saved.with_name(BEST)
    if (_sums(best) != _sums(saved) or damage(best)) and damage(saved) is None:
        with written_whole(best) as whole:
            for path in saved.iterdir():
                if path.name != CHECKSUMS:
                    shutil.copyfile(path, whole / path.name)


def delete_old(newest: Path, keep: int) -> None:
    """Delete the checkpoints before `newest`, which is whole, but for the last of them: `keep` are left together.

    A folder gets a name that is no checkpoint's before it is deleted, and what a crash leaves of one goes with the next
    call. Checkpoints of later steps stay: a run that has resumed before them has found them damaged. Raises OSError.
    """
    for rest in newest.parent.glob("*" + DELETED):
        shutil.rmtree(rest)
    older = [path for path in _newest_first(newest.parent) if step_of(path) < step_of(newest)]
    for path in older[keep - 1 :]:
        shutil.rmtree(path.rename(path.with_name(path.name + DELETED)))


def _sums(checkpoint: Path) -> bytes | None:
    """The checksums of a checkpoint's files; None without any."""
    path = checkpoint / CHECKSUMS
    return path.read_bytes() if path.is_file() else None


def save_state(folder: Path, learner: Mapping[str, Any]) -> None:
    """Write the learner's state into `folder`: `learner["optimizer"]` holds tensors by name, all else is plain JSON.

    No random state is part of it: dropout is seeded by the step, the probe by itself.
    """
    save_file(dict(learner["optimizer"]), folder / TENSORS)
    numbers = {name: value for name, value in learner.items() if name != "optimizer"}
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def load_state(folder: Path) -> dict[str, Any]:
    """The learner's state as it was saved; nothing that the files hold is run. Raises UserError for other contents."""
    try:
        numbers = read_object(folder / NUMBERS)
        if not is_count(numbers.get("step")) or not _is_finite(numbers.get("entropy_bonus")):
            raise ValueError(f"{NUMBERS} has other numbers than a learner's")
        return numbers | {"optimizer": load_tensors(folder / TENSORS)}
    except (OSError, ValueError) as error:
        raise UserError(f"the checkpoint cannot be loaded: {error}; use another one") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises ValueError for a file of another kind."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a small JSON file. Raises ValueError for another content."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not an object")
    return value


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
