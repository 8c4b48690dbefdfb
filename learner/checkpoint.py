"""Checkpoints: folders that are whole or not there, and the state of a learner beside its adapter."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from common.types import UserError

TENSORS, NUMBERS = "learner_state.safetensors", "learner_state.json"
PICKLE = "learner_state.pt"  # what older versions wrote
OPTIMIZER, RANDOM_CPU, RANDOM_CUDA = "optimizer.", "random.cpu", "random.cuda"  # names of tensors


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name once everything in it is on the disk.

    A crash on the way leaves only the temporary one, which the next call removes.
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
    """The whole checkpoint of the highest step in `folder` (step-000030, ...), or None."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a checkpoint, by its folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:06d}"


def save_state(folder: Path, learner: Mapping[str, Any]) -> None:
    """The learner's own state and torch's random states into `folder`.

    `learner["optimizer"]` holds tensors by name, all else plain JSON values. Nothing in the learner draws from NumPy's
    or Python's global generators, so theirs are not kept.
    """
    tensors = {OPTIMIZER + name: tensor for name, tensor in learner["optimizer"].items()}
    tensors[RANDOM_CPU] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[RANDOM_CUDA] = torch.cuda.get_rng_state()
    save_file(tensors, folder / TENSORS)
    numbers = {name: value for name, value in learner.items() if name != "optimizer"}
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def load_state(folder: Path) -> dict[str, Any]:
    """Set torch's random states as `save_state` saw them; returns the learner's own state.

    Runs no code that the files may hold. Raises UserError as `check` does.
    """
    check(folder)
    tensors = load_file(folder / TENSORS)
    torch.set_rng_state(tensors[RANDOM_CPU])
    if torch.cuda.is_available() and RANDOM_CUDA in tensors:
        torch.cuda.set_rng_state(tensors[RANDOM_CUDA])
    moments = {n.removeprefix(OPTIMIZER): tensor for n, tensor in tensors.items() if n.startswith(OPTIMIZER)}
    return {**json.loads((folder / NUMBERS).read_text(encoding="utf-8")), "optimizer": moments}


def check(folder: Path) -> None:
    """Raise UserError for a checkpoint of the older format, a pickle: reading it can run code that it holds."""
    if (folder / PICKLE).exists():
        raise UserError(
            f"{folder} holds {PICKLE}, the format of an older version, which is no longer read; start the run again "
            "in another folder"
        )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
