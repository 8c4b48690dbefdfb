"""What a node lacks is named before any worker starts; two raylets on one machine stand in for two nodes."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from common.command_line import load
from common.config import Config, with_values
from common.types import UserError
from launch.planning import plan as planning
from launch.planning.devices import Gpu
from launch.planning.memory import GIB
from launch.runtime import nodes
from launch.runtime.cluster import DEFAULT_CONFIG
from launch.runtime.placement import placed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def _two_nodes() -> Iterator[None]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()


def plan(folder: Path, **values: str) -> Any:
    config = with_values(Config(), {name.replace("__", "."): value for name, value in values.items()})
    return SimpleNamespace(config=config, model_folder=folder, gpus=(), refuse_absent_gpu=lambda: None)


@pytest.mark.usefixtures("_two_nodes")
def test_a_model_or_module_that_a_node_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^node [\d.]+: model\.path=.* has no config\.json; put it at the same path"):
        nodes.fitted(plan(tmp_path))
    (tmp_path / "config.json").touch()
    unchanged = plan(tmp_path)
    assert nodes.fitted(unchanged) is unchanged
    with pytest.raises(UserError, match=r"module no\.such cannot be imported \(ModuleNotFoundError"):
        nodes.fitted(plan(tmp_path, task__name="no.such"))
    with pytest.raises(UserError, match=r"module not_there cannot be imported"):
        nodes.fitted(plan(tmp_path, method__token_weight="not_there.early"))


def test_the_plan_is_for_the_smallest_gpu_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's node has none, and what it lacks does not matter: no worker goes there."""
    sizes = iter([[], [40, 24], [80]])
    found = [
        nodes.Found(
            tuple(Gpu(name="a GPU", capability=(8, 0), total_bytes=gib * GIB) for gib in each),
            None if each else "has no model",
        )
        for each in sizes
    ]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "NodeID": "", "NodeManagerAddress": "x"}] * 3)
    monkeypatch.setattr(nodes, "ask", lambda made, alive: found)
    made = planning.make(load(["--task.num_train", "8", "--run.dir", str(tmp_path / "run")], DEFAULT_CONFIG))
    assert made.memory is None
    fitted = nodes.fitted(made)
    assert fitted.memory is not None and fitted.memory.gpu_bytes == 24 * GIB
    assert (fitted.config.model.dtype, fitted.config.actor.kv_cache_gib is None) == ("bfloat16", False)
    assert nodes.fitted(fitted) is fitted
    found[2] = found[2]._replace(problem="has no model")
    with pytest.raises(UserError, match=r"^node x: has no model"):
        nodes.fitted(made)


@pytest.mark.usefixtures("_two_nodes")
def test_workers_are_placed_on_both_nodes_and_divide_each_nodes_processors() -> None:
    config = with_values(Config(), {"learner.num_ranks": 2})
    with placed(config, gpus=False) as places:
        assert [place.share for place in places.learners] == [(0, 1), (0, 1)]
        assert [place.share for place in places.actors] == [(0, 1)]


def test_modules_of_our_own_are_not_asked_for() -> None:
    assert nodes.modules(plan(Path("x"))) == []
    assert nodes.modules(plan(Path("x"), task__name="my.task", method__advantage="a.b.c")) == ["my.task", "a.b"]
    assert nodes.modules(plan(Path("x"), task__name="mine")) == ["mine"]
    rewarded = plan(Path("x"), task__rewards={"correct": 1.0, "a.b.judge": 0.5, "a.b.length": 0.5, "c.rank": 1.0})
    assert nodes.modules(rewarded) == ["a.b", "c"]


class Elsewhere:
    """Stands in for an argument of a class that only the driver can import."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, ("not_there",)


@pytest.mark.usefixtures("_two_nodes")
def test_a_node_that_cannot_import_the_checkout_is_named() -> None:
    made = plan(Path("x"))
    made.config = SimpleNamespace(**vars(made.config), more=Elsewhere())
    with pytest.raises(UserError) as error:
        nodes.fitted(made)
    assert re.fullmatch(
        r"node [\d.]+: this checkout cannot be imported \(ModuleNotFoundError: No module named 'not_there'\); put it.*",
        str(error.value),
    )
