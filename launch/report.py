"""The report of runs as one HTML file: reward and accuracy, learning curves, samples, tables, settings.

python launch/report.py RUN [RUN ...] [--out FILE.html] [--export FOLDER] [--watch [PORT]]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from launch/, whose names shadow packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from common.command_line import Parser
from common.files import usable
from common.types import UserError
from launch.reporting.data.runs import read_all
from launch.reporting.page import Report, make
from launch.reporting.watch import serve

DEFAULT_PORT = 8377


def options(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line. Raises UserError if it is invalid."""
    parser = Parser(
        description="Write the report of run folders as one self-contained HTML file.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="a folder that launch/run.py wrote, or a grid's"
    )
    parser.add_argument("--out", metavar="FILE.html", type=Path, help="default: report.html in the first run's folder")
    parser.add_argument(
        "--export", metavar="FOLDER", type=Path, help="also write tables as CSV, figures as SVG and PNG"
    )
    parser.add_argument(
        "--watch",
        metavar="PORT",
        type=int,
        nargs="?",
        const=DEFAULT_PORT,
        help=f"serve the report on 127.0.0.1 and keep it current (default port {DEFAULT_PORT}; 0: any free one)",
    )
    chosen = parser.parse_args(list(argv))
    for path in filter(None, (*chosen.runs, chosen.out, chosen.export)):
        usable(path)
    return chosen


def write(folders: Sequence[Path], out: Path) -> Report:
    """Read the runs and write their report to `out`."""
    report = make(read_all(folders))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report.html, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); name another file") from None
    return report


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 written, 2 bad input."""
    try:
        chosen = options(argv)
        out = chosen.out or chosen.runs[0] / "report.html"
        if chosen.out is None and out.is_symlink():  # it may lead out of the folder
            raise UserError(f"{out} is a symbolic link; remove it, or name a file with --out")
        report = write(chosen.runs, out)
        print(f"wrote {out}")
        if chosen.export:
            report.export(chosen.export)
            print(f"wrote tables and figures to {chosen.export}")
        if chosen.watch is not None:
            serve(chosen.runs, lambda: write(chosen.runs, out).html, chosen.watch)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
