"""The processes of a run: one learner and its actors, as Ray actors on whatever the cluster has."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from actor.actor import Actor
from common.config import Config
from launch.planning.plan import Plan
from launch.runtime.channel import Channel
from learner.learner import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Handles, and the channel between them."""

    learner: Any
    actors: list[Any]
    channel: Channel
    version: int  # of the adapter that the actors hold at the start


@contextlib.contextmanager
def start(plan: Plan, *, learner_class: type[Learner] = Learner) -> Iterator[Workers]:
    """Learner and actors for the length of the block, with a verified start and the learner's adapter published."""
    config = plan.config
    actor_class = _remote(Actor, config, first_half=True)
    actors = [actor_class.remote(plan.model_folder, config) for _ in range(config.actor.num_actors)]
    try:
        with learner(plan, learner_class) as learner_:
            channel = Channel(actors, canary_bound_nats=config.actor.canary_bound_nats)
            published = channel.verify(learner_)
            yield Workers(learner=learner_, actors=actors, channel=channel, version=published.version)
    finally:
        with contextlib.suppress(ray.exceptions.RayError):  # what does not close in time is killed with its processes
            ray.get([actor.close.remote() for actor in actors], timeout=20)
        for actor in actors:
            ray.kill(actor)


@contextlib.contextmanager
def learner(plan: Plan, learner_class: type[Learner]) -> Iterator[Any]:
    """A learner for the length of the block, at the checkpoint of the plan if it has one."""
    handle = _remote(learner_class, plan.config, first_half=False).remote(
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
    """The first half of the processors, or the others; one alone is in both."""
    middle = len(processors) // 2
    return list(processors[: max(1, middle)] if first else processors[middle:])


def _remote(side: type, config: Config, *, first_half: bool) -> Any:
    """`side` as a Ray actor; on half of its processors where both sides work at the same time on a CPU."""
    if not config.run.max_staleness or torch.cuda.is_available():
        return ray.remote(side).options(**_options(len(cores())))

    class Halved(side):
        def __init__(self, *arguments: Any) -> None:
            os.sched_setaffinity(0, half(cores(), first=first_half))
            super().__init__(*arguments)

    Halved.__name__ = side.__name__
    return ray.remote(Halved).options(**_options(len(half(cores(), first=first_half))))


def _options(num_threads: int) -> dict[str, Any]:
    """Ray's options for either side. They share each GPU: the fractions say so and reserve nothing."""
    return {
        "num_cpus": 0,  # Ray must not queue one side behind the other: they take turns on the same cores
        "num_gpus": 0.5 if torch.cuda.is_available() else 0,
        "runtime_env": {
            "env_vars": {
                "OMP_NUM_THREADS": str(num_threads),  # Ray would set it to 1
                "GOMP_SPINCOUNT": "3000",  # waiting threads soon sleep: spinning steals the other side's cores
                "TORCH_CPP_LOG_LEVEL": "ERROR",
                "PYTHONWARNINGS": "ignore::FutureWarning",
            }
        },
    }
