"""Runs the cells of a grid as Ray tasks, and reads their progress from their run folders."""

import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from common.config import dump
from common.files import check_own
from common.metrics import mean, read_lines
from common.types import UserError
from launch.evaluation import best
from launch.experiments import cell as cell_process
from launch.experiments.board import Board, Progress
from launch.experiments.grid import Cell
from launch.planning import plan
from launch.recording import recorder
from launch.runtime import cluster
from learner import checkpoint

RECENT = 5  # steps in the mean reward that is shown
POLL_SECONDS = 2.0


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuse a second driver on the folder until the block or this process ends, and a folder that has links."""
    folder.mkdir(parents=True, exist_ok=True)
    check_own(folder)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--dir {folder} is in use by another experiment; wait for it or name another") from None
        yield


def unfinished(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that have not reached their last step, nor run.patience, with run.resume set if they have a checkpoint.

    Raises UserError for any invalid cell, also for a finished one whose options differ from the grid's.
    """
    for cell in {cell.kind: cell for cell in cells}.values():
        plan.make(cell.config, trains=False)  # checks all except the run folder, which differs by seed
    todo = []
    for cell in cells:
        folder = cell.config.run.dir
        reached = checkpoint.latest(folder / "checkpoints")
        section = cell.config.run.model_copy(update={"resume": reached is not None})
        config = cell.config.model_copy(update={"run": section})
        if reached is not None or not _died_early(folder):
            plan.run_folder(config)
        step = 0 if reached is None else checkpoint.step_of(reached)
        if step != config.run.steps and not best.stopped(config, step):
            todo.append(replace(cell, config=config))
    return todo


def _died_early(folder: Path) -> bool:
    """Whether the folder is that of a run without a checkpoint; no other folder is ever deleted.

    Raises UserError for one whose checkpoints are all damaged.
    """
    return (folder / "config.toml").is_file() and checkpoint.latest(folder / "checkpoints") is None


def _clear(cell: Cell) -> None:
    """Remove what an interrupted run wrote after its last checkpoint, or its whole folder if it has none."""
    folder = cell.config.run.dir
    if _died_early(folder):
        shutil.rmtree(folder)
    elif reached := checkpoint.latest(folder / "checkpoints"):
        recorder.rewind(folder, checkpoint.step_of(reached))


def run(cells: Sequence[Cell], todo: Sequence[Cell], board: Board, cores: int | None) -> dict[str, str]:
    """Run the cells of `todo` on the cluster, `cores` each; returns the reasons of the failed cells by name."""
    states = {cell.name: "finished" for cell in cells} | {cell.name: "waiting" for cell in todo}
    log_sizes = {cell.name: _size(_log(cell)) for cell in todo}
    failed: dict[str, str] = {}
    environment = {k: v for k, v in os.environ.items() if k != "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    with cluster.connect():
        share = cell_process.share(ray.nodes(), cores)
        for cell in todo:
            _clear(cell)
        shown = {cell.name: progress(cell, states[cell.name]) for cell in cells}
        first, started = sum(p.step for p in shown.values()), time.monotonic()
        task = ray.remote(cell_process.run).options(max_retries=0, **share)
        tasks = {}
        for cell in todo:
            tasks[task.remote(dump(cell.config), _log(cell).resolve(), Path.cwd(), environment, cores)] = cell
        with _cancelled_at_exit(tasks):
            while tasks:
                ended, _ = ray.wait(list(tasks), timeout=POLL_SECONDS)
                unsettled = list(tasks.values())
                for reference in ended:
                    cell = tasks.pop(reference)
                    states[cell.name] = "finished"
                    if reason := _reason_of(reference):
                        states[cell.name], failed[cell.name] = "failed", reason
                        board.note(f"{cell.name} failed: {reason}; its log is {_log(cell)}")
                for cell in unsettled:
                    if states[cell.name] == "waiting" and _size(_log(cell)) > log_sizes[cell.name]:
                        states[cell.name] = "running"
                    shown[cell.name] = progress(cell, states[cell.name])
                done = sum(p.step for p in shown.values()) - first
                left = sum(p.steps - p.step for p in shown.values() if p.state in ("running", "waiting"))
                board.show(list(shown.values()), (time.monotonic() - started) / done * left if done > 0 else None)
    return failed


@contextlib.contextmanager
def _cancelled_at_exit(tasks: Mapping[Any, Cell]) -> Iterator[None]:
    """Cancel the remaining tasks when the block ends, also by an exception."""
    try:
        yield
    finally:
        if tasks:
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(name, signal.SIG_IGN)  # the rest takes a bounded time: a second Ctrl-C is not needed
            for reference in reversed(list(tasks)):  # waiting tasks first: none must start when another one ends
                ray.cancel(reference)
            ray.wait(list(tasks), num_returns=len(tasks), timeout=cell_process.STOP_SECONDS + 5)


def _reason_of(reference: Any) -> str | None:
    """Why the cell of an ended task failed, or None."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        is_traceback = isinstance(error, ray.exceptions.RayTaskError)  # a traceback ends with the reason
        return f"Ray: {lines[-1 if is_traceback else 0]}"


def progress(cell: Cell, state: str) -> Progress:
    """The progress of a cell, read from its run folder."""
    lines = read_lines(cell.config.run.dir / "metrics.jsonl")
    step, steps = (lines[-1]["step"] if lines else 0), cell.config.run.steps
    recent = _numbers(lines[-RECENT:], "reward/mean")
    per_step = mean(_numbers(lines, "time/step_seconds"))
    return Progress(
        name=cell.name,
        state=state,
        step=step,
        steps=steps,
        reward=mean(recent) if recent else None,
        left_seconds=per_step * (steps - step) if per_step >= 0 and state == "running" else None,
    )


def _numbers(lines: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """A metric at the steps that have a number for it."""
    return [float(line[metric]) for line in lines if isinstance(line.get(metric), int | float)]


def _log(cell: Cell) -> Path:
    """The log is beside the run folder, which must be empty when its run starts."""
    return cell.config.run.dir.with_name(cell.name + ".log")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
