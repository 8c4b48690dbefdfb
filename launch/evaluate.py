"""Evaluates a checkpoint or a base model on held-out problems, and compares two evaluations of the same problems.

python launch/evaluate.py runs/x/checkpoints/step-000030 [--evaluation.num_samples 8 ...]   with its run's options
python launch/evaluate.py MODEL --sets gsm8k:FOLDER math500:FOLDER   a base model: its folder, hub name or built-in
    name, with launch/configs/evaluate.toml; --config RUN/config.toml asks as that run does, to compare the two
python launch/evaluate.py --compare BEFORE.jsonl AFTER.jsonl   files of RUN/evaluations/ or of --out
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from launch/, whose names shadow packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from common.command_line import Parser, load
from common.files import WEIGHTS, NotWritten, run_of, usable, write_whole
from common.metrics import json_lines
from common.types import UserError
from launch.evaluation import compare, measure
from launch.planning import plan
from launch.planning.plan import Plan
from launch.runtime import cluster, workers
from launch.runtime.channel import AdapterMismatch
from launch.runtime.recovery import RunFailed
from learner import checkpoint

BASE_MODEL = cluster.ROOT / "launch" / "configs" / "evaluate.toml"  # options, unless --config names others


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own arguments, and the options of a run among the others. Raises UserError."""
    parser = Parser(
        usage="launch/evaluate.py CHECKPOINT|MODEL [--sets NAME:DATA ...] [--out FILE.jsonl] [--SECTION.KEY VALUE ...]",
        description=__doc__,
        epilog="launch/run.py --help lists the options of a run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--sets",
        metavar="NAME:DATA",
        nargs="+",
        help="evaluate these sets alone, instead of the task's problems and evaluation.sets",
    )
    parser.add_argument("--out", metavar="FILE.jsonl", type=Path, help="write what became of each problem")
    parser.add_argument("--compare", metavar="FILE.jsonl", nargs=2, type=Path, help="two files of the same problems")
    own, options = parser.parse_known_args(list(argv))
    for path in filter(None, (own.out, *(own.compare or ()))):
        usable(path)
    if own.out is not None and (own.out.is_dir() or not own.out.parent.is_dir()):
        raise UserError(f"--out {own.out} is not a file in a folder that is there; name one")
    return own, options


def planned(target: str, sets: Sequence[str], options: Sequence[str]) -> Plan:
    """The plan for a checkpoint, with its run's options, or for a base model, which gets an adapter of zeros."""
    path = usable(Path(target))
    options = [*options, "--evaluation.best", "null", "--run.patience", "null"]  # which may name other sets
    options += ["--task.rewards", "null", "--method.decoupled_rewards", "false"]  # judges, which grade no evaluation
    if sets:
        options = [*options, "--evaluation.sets", json.dumps(list(sets))]
    if (path / WEIGHTS).is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        written = run_of(path) / "config.toml"
        checkpoint.check(path)
        config, saved = load(["--config", str(written), *options], written), path
    else:
        config, saved = load(["--model.path", target, *options], BASE_MODEL), None
    return plan.make(config, trains=False, saved=saved, sets_alone=bool(sets))


def main(argv: Sequence[str]) -> int:
    """Prints a line for each set, and the record as the last line. Exit status as launch/run.py's."""
    try:
        own, options = parse(argv)
        if own.compare:
            differences = compare.compare(*own.compare)
            print(*compare.lines(differences), json_lines([differences]), sep="\n", end="")
            return 0
        if not options or options[0].startswith("-"):
            raise UserError("name a checkpoint or a model: launch/evaluate.py RUN/checkpoints/step-000030 [OPTIONS]")
        checked = planned(options[0], own.sets or (), options[1:])
        with cluster.connect(), workers.start(checked) as started:
            found = measure.evaluate(
                started.fleet, checked.prompts.evaluation, started.plan.config, step=started.version
            )
        print(*measure.lines(found.record), json_lines([found.record]), sep="\n", end="")
        if own.out:
            write_whole(own.out, json_lines(found.problems))
    except UserError as error:
        print(getattr(error, "cause", error), file=sys.stderr)  # `cause`: a worker's, to which Ray adds a traceback
        return 2
    except (RunFailed, AdapterMismatch, NotWritten) as error:
        print(f"evaluation failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
