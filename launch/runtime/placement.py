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
    group: PlacementGroup | None = None  # None: one device, on the driver's node

    def complete(self) -> bool:
        """Whether the nodes of all places are there."""
        return self.group is None or placement_group_table(self.group)["state"] == "CREATED"


@contextlib.contextmanager
def placed(config: Config, *, gpus: bool) -> Iterator[Places]:
    """Places for the run's workers, held for the length of the block.

    Raises UserError, with what is asked for and what there is: at once for more devices than the cluster has, and after
    `cluster.wait_seconds` if others hold them.
    """
    num_learners, num_actors = config.learner.num_ranks, config.actor.num_actors
    devices = devices_by_bundle(config)
    if devices == [1] and not gpus:
        yield Places(learners=(Place(options={}),), actors=(Place(options={}),))
        return
    kind, each = ("GPU", 1) if gpus else ("CPU", max(1, int(_total("CPU") // sum(devices))))
    separate = config.cluster.layout == "separate"
    first_actor = num_learners if separate else 0
    learners, actors = range(num_learners), range(first_actor, first_actor + num_actors)
    with _group([{kind: float(number * each)} for number in devices], config) as group:
        nodes = placement_group_table(group)["bundles_to_node_id"]

        def place(i: int, side: range) -> Place:
            there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
            if not gpus:
                at_once = range(len(devices)) if separate else side
                return Place(options={"scheduling_strategy": there}, share=_share(i, at_once, nodes))
            num_gpus = devices[i] if separate else 0.5  # half: two workers share it; a fraction reserves no memory
            return Place(options={"scheduling_strategy": there, "num_gpus": num_gpus})

        yield Places(
            learners=tuple(place(i, learners) for i in learners),
            actors=tuple(place(i, actors) for i in actors),
            group=group,
        )


def devices_by_bundle(config: Config) -> list[int]:
    """Number of devices in each bundle of the placement group."""
    num_learners, num_actors = config.learner.num_ranks, config.actor.num_actors
    if config.cluster.layout == "separate":
        return [1] * num_learners + [config.actor.tensor_parallel] * num_actors
    return [1] * max(num_learners, num_actors)


@contextlib.contextmanager
def _group(bundles: list[dict[str, float]], config: Config) -> Iterator[PlacementGroup]:
    [kind] = bundles[0]
    each, needed = bundles[0][kind], sum(bundle[kind] for bundle in bundles)  # the first one is of one device
    asked = (
        f"the run asks for {needed / each:g} {'GPUs' if kind == 'GPU' else f'times {each:g} processors'} "
        f"(learner.num_ranks={config.learner.num_ranks}, actor.num_actors={config.actor.num_actors}, "
        f"actor.tensor_parallel={config.actor.tensor_parallel}, cluster.layout={config.cluster.layout})"
    )
    total = _total(kind)
    if total < needed:
        raise UserError(f"{asked}, and the Ray cluster has {total:g} {kind}s; add nodes, or lower one of the numbers")
    group = placement_group(bundles)
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
