"""What a node lacks is named before any worker starts; two raylets on one machine stand in for two nodes."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.cluster_utils import Cluster

from common.config import Config, with_values
from common.types import UserError
from launch.runtime import nodes
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


def plan(folder: Path, **values: str) -> SimpleNamespace:
    config = with_values(Config(), {name.replace("__", "."): value for name, value in values.items()})
    return SimpleNamespace(config=config, model_folder=folder)


@pytest.mark.usefixtures("_two_nodes")
def test_a_model_or_module_that_a_node_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^node [\d.]+: model\.path=.* has no config\.json; put it at the same path"):
        nodes.check(plan(tmp_path))
    (tmp_path / "config.json").touch()
    nodes.check(plan(tmp_path))
    with pytest.raises(UserError, match=r"module no\.such cannot be imported \(ModuleNotFoundError"):
        nodes.check(plan(tmp_path, task__name="no.such"))
    with pytest.raises(UserError, match=r"module not_there cannot be imported"):
        nodes.check(plan(tmp_path, method__token_weight="not_there.early"))


@pytest.mark.usefixtures("_two_nodes")
def test_workers_are_placed_on_both_nodes_and_divide_each_nodes_processors() -> None:
    config = with_values(Config(), {"learner.num_ranks": 2})
    with placed(config, gpus=False) as places:
        assert [place.share for place in places.learners] == [(0, 1), (0, 1)]
        assert [place.share for place in places.actors] == [(0, 1)]


def test_modules_of_our_own_are_not_asked_for() -> None:
    assert nodes.modules(plan(Path("x"))) == []
    assert nodes.modules(plan(Path("x"), task__name="my.task", method__advantage="a.b.c")) == ["my.task", "a.b"]
