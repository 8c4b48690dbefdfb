"""Checkpoints: folders that are whole or not there, and the state of a learner beside its adapter."""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

STATE = "learner_state.pt"


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


def save_state(folder: Path, learner: dict[str, Any]) -> None:
    """The learner's own state and every random state of this process into `folder`."""
    state = {"learner": learner, "torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = np.random.get_state(legacy=False)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    torch.save(state, folder / STATE)


def load_state(folder: Path) -> dict[str, Any]:
    """Set this process's random states as `save_state` saw them; returns the learner's own."""
    state = torch.load(folder / STATE, map_location="cpu", weights_only=False)  # our own file: it holds numpy state
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    return state["learner"]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
