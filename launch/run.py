"""The entry point: configuration -> plan -> cluster -> loop.

python launch/run.py --config launch/configs/default.toml --method.name sa-ah-grpo --run.dir runs/x
python launch/run.py --dry-run      check everything, print the plan, start nothing
python launch/run.py --methods      the methods and their parameters
python launch/run.py --help         every option
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from launch.evaluation import best
from launch.loop import position, save, train
from launch.planning import plan
from launch.planning.plan import Plan
from launch.recording.console import Display
from launch.recording.recorder import Recorder, rewind
from launch.runtime import cluster, resize, workers
from launch.runtime.buffer import Buffer
from launch.runtime.channel import AdapterMismatch
from launch.runtime.recovery import Losses, RunFailed
from launch.runtime.resize import Resized
from launch.runtime.workers import Workers
from learner import checkpoint
from learner.selection import drop_reason


def run(checked: Plan) -> None:
    """Train as planned; everything is written to the run folder. Starts again when the cluster's devices change."""
    folder = checked.config.run.dir
    display = Display(f"{checked.config.method.name} in {folder}", steps=checked.config.run.steps)
    try:
        for warning in checked.warnings():
            display.note(f"warning: {warning}")
        if (folder / "config.toml").exists():
            for problem in checkpoint.passed_over(folder / "checkpoints"):
                display.note(f"warning: {problem}")
            first_step = position(checked.resume_from)[0]
            if stopped := best.stopped(checked.config, first_step):
                display.note(f"{stopped}; run folder {folder}")
                return
            display.note(f"resuming at step {first_step}{'' if checked.resume_from else ': there is no checkpoint'}")
        display.note(f"starting vLLM and the learner on {checked.model_folder.name}; run folder {folder}")
        with cluster.connect(display.note):
            stopped = _attempts(checked, display)
        display.note(f"{stopped or f'finished {checked.config.run.steps} steps'}; run folder {folder}")
    finally:
        display.close()


def _attempts(checked: Plan, display: Display) -> str | None:
    """Start the workers and train; again when the cluster's devices change. As launch.loop.train."""
    losses = Losses(display.note, wait_seconds=checked.config.cluster.node_wait_seconds)
    asked: Plan | None = None
    smaller: Plan | None = None  # to go back to if a larger run does not start
    while True:
        try:
            with workers.start(checked, losses=losses) as started:
                asked, smaller, now = asked or started.plan, None, started.plan.config
                return _train(started, display, can_grow=partial(resize.can_grow, asked, now))
        except Resized as change:
            assert asked is not None, "it is raised once the workers have started"
            saved = save(now.run.dir, started) if started.learner.position else checked.resume_from
            smaller = replace(checked, resume_from=saved) if change.grows else None
            checked = resize.resized(asked, saved)
            ranks, actors = checked.config.learner.num_ranks, checked.config.actor.num_actors
            display.note(
                f"{change}; going on after step {position(saved)[0]} with learner.num_ranks={ranks} and "
                f"actor.num_actors={actors}"
            )
        except (UserError, RunFailed) as error:
            if smaller is None:
                raise
            display.note(f"{error}; going on as before")
            asked = checked = smaller  # what was asked for is not to be had


def _train(started: Workers, display: Display, *, can_grow: Callable[[], bool]) -> str | None:
    """Run the steps that are left, on workers that have started; as launch.loop.train."""
    config, resume_from = started.plan.config, started.plan.resume_from
    first_step, cursor = position(resume_from)
    written = config.run.dir / "config.toml"
    if written.exists():
        rewind(config.run.dir, first_step if resume_from else -1)  # the evaluation at step 0 comes again
        if resume_from:
            best.tidy(config, resume_from)  # a crash may have come before it
    else:
        write_whole(written, dump(config))  # only now: a start that fails leaves no folder
    stream = started.plan.stream(cursor)
    buffer = Buffer(
        started.fleet,
        stream,
        Sampling.of(config),
        prompts_per_step=config.run.prompts_per_step,
        part_prompts=config.actor.part_prompts,
        num_steps=config.run.steps - first_step,
        max_staleness=config.run.max_staleness,
        drop_reason=partial(drop_reason, method=config.method, rewards=config.task.rewards),
        refill_rounds=config.method.refill_rounds,
    )
    with Recorder(config.run.dir, started.plan.tokenizer, display, config) as recorder:
        return train(
            config,
            started,
            buffer,
            recorder,
            eval_prompts=started.plan.prompts.evaluation,
            first_step=first_step,
            can_grow=can_grow,
        )


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
