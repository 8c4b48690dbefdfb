"""Where learners and actors go: a placement group with one bundle per device, on any node of the Ray cluster.

A device is a GPU, or on a cluster without one a share of the processors. Colocated, learner i and actor i share bundle
i and take turns on its device; on processors, the workers of one kind share out those of their node. Separate, the
first bundles are the learners'.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config import Config
from common.types import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one worker goes, and the part of its node's processors that it takes."""

    options: dict[str, Any]  # of Ray's .options()
    share: tuple[int, int] = (0, 1)  # number of this part, number of parts of the node


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """One place for each learner rank and each actor."""

    learners: tuple[Place, ...]
    actors: tuple[Place, ...]


@contextlib.contextmanager
def placed(config: Config, *, gpus: bool) -> Iterator[Places]:
    """Places for the run's workers, held for the length of the block.

    Raises UserError, with what is asked for and what there is: at once for more devices than the cluster has, and after
    `cluster.wait_seconds` if others hold them.
    """
    num_learners, num_actors = config.learner.num_ranks, config.actor.num_actors
    number = num_bundles(config)
    if number == 1 and not gpus:
        yield Places(learners=(Place(options={}),), actors=(Place(options={}),))
        return
    bundle = {"GPU": 1.0} if gpus else {"CPU": float(max(1, int(_total("CPU") // number)))}
    first_actor = num_learners if config.cluster.layout == "separate" else 0
    learners, actors = range(num_learners), range(first_actor, first_actor + num_actors)
    with _group(bundle, number, config) as group:
        strategies = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(number)]
        nodes = placement_group_table(group)["bundles_to_node_id"]

        def places(side: range) -> tuple[Place, ...]:
            at_once = range(number) if config.cluster.layout == "separate" else side
            shares = {i: (0, 1) if gpus else _share(i, at_once, nodes) for i in side}
            return tuple(Place(options={"scheduling_strategy": strategies[i]}, share=shares[i]) for i in side)

        yield Places(learners=places(learners), actors=places(actors))


def num_bundles(config: Config) -> int:
    """Devices that the run takes."""
    num_learners, num_actors = config.learner.num_ranks, config.actor.num_actors
    return num_learners + num_actors if config.cluster.layout == "separate" else max(num_learners, num_actors)


@contextlib.contextmanager
def _group(bundle: dict[str, float], number: int, config: Config) -> Iterator[PlacementGroup]:
    [(kind, each)] = bundle.items()
    asked = (
        f"the run asks for {number} {'GPUs' if kind == 'GPU' else f'times {each:g} processors'} "
        f"(learner.num_ranks={config.learner.num_ranks}, actor.num_actors={config.actor.num_actors}, "
        f"cluster.layout={config.cluster.layout})"
    )
    total = _total(kind)
    if total < number * each:
        raise UserError(f"{asked}, and the Ray cluster has {total:g} {kind}s; add nodes, or lower one of the numbers")
    group = placement_group([bundle] * number)
    try:
        if not group.wait(config.cluster.wait_seconds):
            free = ray.available_resources().get(kind, 0)
            raise UserError(
                f"{asked}, and after {config.cluster.wait_seconds:g} s {free:g} of the Ray cluster's {total:g} {kind}s "
                "are free; wait for its other jobs (`ray status` shows them), or lower one of the numbers"
            )
        yield group
    finally:
        remove_placement_group(group)


def _total(kind: str) -> float:
    return ray.cluster_resources().get(kind, 0)


def _share(index: int, bundles: Sequence[int], nodes: Mapping[int, str]) -> tuple[int, int]:
    """Which part of its node's processors bundle `index` has among `bundles`, and the number of parts."""
    beside = [i for i in bundles if nodes[i] == nodes[index]]
    return beside.index(index), len(beside)
