"""The processes of a run: one learner and its actors, as Ray actors on whatever the cluster has."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch

from actor.actor import Actor
from launch.channel import Channel
from launch.plan import Plan
from learner.learner import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Handles, and the channel between them."""

    learner: Any
    actors: list[Any]
    channel: Channel
    version: int  # of the adapter that the actors hold at the start


@contextlib.contextmanager
def start(plan: Plan) -> Iterator[Workers]:
    """Learner and actors for the length of the block, with the learner's adapter published and proved.

    Both sides share each GPU: the fractions say so to Ray and reserve nothing.
    """
    config = plan.config
    options = {
        "num_cpus": 0,  # Ray must not queue them behind each other: they take turns on the same cores
        "num_gpus": 0.5 if torch.cuda.is_available() else 0,
        "runtime_env": {
            "env_vars": {
                "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),  # Ray would set it to 1
                "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads would steal the cores of the side whose turn it is
                "TORCH_CPP_LOG_LEVEL": "ERROR",
                "PYTHONWARNINGS": "ignore::FutureWarning",
            }
        },
    }
    learner = ray.remote(Learner).options(**options).remote(plan.model_folder, config, plan.canary_token_ids)
    actor_class = ray.remote(Actor).options(**options)
    actors = [actor_class.remote(plan.model_folder, config) for _ in range(config.actor.num_actors)]
    try:
        if plan.resume_from is not None:
            ray.get(learner.load.remote(plan.resume_from.resolve()))
        channel = Channel(actors, canary_bound_nats=config.actor.canary_bound_nats)
        published = channel.publish(learner.adapter.remote())
        yield Workers(learner=learner, actors=actors, channel=channel, version=published.version)
    finally:
        _end(learner, actors)


def _end(learner: Any, actors: list[Any]) -> None:
    """Actors first close their engines; what does not answer in time is killed with its process tree."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get([actor.close.remote() for actor in actors], timeout=20)
    for handle in [*actors, learner]:
        ray.kill(handle)
