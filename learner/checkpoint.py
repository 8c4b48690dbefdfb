"""Checkpoints: folders that appear only when they are complete, and the learner's state beside its adapter."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from common.types import UserError

TENSORS, NUMBERS = "learner_state.safetensors", "learner_state.json"
PICKLE = "learner_state.pt"


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `folder` once everything in it is on the disk.

    A crash before that leaves only the temporary folder, which the next call removes.
    """
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in [*(p for p in temporary.rglob("*") if p.is_file()), temporary]:
        _flush(path)
    temporary.rename(folder)
    _flush(folder.parent)


def latest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder` (step-000030, ...), or None."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps that a checkpoint's folder name states."""
    return int(checkpoint.name.removeprefix("step-"))


def name(step: int) -> str:
    """The folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:06d}"


def save_state(folder: Path, learner: Mapping[str, Any]) -> None:
    """Write the learner's state into `folder`: `learner["optimizer"]` holds tensors by name, all else is plain JSON.

    No random state is part of it: dropout is seeded by the step, the probe by itself.
    """
    save_file(dict(learner["optimizer"]), folder / TENSORS)
    numbers = {name: value for name, value in learner.items() if name != "optimizer"}
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def load_state(folder: Path) -> dict[str, Any]:
    """The learner's state as it was saved. Runs no code that the files may hold. Raises UserError as `check` does."""
    check(folder)
    return {**json.loads((folder / NUMBERS).read_text(encoding="utf-8")), "optimizer": load_file(folder / TENSORS)}


def check(folder: Path) -> None:
    """Raise UserError for a checkpoint whose state is a pickle: reading one can run code that it holds."""
    if (folder / PICKLE).exists():
        raise UserError(
            f"{folder} holds {PICKLE}, a pickle, which can run code when it is read; start the run again in another "
            "folder"
        )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
