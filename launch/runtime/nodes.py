"""The nodes of the Ray cluster: their GPUs, which the run is planned for, and what each of them must have."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actor.tasks import TASKS
from common.config import Config
from common.types import UserError
from launch.planning import devices, plan
from launch.planning.devices import Gpu
from launch.planning.plan import Plan

REMEDY = "put it at the same path on every node, or start with `ray job submit --working-dir FOLDER`"


class Found(NamedTuple):
    """What one node says of itself."""

    gpus: tuple[Gpu, ...]
    problem: str | None  # why the run cannot work there


def fitted(made: Plan) -> Plan:
    """The plan for the GPUs of the cluster's nodes.

    Raises UserError, which names the node, for what one of them lacks (the model folder, a user's own modules), and for
    a GPU's plan if no node has one. A single node is the driver's own, where the plan has looked.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) > 1:
        found = ask(made, alive)
        gpus = [gpu for each in found for gpu in each.gpus]
        for node, each in zip(alive, found, strict=True):
            if each.problem and (each.gpus or not gpus):  # workers are placed on GPUs if there are any
                raise UserError(f"node {node['NodeManagerAddress']}: {each.problem}")
        if sorted(gpus) != sorted(made.gpus):
            made = plan.fitted(made, gpus)
    made.refuse_absent_gpu()
    return made


def ask(made: Plan, alive: Sequence[Mapping[str, Any]]) -> list[Found]:
    """What each of the nodes says of itself. Raises UserError for one that cannot import what it is asked with."""
    refs = []
    for node in alive:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(inspect).options(num_cpus=0, scheduling_strategy=there)
        refs.append(task.remote(made.config, made.model_folder, modules(made)))
    found: list[Found] = []
    for node, ref in zip(alive, refs, strict=True):
        try:
            found.append(ray.get(ref))
        except ray.exceptions.RayTaskError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"node {node['NodeManagerAddress']}: this checkout cannot be imported ({reason}); {REMEDY}"
            ) from None
    return found


def modules(plan: Plan) -> list[str]:
    """Modules outside the repository that the run imports: a task, and functions of rewards and of a method."""
    task, method = plan.config.task.name, plan.config.method
    paths = (*plan.config.task.rewards, method.advantage, method.token_weight)
    functions = dict.fromkeys(path.rpartition(".")[0] for path in paths)
    return [name for name in ("" if task in TASKS else task, *functions) if name]


def inspect(config: Config, model_folder: Path, names: Sequence[str]) -> Found:
    """What this node has, and the first thing that it lacks."""
    gpus = devices.here()
    problem = next(plan.machine_problems(config), None) if gpus else None
    return Found(gpus, problem or missing(model_folder, names))


def missing(model_folder: Path, names: Sequence[str]) -> str | None:
    """What this machine lacks, in a few words, or None."""
    if not (model_folder / "config.json").is_file():
        return f"model.path={model_folder} has no config.json; {REMEDY}"
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 (a user's module may raise anything)
            return f"module {name} cannot be imported ({type(error).__name__}: {error}); {REMEDY}"
    return None
