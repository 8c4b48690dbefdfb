"""A run follows its cluster: it goes on with fewer workers when a node stays away, and takes in a node that comes."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import ray

from common.config import Config, with_values
from launch.planning import devices, plan
from launch.planning.plan import Plan
from launch.runtime.placement import devices_by_bundle
from launch.runtime.recovery import RunFailed


class Resized(RunFailed):
    """The cluster has other devices than the run is placed on: it starts again on these, after its last step."""

    def __init__(self, reason: str, *, grows: bool = False) -> None:
        super().__init__(reason)
        self.grows = grows


def numbers(asked: Config, num_devices: int) -> tuple[int, int] | None:
    """The numbers of learner ranks and of actors that are nearest to those asked for, on so many devices.

    Separate, the side that keeps less of what it asked for keeps as much as it can. None if nothing fits; a sharded
    base needs two ranks.
    """
    each, separate = asked.actor.tensor_parallel, asked.cluster.layout == "separate"
    fitting = [
        (r, a)
        for r in range(2 if asked.learner.shard else 1, asked.learner.num_ranks + 1)
        for a in range(1, asked.actor.num_actors + 1)
        if (r + a * each if separate else max(r, a)) <= num_devices
    ]
    return max(fitting, key=partial(_worth, asked), default=None)


def can_grow(asked: Plan, now: Config) -> bool:
    """Whether the cluster has room for more of what was asked for than the run has now, beside its other jobs."""
    has = now.learner.num_ranks, now.actor.num_actors
    if has == (asked.config.learner.num_ranks, asked.config.actor.num_actors):
        return False
    room = _num_devices(asked)
    if asked.gpus:
        room = min(room, sum(devices_by_bundle(now)) + int(ray.available_resources().get("GPU", 0)))
    fits = numbers(asked.config, room)
    return fits is not None and _worth(asked.config, fits) > _worth(asked.config, has)


def resized(asked: Plan, resume_from: Path | None) -> Plan:
    """The plan that was asked for, from a checkpoint on, with as many workers as the cluster now has devices for."""
    fits = numbers(asked.config, num_devices := _num_devices(asked))
    if fits is None:
        raise RunFailed(f"{num_devices} devices are too few to go on; resume with --run.resume when there are more")
    values = dict(zip(("learner.num_ranks", "actor.num_actors"), fits, strict=True))
    smaller = replace(asked, unfitted=with_values(asked.unfitted, values), resume_from=resume_from)
    return plan.fitted(smaller, devices.here())


def _worth(asked: Config, fits: tuple[int, int]) -> tuple[float, int]:
    """Numbers of ranks and actors are the better the more is left of the smaller side, then the more devices work."""
    left = min(fits[0] / asked.learner.num_ranks, fits[1] / asked.actor.num_actors)
    return left, fits[0] + fits[1] * asked.actor.tensor_parallel


def _num_devices(asked: Plan) -> int:
    """That the cluster has now: GPUs if the plan is for them, else processors."""
    return int(ray.cluster_resources().get("GPU" if asked.gpus else "CPU", 0))
