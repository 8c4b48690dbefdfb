"""The training loop: take groups, learn from them, publish the adapter, let new rollouts start."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from common.config import Config
from common.metrics import is_count
from common.types import Group, Prompt, UserError
from launch.evaluate import evaluate
from launch.recording.recorder import Recorder
from launch.recording.timeline import StepTimes
from launch.runtime.buffer import Buffer
from launch.runtime.recovery import RunFailed
from launch.runtime.workers import Workers
from learner import checkpoint

MAX_STEPS_WITHOUT_TRAINING = 3


def train(
    config: Config,
    workers: Workers,
    buffer: Buffer,
    recorder: Recorder,
    *,
    eval_prompts: Sequence[Prompt],
    first_step: int,
) -> None:
    """Run optimizer steps first_step + 1 .. run.steps, with the evaluations and checkpoints that are due.

    New rollouts start when `buffer` releases a step's groups. That happens only after the adapter that was learned from
    them is published, so that no rollout starts with an old adapter. Raises RunFailed after three steps in a row that
    are skipped (not finite) or without any reward, and AdapterMismatch from the channel.
    """
    run = config.run
    num_without = 0  # steps in a row that trained nothing
    if first_step == 0 and run.evaluate_every:
        recorder.evaluation(evaluate(workers.fleet, eval_prompts, config, step=0))
    buffer.start()
    for step in range(first_step + 1, run.steps + 1):
        started = time.perf_counter()
        groups = buffer.take(run.prompts_per_step)
        taken = time.perf_counter()
        result = workers.learner.update(groups)
        learned = time.perf_counter()
        with workers.fleet.paused():  # an actor loads an adapter between two parts of its work, never within one
            drained = time.perf_counter()
            published = workers.channel.publish(workers.learner)
            loaded = time.perf_counter()
            workers.learner.commit()  # nothing is sampled with a version that a loss could take back
            ended = time.perf_counter()
        evaluation = None
        if run.evaluate_every and due(step, run.evaluate_every, run.steps):  # before the next rollouts start
            evaluation = evaluate(workers.fleet, eval_prompts, config, step=step)
        buffer.release(len(groups))
        times = StepTimes(started=started, taken=taken, learned=learned, drained=drained, loaded=loaded, ended=ended)
        sampled, lost = workers.fleet.worked(), workers.losses.metrics()
        recorder.step(step, groups, result, published, times, sampled, lost, num_discarded=len(buffer.discarded))
        if evaluation is not None:
            recorder.evaluation(evaluation)
        reason = result.skipped or every_reward_failed(groups)
        num_without = num_without + 1 if reason else 0
        if num_without == MAX_STEPS_WITHOUT_TRAINING:
            raise RunFailed(f"{num_without} steps in a row trained nothing; stopped at step {step}: {reason}")
        if due(step, run.checkpoint_every, run.steps):
            save(run.dir, workers, step=step, prompt_cursor=buffer.prompt_cursor)


def every_reward_failed(groups: Sequence[Group]) -> str | None:
    """The failure of the first reward if all of them failed, else None."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if any(rollout.score for rollout in rollouts):
        return None
    return f"every reward failed: {rollouts[0].reward_error}"


def due(step: int, every: int, last: int) -> bool:
    """Whether an action is due after `step`: after every `every` steps (0: never), and after the last one."""
    return step == last or (every > 0 and step % every == 0)


def save(folder: Path, workers: Workers, *, step: int, prompt_cursor: int) -> None:
    """Write a checkpoint into the run folder, atomically."""
    with checkpoint.written_whole(folder / "checkpoints" / checkpoint.name(step)) as whole:
        workers.learner.save(whole.resolve())
        (whole / "run_state.json").write_text(json.dumps({"step": step, "prompt_cursor": prompt_cursor}))


def position(folder: Path) -> tuple[int, int]:
    """Step and prompt cursor of a checkpoint. Raises UserError for a file that `save` does not write."""
    try:
        state = checkpoint.read_object(folder / "run_state.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded: {error}; use another checkpoint") from None
    step, cursor = state.get("step"), state.get("prompt_cursor")
    if not is_count(step) or step != checkpoint.step_of(folder) or not is_count(cursor):
        raise UserError(f"{folder}/run_state.json has not the step of its folder and a cursor; use another checkpoint")
    return step, cursor
