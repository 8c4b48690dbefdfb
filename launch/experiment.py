"""The experiment: a grid of runs as Ray tasks, on whatever the cluster has.

python launch/experiment.py --config launch/configs/grids/main_comparison.toml --scale cpu --cores 1 [OPTIONS]

OPTIONS are those of launch/run.py and hold for every cell; --dry-run checks all cells and starts none. The same command
again continues: finished cells stay as they are, one that died goes on from its last checkpoint, one without a
checkpoint starts again in an emptied folder. Grids in the same --dir share the cells that they have in common. The
format of a grid: launch/experiments/grid.py; what a cell takes and where it runs: launch/experiments/cell.py.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the checkout, not from launch/, whose names shadow packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ray

from common.config import dump
from common.metrics import mean, read_lines
from common.types import UserError
from launch.experiments import cell as cell_process
from launch.experiments import grid
from launch.experiments.grid import Cell
from launch.planning import plan
from launch.runtime import cluster, recorder
from launch.runtime.console import Board, Progress
from learner import checkpoint

RECENT = 5  # steps whose mean reward is shown
LOOK_SECONDS = 2.0  # between two looks at the cells


def unfinished(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that are still to be run, as they are to be run: with run.resume where there is a checkpoint.

    Raises UserError for whatever is wrong with any cell, finished ones included: their options must be the grid's.
    """
    for cell in {cell.kind: cell for cell in cells}.values():
        plan.make(cell.config, saved=cell.config.run.dir)  # all but the run folder, which differs by seed
    todo = []
    for cell in cells:
        folder = cell.config.run.dir
        reached = checkpoint.latest(folder / "checkpoints")
        config = cell.config.model_copy(
            update={"run": cell.config.run.model_copy(update={"resume": reached is not None})}
        )
        if reached is not None or not _died_early(folder):
            plan.run_folder(config)
        if reached is None or reached.name != checkpoint.name(config.run.steps):
            todo.append(Cell(name=cell.name, kind=cell.kind, config=config))
    return todo


def _died_early(folder: Path) -> bool:
    """Whether a run began in the folder and left no checkpoint. Anything else in it is not ours to delete."""
    return (folder / "config.toml").is_file() and checkpoint.latest(folder / "checkpoints") is None


def run(cells: Sequence[Cell], todo: Sequence[Cell], board: Board, cores: int | None) -> dict[str, str]:
    """Run the cells of `todo` on the cluster, `cores` each; returns the reason of each that failed, by name."""
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
        with _cancelled_in_the_end(tasks):
            while tasks:
                ended, _ = ray.wait(list(tasks), timeout=LOOK_SECONDS)
                looked_at = list(tasks.values())
                for reference in ended:
                    cell = tasks.pop(reference)
                    states[cell.name] = "finished"
                    if reason := _reason_of(reference):
                        states[cell.name], failed[cell.name] = "failed", reason
                        board.note(f"{cell.name} failed: {reason}; its log is {_log(cell)}")
                for cell in looked_at:
                    if states[cell.name] == "waiting" and _size(_log(cell)) > log_sizes[cell.name]:
                        states[cell.name] = "running"
                    shown[cell.name] = progress(cell, states[cell.name])
                done = sum(p.step for p in shown.values()) - first
                left = sum(p.steps - p.step for p in shown.values() if p.state in ("running", "waiting"))
                board.show(list(shown.values()), (time.monotonic() - started) / done * left if done > 0 else None)
    return failed


def _clear(cell: Cell) -> None:
    """Remove what a run did after its last checkpoint: it starts again from there, or from nothing."""
    folder = cell.config.run.dir
    if _died_early(folder):
        shutil.rmtree(folder)
    elif reached := checkpoint.latest(folder / "checkpoints"):
        recorder.rewind(folder, checkpoint.step_of(reached))


def progress(cell: Cell, state: str) -> Progress:
    """How far a cell is, from its run folder."""
    lines = read_lines(cell.config.run.dir / "metrics.jsonl")
    step, steps = (lines[-1]["step"] if lines else 0), cell.config.run.steps
    recent = [line["reward/mean"] for line in lines[-RECENT:] if line.get("reward/mean") is not None]
    per_step = mean(line["time/step_seconds"] for line in lines)
    return Progress(
        name=cell.name,
        state=state,
        step=step,
        steps=steps,
        reward=mean(recent) if recent else None,
        left_seconds=per_step * (steps - step) if lines and state == "running" else None,
    )


@contextlib.contextmanager
def _cancelled_in_the_end(tasks: Mapping[Any, Cell]) -> Iterator[None]:
    """End the tasks that are left when the block ends, however it does."""
    try:
        yield
    finally:
        if tasks:
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(name, signal.SIG_IGN)  # what follows is bounded in time: no second Ctrl-C is needed
            for reference in reversed(list(tasks)):  # those that wait first, lest one begins as another ends
                ray.cancel(reference)
            ray.wait(list(tasks), num_returns=len(tasks), timeout=cell_process.STOP_SECONDS + 5)


def _reason_of(reference: Any) -> str | None:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"Ray: {lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]}"  # a traceback ends with why


def _log(cell: Cell) -> Path:
    """Beside the run folder, which must be empty when its run starts."""
    return cell.config.run.dir.with_name(cell.name + ".log")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Refuse a second driver on the folder; the kernel gives the lock back when this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--dir {folder} is in use by another experiment; wait for it or name another") from None
        yield


def describe(cells: Sequence[Cell], todo: Sequence[Cell]) -> str:
    """What --dry-run prints: what would happen to each cell, and the warnings of its kind."""
    plans = {cell.name: "continue" if cell.config.run.resume else "start" for cell in todo}
    lines = [f"{cell.name}: {plans.get(cell.name, 'finished')}" for cell in cells]
    for cell in {cell.kind: cell for cell in cells}.values():
        lines += [f"# {cell.kind}: warning: {warning}" for warning in plan.warnings(cell.config)]
    return "\n".join([*lines, f"# {len(cells)} cells of {cells[0].config.run.steps} steps, {len(todo)} to run"])


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and those of launch/run.py."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --config GRID.toml [--scale NAME] [--dir runs/NAME] [--cores N] [--dry-run] [OPTIONS]",
        prog="launch/experiment.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", type=Path, help="the grid, such as launch/configs/grids/main_comparison.toml")
    parser.add_argument("--scale", help="a table [scale.NAME] of the grid, such as cpu")
    parser.add_argument("--dir", type=Path, help="folder of the cells (runs/GRID or runs/GRID-SCALE)")
    parser.add_argument("--cores", type=int, help="processors of a cell where there is no GPU (all of a machine)")
    parser.add_argument("--dry-run", action="store_true", help="check all cells, start none")
    try:
        arguments, options = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see --help") from None
    if arguments.cores is not None and arguments.cores < 1:
        raise UserError(f"--cores {arguments.cores} is no number of processors; give 1 or more")
    if arguments.config is None:
        raise UserError("--config is missing; name a grid, such as launch/configs/grids/main_comparison.toml")
    arguments.dir = arguments.dir or Path("runs", "-".join(filter(None, [arguments.config.stem, arguments.scale])))
    return arguments, options


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 all cells are finished, 1 some failed, 2 bad input; 130 interrupted, by whatever signal."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # Ray makes status 1 of any other exception in its wait
    try:
        arguments, options = _arguments(argv)
        folder = arguments.dir
        cells = grid.cells(arguments.config, folder, scale=arguments.scale, options=options)
        if arguments.dry_run:
            print(describe(cells, unfinished(cells)))
            return 0
        with _alone_in(folder):
            todo = unfinished(cells)
            board = Board(f"{arguments.config.stem} in {folder}")
            try:
                failed = run(cells, todo, board, arguments.cores) if todo else {}
            finally:
                board.close()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    for name, reason in failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    print(f"{len(cells) - len(failed)} of {len(cells)} cells are finished; python launch/report.py {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
