"""The actors as one sampler: a request is cut into parts, and each part goes to the next idle actor."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Condition
from typing import Any

import ray

from actor.rollout import Sampling
from common.types import Group, Prompt
from launch.runtime.recovery import LOST, Losses, Patience

REMEDY = "lower actor.num_sequences or actor.gpu_memory_fraction"
CLOSE_SECONDS = 10.0  # less than what Ray leaves a driver that is stopped (cluster.JOB_STOP_SECONDS)

ACTOR = "actor"
SCORE = "score"  # an actor's wait for its reward workers once all is sampled: they run on processors, its device waits

Request = list[Future[list[Group]]]  # one future per part, in prompt order
Call = Callable[..., Any]  # a method of one actor by its name, with arguments; raises one of LOST


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One piece of work of one worker; times in seconds of the driver's time.perf_counter."""

    side: str  # "learner" or ACTOR
    index: int  # rank of the learner, or number of the actor
    work: str  # learn, publish; sample, SCORE, load, evaluate
    start: float
    end: float
    num_prompts: int | None = None  # of a part that an actor samples or scores
    version: int | None = None  # of the adapter


class Fleet:
    """actor.actor.Actor as Ray actors, one for each of `makers`.

    An actor has one part at a time, so that a slow one takes fewer of them, and a new adapter version waits for one
    part and not for a queue. The sampling seeds derive from the prompts: which actor samples a part changes nothing.
    A lost actor is replaced, and its part given to the replacement, whole: another part would be another batch, which
    rounds differently.
    """

    def __init__(self, makers: Sequence[Callable[[], Any]], losses: Losses, *, reward_seconds: float = 0.0) -> None:
        self.makers = list(makers)
        self.reward_seconds = reward_seconds  # that the rewards of one rollout may take
        self._closed = False
        self.actors = [make() for make in self.makers]
        self.losses = losses
        self.admit: Callable[[Call], None] = lambda call: None  # verifies a replacement before it is given work
        self._patience: dict[str, Patience] = {}  # by method
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

    @contextlib.contextmanager
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

    def each(self, method: str, *arguments: Any) -> list[Any]:
        """`method` of every actor at once."""
        refs = [getattr(actor, method).remote(*arguments) for actor in self.actors]
        return [self._answer(index, method, ref, arguments) for index, ref in enumerate(refs)]

    def close(self) -> None:
        """Drop the parts that have not started, and end the actors."""
        self._closed = True  # what ends now is no loss
        self._threads.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(ray.exceptions.RayError):  # what does not close in time is killed
            ray.get([actor.close.remote() for actor in self.actors], timeout=CLOSE_SECONDS)
        for actor in self.actors:
            ray.kill(actor)

    def _answer(self, index: int, method: str, ref: Any, arguments: Sequence[Any]) -> Any:
        """The answer of actor `index`, or of its replacement."""
        while True:
            try:
                return self._get(method, ref, arguments)
            except LOST as error:
                if self._closed:
                    raise
                self.losses.replace("actor", f"actor {index}", error, partial(self._replace, index))
                ref = getattr(self.actors[index], method).remote(*arguments)

    def _replace(self, index: int) -> None:
        if self._closed:
            raise RuntimeError("the fleet is closed")
        ray.kill(self.actors[index])
        self.actors[index] = actor = self.makers[index]()
        self.losses.await_start([actor])
        self.admit(lambda method, *arguments: self._get(method, getattr(actor, method).remote(*arguments), arguments))

    def _get(self, method: str, ref: Any, arguments: Sequence[Any]) -> Any:
        if method != "rollout":
            return self._patience.setdefault(method, Patience(REMEDY)).get(ref)
        part, sampling = arguments  # how long a group takes depends on its size, and on whether it is greedy
        patience = self._patience.setdefault(f"{sampling.group_size} at {sampling.temperature}", Patience(REMEDY))
        rewards = len(part) * sampling.group_size * self.reward_seconds
        return patience.get(ref, len(part), more_seconds=rewards)

    def _roll_out(self, part: Sequence[Prompt], sampling: Sampling, work: str) -> list[Group]:
        with self._changed:
            self._changed.wait_for(lambda: not self._paused)
            self._num_running += 1
        index, worked = self._idle.get(), []
        started = time.perf_counter()
        try:
            if self._closed:
                raise RuntimeError("the fleet is closed")
            groups: list[Group] = self._answer(
                index, "rollout", self.actors[index].rollout.remote(part, sampling), (part, sampling)
            )
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
