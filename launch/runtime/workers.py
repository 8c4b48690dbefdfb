"""The processes of a run: one learner and its actors, as Ray actors."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actor.actor import Actor
from common.config import Config
from common.types import UserError
from launch.planning.plan import Plan
from launch.runtime.channel import Channel
from learner.learner import Learner

PLACEMENT_SECONDS = 60  # to wait for GPUs that other jobs hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Handles of the learner and the actors, and the channel between them."""

    learner: Any
    actors: list[Any]
    channel: Channel
    version: int  # of the adapter that the actors hold at the start


@contextlib.contextmanager
def start(plan: Plan, *, learner_class: type[Learner] = Learner) -> Iterator[Workers]:
    """Run the learner and the actors for the duration of the block, after a verified start.

    Raises UserError if there are too few GPUs.
    """
    config = plan.config
    num_actors = config.actor.num_actors
    with placed(num_actors if torch.cuda.is_available() else 0) as places:
        actors = [
            _remote(Actor, config, place, first_half=True).remote(plan.model_folder, config)
            for place in places or [{}] * num_actors
        ]
        try:
            with _learner(plan, learner_class, places[0] if places else {}) as learner:
                channel = Channel(actors, canary_bound_nats=config.actor.canary_bound_nats)
                published = channel.verify(learner)
                yield Workers(learner=learner, actors=actors, channel=channel, version=published.version)
        finally:
            with contextlib.suppress(ray.exceptions.RayError):  # an actor that does not close in time is killed
                ray.get([actor.close.remote() for actor in actors], timeout=20)
            for actor in actors:
                ray.kill(actor)


@contextlib.contextmanager
def placed(num_gpus: int, *, wait_seconds: float = PLACEMENT_SECONDS) -> Iterator[list[dict[str, Any]]]:
    """Ray's options that place a worker on each of `num_gpus` whole GPUs, reserved for the duration of the block.

    Raises UserError at once if the cluster has too few GPUs, and after `wait_seconds` if other jobs hold them.
    """
    if not num_gpus:
        yield []
        return
    total = ray.cluster_resources().get("GPU", 0)
    if total < num_gpus:
        raise UserError(
            f"the run asks for {num_gpus} GPUs (actor.num_actors), and the Ray cluster has {total:g}; start Ray with "
            f"--num-gpus={num_gpus}, or lower actor.num_actors"
        )
    group = placement_group([{"GPU": 1}] * num_gpus)
    try:
        if not group.wait(wait_seconds):
            free = ray.available_resources().get("GPU", 0)
            raise UserError(
                f"the run asks for {num_gpus} GPUs, and after {wait_seconds:g} s {free:g} of the Ray cluster's "
                f"{total:g} are free; wait for its other jobs (`ray status` shows them), or lower actor.num_actors"
            )
        strategies = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(num_gpus)]
        yield [{"scheduling_strategy": strategy} for strategy in strategies]
    finally:
        remove_placement_group(group)


@contextlib.contextmanager
def _learner(plan: Plan, learner_class: type[Learner], place: dict[str, Any]) -> Iterator[Any]:
    """Run the learner for the duration of the block, from the checkpoint of the plan if it has one."""
    handle = _remote(learner_class, plan.config, place, first_half=False).remote(
        plan.model_folder, plan.config, plan.canary_token_ids
    )
    try:
        if plan.resume_from is not None:
            ray.get(handle.load.remote(plan.resume_from.resolve()))
        yield handle
    finally:
        ray.kill(handle)


def cores() -> list[int]:
    """The processors that this process may use."""
    return sorted(os.sched_getaffinity(0))


def half(processors: Sequence[int], *, first: bool) -> list[int]:
    """The first half of the processors, or the second; a single processor is in both."""
    middle = len(processors) // 2
    return list(processors[: max(1, middle)] if first else processors[middle:])


class _OnHalf:
    """A mixin that pins its process to half of the processors before the constructor of the other class runs."""

    first_half: bool

    def __init__(self, *arguments: Any) -> None:
        os.sched_setaffinity(0, half(cores(), first=self.first_half))
        super().__init__(*arguments)


def _remote(side: type, config: Config, place: dict[str, Any], *, first_half: bool) -> Any:
    """`side` as a Ray actor at `place`; pinned to half of the processors if the sides overlap on a CPU."""
    if not config.run.max_staleness or torch.cuda.is_available():
        return ray.remote(side).options(**_options(side, len(cores())), **place)

    on_half = type(side.__name__, (_OnHalf, side), {"first_half": first_half})  # the name in Ray's logs
    return ray.remote(on_half).options(**_options(side, len(half(cores(), first=first_half))), **place)


def _options(side: type, num_threads: int) -> dict[str, Any]:
    """Ray's options for either side. Both share a GPU, so each asks for half of it; this reserves no memory."""
    environment = {
        "OMP_NUM_THREADS": str(num_threads),  # Ray would set it to 1
        "GOMP_SPINCOUNT": "3000",  # threads that wait soon sleep: spinning would take cores from the other side
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    if issubclass(side, Learner):  # its micro-batches differ in length, which would fragment fixed segments
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return {
        "num_cpus": 0,  # Ray must not queue one side behind the other: they alternate on the same cores
        "num_gpus": 0.5 if torch.cuda.is_available() else 0,
        "runtime_env": {"env_vars": environment},
    }
