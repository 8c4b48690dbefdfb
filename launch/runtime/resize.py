"""A run follows its cluster: it goes on with fewer workers when a node stays away, and takes in a node that comes."""

from dataclasses import replace
from pathlib import Path

import ray

from common.config import Config, with_values
from launch.planning import devices, plan
from launch.planning.plan import Plan
from launch.runtime.recovery import RunFailed


class Resized(Exception):
    """The cluster has other devices than the run is placed on: it starts again on these, after its last step."""


def numbers(asked: Config, num_devices: int) -> tuple[int, int] | None:
    """The numbers of learner ranks and of actors that are nearest to those asked for, on so many devices.

    Separate, the side that keeps less of what it asked for keeps as much as it can. None if nothing fits; a sharded
    base needs two ranks.
    """
    ranks, actors, each = asked.learner.num_ranks, asked.actor.num_actors, asked.actor.tensor_parallel
    separate = asked.cluster.layout == "separate"
    fitting = [
        (r, a)
        for r in range(2 if asked.learner.shard else 1, ranks + 1)
        for a in range(1, actors + 1)
        if (r + a * each if separate else max(r, a)) <= num_devices
    ]
    return max(fitting, key=lambda n: (min(n[0] / ranks, n[1] / actors), n[0] + n[1] * each), default=None)


def can_grow(asked: Plan, now: Config) -> bool:
    """Whether the cluster has room for more of what was asked for than the run has now."""
    has = now.learner.num_ranks, now.actor.num_actors
    if has == (asked.config.learner.num_ranks, asked.config.actor.num_actors):
        return False
    fits = numbers(asked.config, _num_devices(asked))
    return fits is not None and sum(fits) > sum(has)


def resized(asked: Plan, resume_from: Path | None) -> Plan:
    """The plan that was asked for, from a checkpoint on, with as many workers as the cluster now has devices for."""
    fits = numbers(asked.config, num_devices := _num_devices(asked))
    if fits is None:
        raise RunFailed(
            f"{num_devices} devices are left, too few to go on; resume with --run.resume when there are more"
        )
    values = dict(zip(("learner.num_ranks", "actor.num_actors"), fits, strict=True))
    smaller = replace(asked, unfitted=with_values(asked.unfitted, values), resume_from=resume_from)
    return plan.fitted(smaller, devices.here())


def _num_devices(asked: Plan) -> int:
    """That the cluster has now: GPUs if the plan is for them, else processors."""
    return int(ray.cluster_resources().get("GPU" if asked.gpus else "CPU", 0))
