"""The loop: take groups, learn from them, publish the adapter, let new rollouts start. All else hangs on it."""

import time
from collections.abc import Callable
from typing import Any

import ray

from common.config import Config
from launch.runtime.buffer import Buffer
from launch.runtime.channel import Channel
from launch.runtime.recorder import Recorder, StepTimes

MAX_REFUSED_STEPS = 3


class RunFailed(RuntimeError):
    """The run cannot go on; it ends with status 1."""


def train(
    config: Config,
    learner: Any,
    channel: Channel,
    buffer: Buffer,
    recorder: Recorder,
    *,
    first_step: int,
    after_step: Callable[[int], None],
) -> None:
    """Optimizer steps first_step + 1 .. run.steps.

    Consumes groups from `buffer`, waits for each, and frees their place only after the adapter that they made is
    published: that unblocks the next rollouts, so none is born stale. `after_step(step)` evaluates and checkpoints.
    Raises RunFailed after three refused (not finite) steps in a row, AdapterMismatch from the channel.
    """
    num_refused = 0
    for step in range(first_step + 1, config.run.steps + 1):
        started = time.perf_counter()
        groups = buffer.take(config.run.prompts_per_step)
        taken = time.perf_counter()
        result = ray.get(learner.update.remote(groups))
        learned = time.perf_counter()
        buffer.wait_ahead()  # an actor loads an adapter between two steps' rollouts, not during them
        idle = time.perf_counter()
        published = channel.publish(learner)
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
        num_refused = num_refused + 1 if result.refused else 0
        if num_refused == MAX_REFUSED_STEPS:
            raise RunFailed(
                f"{num_refused} steps in a row were not finite, the last: {result.refused}; stopped at {step}"
            )
        after_step(step)
