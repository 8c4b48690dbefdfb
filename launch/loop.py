"""The training loop: take groups, learn from them, publish the adapter, let new rollouts start."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.config import Config
from common.metrics import is_count
from common.types import Group, UserError
from launch.evaluation import best
from launch.evaluation.measure import Problems, evaluate
from launch.recording.recorder import Recorder
from launch.recording.timeline import StepTimes
from launch.runtime.buffer import Buffer
from launch.runtime.recovery import RunFailed
from launch.runtime.resize import Resized
from launch.runtime.workers import Workers
from learner import checkpoint

MAX_STEPS_WITHOUT_TRAINING = 3


def train(
    config: Config,
    workers: Workers,
    buffer: Buffer,
    recorder: Recorder,
    *,
    eval_prompts: Problems,
    first_step: int,
    can_grow: Callable[[], bool] = lambda: False,
) -> str | None:
    """Run optimizer steps first_step + 1 .. run.steps, with the evaluations and checkpoints that are due.

    New rollouts start when `buffer` releases a step's groups. That happens only after the adapter that was learned from
    them is published, so that no rollout starts with an old adapter. Returns why it has stopped before the last step
    (run.patience), else None. Raises RunFailed after three steps in a row that are skipped (not finite) or without any
    reward, AdapterMismatch from the channel, and Resized between two steps if the run `can_grow`.
    """
    run = config.run
    num_without = 0  # steps in a row that trained nothing
    if run.evaluate_every and due(first_step, run.evaluate_every, run.steps) and not recorder.has_evaluated(first_step):
        recorder.evaluation(evaluate(workers.fleet, eval_prompts, config, step=first_step))
        if early := best.stopped(config, first_step):
            return early
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
            # Nothing is sampled with a version that a loss could take back.
            workers.learner.commit(buffer.stream.files(), step=step, prompt_cursor=buffer.prompt_cursor)
            ended = time.perf_counter()
        times = StepTimes(started=started, taken=taken, learned=learned, drained=drained, loaded=loaded, ended=ended)
        sampled, lost = workers.fleet.worked(), workers.losses.metrics()
        evaluates = run.evaluate_every and due(step, run.evaluate_every, run.steps)
        stopped: str | None = None
        if not evaluates:
            buffer.release(len(groups))  # the actors do not wait for the record
        recorder.step(step, groups, result, published, times, sampled, lost, num_discarded=len(buffer.discarded))
        if evaluates:
            recorder.evaluation(evaluate(workers.fleet, eval_prompts, config, step=step))
            if (stopped := best.stopped(config, step)) is None:
                buffer.release(len(groups))
        reason = result.skipped or every_reward_failed(groups)
        num_without = num_without + 1 if reason else 0
        if num_without == MAX_STEPS_WITHOUT_TRAINING:
            raise RunFailed(f"{num_without} steps in a row trained nothing; stopped at step {step}: {reason}")
        if due(step, run.checkpoint_every, run.steps) or (evaluates and best.is_best(config, step)) or stopped:
            best.tidy(config, save(run.dir, workers))
        if stopped:
            return stopped
        if step < run.steps and can_grow():
            raise Resized("the cluster has more devices again", grows=True)
    return None


def every_reward_failed(groups: Sequence[Group]) -> str | None:
    """The failure of the first reward if all of them failed, else None."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if any(rollout.score for rollout in rollouts):
        return None
    return f"every reward failed: {rollouts[0].reward_error}"


def due(step: int, every: int, last: int) -> bool:
    """Whether an action is due after `step`: after every `every` steps (0: never), and after the last one."""
    return step == last or (every > 0 and step % every == 0)


def save(folder: Path, workers: Workers) -> Path:
    """Write a checkpoint of the last committed step into the run folder, atomically, if there is none; returns it."""
    saved = folder / "checkpoints" / checkpoint.name(workers.learner.position["step"])
    if checkpoint.damage(saved):  # or there is none
        with checkpoint.written_whole(saved) as whole:
            workers.learner.save(whole.resolve())
    return saved


def position(folder: Path | None) -> tuple[int, int]:
    """Step and prompt cursor of a checkpoint; 0 without one. Raises UserError for a file that `save` does not write."""
    if folder is None:
        return 0, 0
    try:
        state = checkpoint.read_object(folder / "run_state.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded: {error}; use another checkpoint") from None
    step, cursor = state.get("step"), state.get("prompt_cursor")
    if not is_count(step) or step != checkpoint.step_of(folder) or not is_count(cursor):
        raise UserError(f"{folder}/run_state.json has not the step of its folder and a cursor; use another checkpoint")
    return step, cursor
