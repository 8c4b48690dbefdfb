"""The processes of a run: learner ranks and actors, as Ray actors on whatever the cluster has."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from actor import rewards
from actor.actor import Actor
from launch.planning.plan import Plan
from launch.runtime import nodes
from launch.runtime.channel import Channel
from launch.runtime.crew import Crew
from launch.runtime.fleet import Fleet
from launch.runtime.placement import Place, placed
from launch.runtime.recovery import LOST, Losses, NotStarted, RunFailed, last_line
from launch.runtime.resize import Resized
from learner.learner import Learner
from learner.ranks import Ranks

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Handles of the learner and the actors, and the channel between them."""

    plan: Plan  # fitted to the cluster's devices
    learner: Crew
    fleet: Fleet
    channel: Channel
    losses: Losses
    version: int  # of the adapter that the actors hold at the start


@contextlib.contextmanager
def start(plan: Plan, *, learner_class: type[Learner] = Learner, losses: Losses | None = None) -> Iterator[Workers]:
    """Run the learner and the actors for the duration of the block, after a verified start.

    `losses` replaces what is lost (None: as a new one does). Raises UserError for what cannot be placed, and for what a
    node lacks; Resized for a loss that cannot be replaced because its node stays away.
    """
    plan = nodes.fitted(plan)
    config, folder = plan.config, plan.model_folder
    losses = losses or Losses(wait_seconds=config.cluster.node_wait_seconds)
    losses.started = False
    with placed(config, gpus=bool(plan.gpus)) as places, contextlib.ExitStack() as stack:
        actors, ranks = (
            [_remote(side, plan, place, half=half) for place in each]
            for half, (side, each) in enumerate(((Actor, places.actors), (learner_class, places.learners)))
        )
        number = len(ranks)
        rank_makers = [
            partial(rank.remote, folder, config, plan.canary_token_ids, ranks=Ranks(index, number))
            for index, rank in enumerate(ranks)
        ]
        try:
            actor_makers = [partial(actor.remote, folder, config) for actor in actors]
            fleet = Fleet(actor_makers, losses, reward_seconds=rewards.seconds_of_a_rollout(config))
            stack.callback(fleet.close)
            crew = Crew(rank_makers, losses)
            stack.callback(crew.close)
            if plan.resume_from is not None:
                crew.load(plan.resume_from.resolve())
            channel = Channel(fleet, canary_bound_nats=config.actor.canary_bound_nats)
            published = channel.verify(crew)
        except LOST as error:
            raise RunFailed(f"a worker did not start: {last_line(error)}") from error
        losses.started = True
        try:
            yield Workers(
                plan=plan, learner=crew, fleet=fleet, channel=channel, losses=losses, version=published.version
            )
        except NotStarted:
            if places.complete():
                raise
            raise Resized("a node is lost, and no other one has come in its place") from None


def part(processors: Sequence[int], index: int, number: int) -> list[int]:
    """Part `index` of `number` equal parts of the processors; where there are too few, parts share one."""
    first, after = (i * len(processors) // number for i in (index, index + 1))
    return list(processors[first : max(after, first + 1)])


class _Worker:
    """Mixed into a side: keeps its process on its part of the node's processors, and lets learner ranks meet."""

    parts: Sequence[tuple[int, int]]  # index and number, one division within the other
    ranks: Ranks
    meet: Callable[[str, str, int], None]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        processors = sorted(os.sched_getaffinity(0))
        for index, number in self.parts:
            processors = part(processors, index, number)
        os.sched_setaffinity(0, processors)
        super().__init__(*arguments, **options)

    def open(self) -> tuple[str, int]:
        """On rank 0: address and port at which the ranks meet, on loopback if there is no other node."""
        alone = sum(node["Alive"] for node in ray.nodes()) == 1
        address = LOOPBACK if alone else ray.util.get_node_ip_address()
        return address, self.ranks.open(address)

    def join(self, address: str, port: int) -> None:
        """Meet the other ranks there."""
        self.meet(LOOPBACK if address == LOOPBACK else ray.util.get_node_ip_address(), address, port)


def _remote(side: type, plan: Plan, place: Place, *, half: int) -> Any:
    """`side` as a Ray actor at `place`; on its half of the processors where both sides work there at the same time."""
    cluster, overlapping = plan.config.cluster, plan.config.run.max_staleness > 0
    halved = not plan.gpus and overlapping and cluster.layout == "colocated"
    parts = [place.share, *([(half, 2)] if halved else [])]
    num_threads = len(os.sched_getaffinity(0))
    for _, number in parts:
        num_threads = max(1, num_threads // number)
    worker = type(side.__name__, (_Worker, side), {"parts": parts})  # by this name Ray's logs call it
    environment = {
        "OMP_NUM_THREADS": str(num_threads),  # Ray would set it to 1
        "GOMP_SPINCOUNT": "3000",  # threads that wait soon sleep: spinning would take cores from the other side
        "GLOO_SOCKET_IFNAME": "lo",  # of the groups within a node: vLLM's, and the one that shards the base
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    if issubclass(side, Learner):  # its micro-batches differ in length, which would fragment fixed segments
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return ray.remote(worker).options(
        num_cpus=0,  # Ray must not queue one side behind the other: they alternate on the same cores
        runtime_env={"env_vars": environment},
        **place.options,
    )
