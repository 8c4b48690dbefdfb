"""A number of learner ranks and actors as a contender of launch/benchmarks/scaling.py: a run in a process of its own.

On processors the process has a Ray of its own and keeps to its number of shares of the processors, so that a device is
the same piece of the machine in every contender. Between steps it is blocked: contenders are timed one at a time.
"""

import json
import math
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from multiprocessing.connection import Connection
from typing import Any

import ray
import torch
from torch import Tensor

from actor.rollout import Sampling
from common.types import Group, UpdateResult, UserError
from launch.benchmarks.scaling_measured import Part, Point, Publish, Rank, Step, Sum
from launch.planning.plan import Plan
from launch.runtime import cluster, workers
from launch.runtime.channel import Channel
from launch.runtime.fleet import Fleet
from launch.runtime.recovery import Losses
from learner.batch import StepBatch
from learner.learner import Learner
from learner.policy.forward import ForwardOutput
from learner.ranks import Ranks

SUM_BYTES = tuple(4**power for power in range(6, 13))  # 4 KiB to 16 MiB, of the sums timed alone
REPEATS = 5  # of each of them


class TimedRanks(Ranks):
    """Ranks that meet before every sum, so that waiting for the slowest of them and the sum itself are timed apart."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        super().__init__(rank, world)
        self.sums: list[Sum] = []
        self.packed_tokens = 0  # of the last part
        self._what = ""

    def part(self, batch: StepBatch) -> StepBatch:
        own = super().part(batch)
        self.packed_tokens = sum(len(micro_batch.token_ids_L) for micro_batch in own.micro_batches)
        return own

    def whole(self, output: ForwardOutput, batch: StepBatch) -> ForwardOutput:
        self._what = "exchange"
        return super().whole(output, batch)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._what = "reduce"
        super().sum_gradients(parameters)

    def timed_sum(self, num_bytes: int) -> None:
        """A sum of zeros."""
        self._what = "alone"
        self._sum(torch.zeros(num_bytes // 4))

    def _sum(self, values: Tensor) -> None:
        if values.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        super()._sum(torch.zeros(1))
        met = time.perf_counter()
        super()._sum(values)
        num_bytes = values.numel() * values.element_size()
        ended = time.perf_counter()
        self.sums.append(Sum(what=self._what, bytes=num_bytes, wait_seconds=met - started, seconds=ended - met))


class TimedLearner(Learner):
    """A learner that times the parts of its update."""

    def __init__(self, *arguments: Any, ranks: Ranks | None = None, **options: Any) -> None:
        ranks = ranks or Ranks()
        self.timed = TimedRanks(ranks.rank, ranks.world)
        super().__init__(*arguments, ranks=self.timed, **options)
        self.own_seconds = 0.0
        for part, name in ((self.policy, "forward"), (self.policy, "reference_pass"), (self.optimizer, "step")):
            setattr(part, name, self._counted(getattr(part, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose time without that of sums over the ranks is added to own_seconds."""

        def counted(*arguments: Any, **options: Any) -> Any:
            started, before = time.perf_counter(), len(self.timed.sums)
            result = call(*arguments, **options)
            if self.policy.device.type == "cuda":
                torch.cuda.synchronize()
            in_sums = sum(each.wait_seconds + each.seconds for each in self.timed.sums[before:])
            self.own_seconds += time.perf_counter() - started - in_sums
            return result

        return counted

    def update(self, groups: Sequence[Group]) -> UpdateResult:
        self.timed.sums, self.own_seconds = [], 0.0
        started = time.perf_counter()
        result = super().update(groups)
        self.update_seconds = time.perf_counter() - started
        return result

    def times(self) -> Rank:
        """Of the last update."""
        return Rank(
            seconds=self.update_seconds,
            own_seconds=self.own_seconds,
            packed_tokens=self.timed.packed_tokens,
            sums=tuple(self.timed.sums),
        )

    def sums_alone(self) -> list[Sum]:
        """Sums of SUM_BYTES, REPEATS times each after one that warms up. None if there is one rank."""
        if self.timed.world == 1:
            return []
        for _ in range(1 + REPEATS):
            for num_bytes in SUM_BYTES:
                self.timed.timed_sum(num_bytes)
        return self.timed.sums[-REPEATS * len(SUM_BYTES) :]


class Contender:
    """The workers of a run, in the process that times them."""

    def __init__(self, checked: Plan, stack: ExitStack) -> None:
        self.config = checked.config
        self.sampling = Sampling.of(self.config)
        self.stream = checked.stream()
        self.workers = stack.enter_context(workers.start(checked, learner_class=TimedLearner))

    def step(self, prompts: int) -> Step:
        """One step of `prompts` prompts."""
        drawn = self.stream.draw(prompts)
        started = time.perf_counter()
        groups = self.workers.fleet.sample(drawn, self.sampling)
        result = self.workers.learner.update(groups)
        self.workers.learner.commit()
        learned = time.perf_counter()
        published = self.workers.channel.publish(self.workers.learner, canary=False)
        ended = time.perf_counter()
        assert result.skipped is None, result.skipped
        actors, ranks = self.config.actor.num_actors, self.config.learner.num_ranks
        return Step(
            point=Point(ranks=ranks, actors=actors, prompts=prompts),
            seconds=ended - started,
            publish=Publish(actors=actors, seconds=ended - learned, load_seconds=published.load_seconds),
            parts=_parts(groups),
            ranks=tuple(ray.get([rank.times.remote() for rank in self.workers.learner.ranks])),
            groups=tuple(
                (group.rollouts[0].num_prompt_tokens, *(rollout.num_completion_tokens for rollout in group.rollouts))
                for group in groups
            ),
            group_bytes=len(pickle.dumps(groups)),
        )

    def sums(self) -> list[Sum]:
        """Sums over the ranks, alone."""
        return [each for rank in ray.get([r.sums_alone.remote() for r in self.workers.learner.ranks]) for each in rank]

    def publishes(self, rounds: int) -> list[Publish]:
        """Publishes to 1, 2, … actors, interleaved, after a round that warms up; spread over the processors."""
        actors, learner = self.workers.fleet.actors, self.workers.learner
        processors = len(os.sched_getaffinity(0))
        most = math.ceil(len(actors) / processors)  # on one processor
        spread = [actors[i] for i in sorted(range(len(actors)), key=lambda i: i % most)]
        found = []
        for _ in range(1 + rounds):
            for number in range(1, 1 + len(actors)):
                some = Fleet([partial(lambda actor: actor, actor) for actor in spread[:number]], Losses())
                channel = Channel(some, canary_bound_nats=self.config.actor.canary_bound_nats)
                started = time.perf_counter()
                published = channel.publish(learner, canary=False)
                seconds = time.perf_counter() - started
                found.append(
                    Publish(
                        actors=number,
                        seconds=seconds,
                        load_seconds=published.load_seconds,
                        sharing=math.ceil(number / processors),
                    )
                )
        return found[len(actors) :]

    def copies(self) -> tuple[int, int]:
        """Nodes that get a copy of each published version, and its bytes."""
        return sum(node["Alive"] for node in ray.nodes()), self.workers.learner.adapter(False)[0].values.nbytes


def _parts(groups: Sequence[Group]) -> tuple[Part, ...]:
    """The actors' parts of a step: the groups of one request have its time, which no other request has."""
    found = []
    for seconds, part in groupby(groups, key=lambda group: group.rollout_seconds + group.reward_seconds):
        lengths = [rollout.num_completion_tokens for group in part for rollout in group.rollouts]
        found.append(Part(seconds=seconds, tokens=sum(lengths), longest=max(lengths)))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Remote:
    """A contender in a process of its own: its methods by name."""

    connection: Connection

    def __call__(self, method: str, *arguments: Any) -> Any:
        self.connection.send((method, arguments))
        return self.answer()

    def answer(self) -> Any:
        try:
            result = self.connection.recv()
        except EOFError:
            raise RuntimeError("a contender's process has ended; the lines above have the reason") from None
        if isinstance(result, UserError):
            raise result
        return result


@contextmanager
def started(checked: Plan, processors: Sequence[int]) -> Iterator[Remote]:
    """The contender of the plan's ranks and actors, for the duration of the block; on `processors` without a GPU."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, checked, processors))
    process.start()
    theirs.close()
    try:
        remote = Remote(ours)
        remote.answer()
        yield remote
    finally:
        ours.close()  # ends its loop
        process.join()


def _serve(connection: Connection, checked: Plan, processors: Sequence[int]) -> None:
    """The contender's process: calls methods for the parent until that closes the connection or dies."""
    if not torch.cuda.is_available():
        os.sched_setaffinity(0, processors)  # inherited by its Ray and the workers
        devices = checked.config.learner.num_ranks + checked.config.actor.num_actors
        os.environ["RAY_ADDRESS"] = "local"
        os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": max(devices, len(processors))})
    with ExitStack() as stack:
        try:
            stack.enter_context(cluster.connect())
            contender = Contender(checked, stack)
        except UserError as error:
            connection.send(error)
            return
        connection.send(None)
        while True:
            try:
                method, arguments = connection.recv()
            except EOFError:
                return
            connection.send(getattr(contender, method)(*arguments))
