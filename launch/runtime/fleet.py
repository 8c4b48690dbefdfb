"""The actors as one sampler: a request is cut into parts, and each part goes to the next idle actor."""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Condition
from typing import Any

import ray

from actor.rollout import Sampling
from common.types import Group, Prompt
from launch.runtime.timeline import ACTOR, SCORE, Span

Request = list[Future[list[Group]]]  # one future per part, in prompt order


class Fleet:
    """Handles of actor.actor.Actor as Ray actors.

    An actor has one part at a time, so that a slow one takes fewer of them, and a new adapter version waits for one
    part and not for a queue. The sampling seeds derive from the prompts: which actor samples a part changes nothing.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = list(actors)
        self._idle: SimpleQueue[int] = SimpleQueue()  # numbers of actors
        for index in range(len(self.actors)):
            self._idle.put(index)
        self._threads = ThreadPoolExecutor(len(self.actors), thread_name_prefix="fleet")
        self._changed = Condition()
        self._paused = False
        self._num_running = 0
        self._worked: list[Span] = []

    def start(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        part_prompts: int | None = None,
        work: str = "sample",
    ) -> Request:
        """Begin to sample groups of the prompts, `part_prompts` at a time (None: an equal share for each actor).

        `work` is what the timeline calls it.
        """
        size = part_prompts or math.ceil(len(prompts) / len(self.actors)) or 1
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return [self._threads.submit(self._roll_out, part, sampling, work) for part in parts]

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        part_prompts: int | None = None,
        work: str = "sample",
    ) -> list[Group]:
        """One group per prompt, in prompt order; waits for them."""
        return finished(self.start(prompts, sampling, part_prompts=part_prompts, work=work))

    def worked(self) -> list[Span]:
        """The parts that have ended since the last call. None of a step's is missing once it is `paused`."""
        with self._changed:
            worked, self._worked = self._worked, []
        return worked

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the running parts end, and start no other one during the block."""
        with self._changed:
            self._paused = True
            self._changed.wait_for(lambda: self._num_running == 0)
        try:
            yield
        finally:
            with self._changed:
                self._paused = False
                self._changed.notify_all()

    def close(self) -> None:
        """Drop the parts that have not started. The running ones end with their actors."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _roll_out(self, part: Sequence[Prompt], sampling: Sampling, work: str) -> list[Group]:
        with self._changed:
            self._changed.wait_for(lambda: not self._paused)
            self._num_running += 1
        index, worked = self._idle.get(), []
        started = time.perf_counter()
        try:
            groups: list[Group] = ray.get(self.actors[index].rollout.remote(part, sampling))
            worked = _spans(work, index, groups, started, time.perf_counter())
            return groups
        finally:
            self._idle.put(index)
            with self._changed:
                self._worked += worked
                self._num_running -= 1
                self._changed.notify_all()


def _spans(work: str, index: int, groups: Sequence[Group], started: float, ended: float) -> list[Span]:
    """A part's sampling, and the scoring that was left when it had ended."""
    sampled = ended - groups[0].reward_seconds
    what = {"num_prompts": len(groups), "version": groups[0].rollouts[0].version}
    return [
        Span(side=ACTOR, index=index, work=work, start=started, end=sampled, **what),
        Span(side=ACTOR, index=index, work=SCORE, start=sampled, end=ended, **what),
    ]


def finished(request: Request) -> list[Group]:
    """The groups of a request, in prompt order; waits for them."""
    return [group for part in request for group in part.result()]
