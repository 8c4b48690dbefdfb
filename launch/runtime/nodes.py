"""What every node of the Ray cluster must have: the model folder, and a user's own modules."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.types import UserError
from launch.planning.plan import Plan

REMEDY = "put it at the same path on every node, or start with `ray job submit --working-dir FOLDER`"


def check(plan: Plan) -> None:
    """Raise UserError, which names the node, for a model or module that one of the cluster's nodes lacks.

    A single node is the driver's own, where the plan has looked.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return
    task = ray.remote(missing)
    found = []
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options = task.options(num_cpus=0, scheduling_strategy=there)
        found.append(options.remote(plan.model_folder, modules(plan)))
    for node, problem in zip(nodes, ray.get(found), strict=True):
        if problem:
            raise UserError(f"node {node['NodeManagerAddress']}: {problem}; {REMEDY}")


def modules(plan: Plan) -> list[str]:
    """Modules outside the repository that the run imports: a task, and functions of a method."""
    method = plan.config.method
    functions = [path.rpartition(".")[0] for path in (method.advantage, method.token_weight)]
    return [name for name in (plan.config.task.name if "." in plan.config.task.name else "", *functions) if name]


def missing(model_folder: Path, names: Sequence[str]) -> str | None:
    """What this machine lacks, in a few words, or None."""
    if not (model_folder / "config.json").is_file():
        return f"model.path={model_folder} has no config.json"
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 (a user's module may raise anything)
            return f"module {name} cannot be imported ({type(error).__name__}: {error})"
    return None
