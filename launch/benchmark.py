"""Benchmarks of interleaved contenders; each prints a table, and one JSON object as its last line.

    python launch/benchmark.py train    whole steps, ours and TRL's (launch/benchmarks/step.py)
    python launch/benchmark.py scaling  throughput by devices, measured and modelled (launch/benchmarks/scaling.py)
    python launch/benchmark.py learn    the learner alone (launch/benchmarks/update.py): needs no Ray and no vLLM
    python launch/benchmark.py head     the head alone (launch/benchmarks/head.py): needs no Ray, no vLLM and no model
    python launch/benchmark.py profile  a step's operations by time (launch/benchmarks/profile.py): needs no Ray

Each has --help.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from launch/, whose names shadow packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

MODULES = {"train": "step", "learn": "update", "head": "head", "scaling": "scaling", "profile": "profile"}


def main(argv: Sequence[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not argv or argv[0] not in MODULES:
        print(f"name a benchmark: {', '.join(MODULES)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"launch.benchmarks.{MODULES[argv[0]]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
