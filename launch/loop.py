"""The loop: take groups, learn from them, publish the adapter, let new rollouts start. All else hangs on it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import ray

from common.config import Config
from common.types import Prompt
from launch.evaluate import evaluate
from launch.runtime.buffer import Buffer
from launch.runtime.recorder import Recorder, StepTimes
from launch.runtime.workers import Workers
from learner import checkpoint

MAX_SKIPPED_STEPS = 3


class RunFailed(RuntimeError):
    """The run cannot go on; it ends with status 1."""


def train(
    config: Config,
    workers: Workers,
    buffer: Buffer,
    recorder: Recorder,
    *,
    eval_prompts: Sequence[Prompt],
    first_step: int,
) -> None:
    """Optimizer steps first_step + 1 .. run.steps, with the evaluations and checkpoints that are due.

    Takes groups from `buffer`, and frees their place only after the adapter that they made is published: that starts
    the next rollouts, so that none is stale from its beginning. Raises RunFailed after three skipped (non-finite) steps
    in a row, AdapterMismatch from the channel.
    """
    run = config.run
    num_skipped = 0
    if first_step == 0 and run.evaluate_every:
        recorder.evaluation(evaluate(workers.actors, eval_prompts, config, step=0))
    for step in range(first_step + 1, run.steps + 1):
        started = time.perf_counter()
        groups = buffer.take(run.prompts_per_step)
        taken = time.perf_counter()
        result = ray.get(workers.learner.update.remote(groups))
        learned = time.perf_counter()
        buffer.wait_ahead()  # an actor loads an adapter between two steps' rollouts, not during them
        idle = time.perf_counter()
        published = workers.channel.publish(workers.learner)
        ended = time.perf_counter()
        buffer.release(len(groups))
        times = StepTimes(
            wait_seconds=taken - started,
            ahead_seconds=idle - learned,
            learn_seconds=learned - taken,
            publish_seconds=ended - idle,
            step_seconds=ended - started,
        )
        recorder.step(step, groups, result, published, times, num_discarded=len(buffer.discarded))
        num_skipped = num_skipped + 1 if result.skipped else 0
        if num_skipped == MAX_SKIPPED_STEPS:
            raise RunFailed(
                f"{num_skipped} steps in a row were not finite, the last: {result.skipped}; stopped at {step}"
            )
        if run.evaluate_every and due(step, run.evaluate_every, run.steps):
            recorder.evaluation(evaluate(workers.actors, eval_prompts, config, step=step))
        if due(step, run.checkpoint_every, run.steps):
            save(run.dir, workers, step=step, prompt_cursor=buffer.prompt_cursor)


def due(step: int, every: int, last: int) -> bool:
    """Whether what happens every `every` steps (0: never) and after the last one follows `step`."""
    return step == last or (every > 0 and step % every == 0)


def save(folder: Path, workers: Workers, *, step: int, prompt_cursor: int) -> None:
    """A checkpoint in the run folder, whole or not there."""
    with checkpoint.written_whole(folder / "checkpoints" / checkpoint.name(step)) as whole:
        ray.get(workers.learner.save.remote(whole.resolve()))
        (whole / "run_state.json").write_text(json.dumps({"step": step, "prompt_cursor": prompt_cursor}))


def position(folder: Path) -> tuple[int, int]:
    """Step and prompt cursor of a checkpoint."""
    state = json.loads((folder / "run_state.json").read_text())
    return state["step"], state["prompt_cursor"]
