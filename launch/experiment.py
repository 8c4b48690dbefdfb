"""Runs a grid of runs as Ray tasks.

python launch/experiment.py --config launch/configs/grids/main_comparison.toml --scale cpu --cores 1 [OPTIONS]

OPTIONS are those of launch/run.py and apply to every cell; --dry-run checks all cells and starts none. The same command
again resumes the grid: finished cells stay as they are, an interrupted one resumes from its last checkpoint, and one
without a checkpoint starts again in an emptied folder. Grids in the same --dir share the cells of equal name. The
format of a grid is in launch/experiments/grid.py; launch/experiments/README.md has the resources that a cell takes.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from launch/, whose names shadow packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from common.types import UserError
from launch.experiments import grid, runner
from launch.experiments.board import Board
from launch.experiments.grid import Cell
from launch.planning import plan


def describe(cells: Sequence[Cell], todo: Sequence[Cell]) -> str:
    """What --dry-run prints: what would happen to each cell, and the warnings of each kind of cell."""
    plans = {cell.name: "resume" if cell.config.run.resume else "start" for cell in todo}
    lines = [f"{cell.name}: {plans.get(cell.name, 'finished')}" for cell in cells]
    for cell in {cell.kind: cell for cell in cells}.values():
        lines += [f"# {cell.kind}: warning: {warning}" for warning in plan.warnings(cell.config)]
    return "\n".join([*lines, f"# {len(cells)} cells of {cells[0].config.run.steps} steps, {len(todo)} to run"])


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and those of launch/run.py."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --config GRID.toml [--scale NAME] [--dir runs/NAME] [--cores N] [--seeds N ...] [--dry-run] "
        "[OPTIONS]",
        prog="launch/experiment.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", type=Path, help="the grid, such as launch/configs/grids/main_comparison.toml")
    parser.add_argument("--scale", help="a table [scale.NAME] of the grid, such as cpu")
    parser.add_argument("--dir", type=Path, help="folder of the cells (default: runs/GRID or runs/GRID-SCALE)")
    parser.add_argument("--cores", type=int, help="processors per cell if there is no GPU (default: all of a machine)")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of the grid's seeds")
    parser.add_argument("--dry-run", action="store_true", help="check all cells, start none")
    try:
        arguments, options = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see --help") from None
    if arguments.cores is not None and arguments.cores < 1:
        raise UserError(f"--cores {arguments.cores} is not a number of processors; give 1 or more")
    if arguments.config is None:
        raise UserError("--config is missing; name a grid, such as launch/configs/grids/main_comparison.toml")
    arguments.dir = arguments.dir or Path("runs", "-".join(filter(None, [arguments.config.stem, arguments.scale])))
    return arguments, options


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 all cells are finished, 1 some failed, 2 bad input, 130 interrupted by any signal."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # any other exception within ray.wait would end in status 1
    try:
        arguments, options = _arguments(argv)
        folder = arguments.dir
        cells = grid.cells(arguments.config, folder, scale=arguments.scale, options=options, seeds=arguments.seeds)
        if arguments.dry_run:
            print(describe(cells, runner.unfinished(cells)))
            return 0
        with runner.alone_in(folder):
            todo = runner.unfinished(cells)
            with contextlib.closing(Board(f"{arguments.config.stem} in {folder}")) as board:
                failed = runner.run(cells, todo, board, arguments.cores) if todo else {}
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes the grid", file=sys.stderr)
        return 130
    for name, reason in failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    print(f"{len(cells) - len(failed)} of {len(cells)} cells are finished; python launch/report.py {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
