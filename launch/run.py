"""The entry point: configuration -> plan -> cluster -> loop.

python launch/run.py --config launch/configs/default.toml --method.name sa-ah-grpo --run.dir runs/x
python launch/run.py --dry-run      check everything, print the plan, start nothing
python launch/run.py --methods      the methods and their parameters
python launch/run.py --help         every option
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from launch/, whose names shadow packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from actor.rollout import Sampling
from common import methods
from common.command_line import load
from common.config import dump
from common.files import NotWritten, write_whole
from common.types import UserError
from launch.loop import position, train
from launch.planning import plan
from launch.planning.plan import Plan
from launch.recording.console import Display
from launch.recording.recorder import Recorder, rewind
from launch.runtime import cluster, workers
from launch.runtime.buffer import Buffer
from launch.runtime.channel import AdapterMismatch
from launch.runtime.recovery import RunFailed
from learner import checkpoint
from learner.selection import drop_reason


def run(checked: Plan) -> None:
    """Train as planned; everything is written to the run folder."""
    folder = checked.config.run.dir
    written = folder / "config.toml"
    first_step, cursor = position(checked.resume_from) if checked.resume_from else (0, 0)
    display = Display(f"{checked.config.method.name} in {folder}", steps=checked.config.run.steps)
    try:
        for warning in checked.warnings():
            display.note(f"warning: {warning}")
        if written.exists():
            for problem in checkpoint.passed_over(folder / "checkpoints"):
                display.note(f"warning: {problem}")
            whole = "" if checked.resume_from else ": there is no checkpoint"
            display.note(f"resuming at step {first_step}{whole}")
        display.note(f"starting vLLM and the learner on {checked.model_folder.name}; run folder {folder}")
        with cluster.connect(display.note), workers.start(checked, note=display.note) as started:
            config = started.plan.config
            if written.exists():
                rewind(folder, first_step if checked.resume_from else -1)  # the evaluation at step 0 comes again
            else:
                write_whole(written, dump(config))  # only now: a start that fails leaves no folder
            stream = checked.stream(cursor)
            buffer = Buffer(
                started.fleet,
                stream,
                Sampling.of(config),
                prompts_per_step=config.run.prompts_per_step,
                part_prompts=config.actor.part_prompts,
                num_steps=config.run.steps - first_step,
                max_staleness=config.run.max_staleness,
                drop_reason=partial(drop_reason, method=config.method),
                refill_rounds=config.method.refill_rounds,
            )
            with closing(Recorder(folder, checked.tokenizer, display, config)) as recorder:
                train(config, started, buffer, recorder, eval_prompts=checked.eval_prompts, first_step=first_step)
        display.note(f"finished {config.run.steps} steps; run folder {folder}")
    finally:
        display.close()


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 finished, 1 failed, 2 bad input; 128 + the signal's number if a signal stopped it."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if "--methods" in argv:
        print(methods.table())
        print("\nEvery field is an option, --method.FIELD, of every method:\n")
        for name, (default, meaning) in methods.parameters().items():
            print(f"  {name} ({default}): {meaning}")
        return 0
    try:
        options = [option for option in argv if option != "--dry-run"]
        checked = plan.make(load(options, cluster.DEFAULT_CONFIG))
        if len(options) < len(argv):
            print(checked.describe())
        else:
            run(checked)
    except UserError as error:
        print(getattr(error, "cause", error), file=sys.stderr)  # `cause`: a worker's, to which Ray adds a traceback
        return 2
    except (RunFailed, AdapterMismatch, NotWritten) as error:
        print(f"run failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; resume it with --run.resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
