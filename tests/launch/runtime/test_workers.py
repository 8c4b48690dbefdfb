"""Which GPU and processors a worker gets, on a Ray that is told of three GPUs; and which starts are refused."""

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch

from common.config import Config, with_values
from common.types import UserError
from launch.planning.devices import Gpu
from launch.runtime import placement, workers
from launch.runtime.placement import Place, Places, placed
from launch.runtime.recovery import NotStarted
from launch.runtime.resize import Resized
from launch.runtime.workers import part
from learner.ranks import Ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, num_gpus=3, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


class Side:
    """Stands in for an actor and for a learner: it says which GPU Ray gave it, and which processors it keeps to."""

    def __init__(self, *arguments: object, ranks: Any = None) -> None:
        self.ranks = ranks

    def seen(self) -> tuple[list[str], list[int]]:
        return ray.get_runtime_context().get_accelerator_ids()["GPU"], sorted(os.sched_getaffinity(0))

    def sum(self) -> float:
        values = torch.full((3,), float(self.ranks.rank + 1))
        self.ranks._sum(values)
        return values.mean().item()

    def meet(self, own_address: str, address: str, port: int) -> None:
        self.ranks.join(own_address, address, port)

    def close(self) -> None:
        pass


class Unverified:
    """Stands in for the channel, which would compare log-probabilities."""

    def __init__(self, actors: object, **options: object) -> None:
        pass

    def verify(self, learner: object) -> SimpleNamespace:
        return SimpleNamespace(version=0)


def options(**values: Any) -> Config:
    return with_values(Config(), {name.replace("__", "."): value for name, value in values.items()})


def started(
    monkeypatch: pytest.MonkeyPatch, config: Config, *, gpus: bool, body: Exception | None = None
) -> tuple[list[Any], list[Any], list[float]]:
    """What the actors and the learner ranks see, and what the ranks make of a sum over them; or `body` is raised."""
    monkeypatch.setattr(workers, "Actor", Side)
    monkeypatch.setattr(workers, "Channel", Unverified)
    seen = (Gpu(name="a GPU", capability=(8, 0), total_bytes=1),) * 3 if gpus else ()
    plan = SimpleNamespace(config=config, gpus=seen, model_folder=None, canary_token_ids=None, resume_from=None)
    plan.refuse_absent_gpu = lambda: None
    with workers.start(plan, learner_class=Side) as made:
        if body is not None:
            raise body
        sides = made.fleet.actors, made.learner.ranks
        assert all(repr(worker).startswith("Actor(Side, ") for side in sides for worker in side)
        actors, learners = (ray.get([each.seen.remote() for each in side], timeout=60) for side in sides)
        sums = ray.get([rank.sum.remote() for rank in made.learner.ranks], timeout=60) if len(learners) > 1 else []
    return actors, learners, sums


def gpus(workers: list[Any]) -> list[str]:
    return [gpu for seen, _ in workers for gpu in seen]


@pytest.mark.parametrize(("ranks", "actors"), [(1, 2), (2, 1), (3, 3)])
def test_colocated_workers_share_a_gpu_in_pairs(monkeypatch: pytest.MonkeyPatch, ranks: int, actors: int) -> None:
    config = options(learner__num_ranks=ranks, actor__num_actors=actors)
    seen_actors, seen_ranks, sums = started(monkeypatch, config, gpus=True)
    assert len(set(gpus(seen_actors))) == actors
    assert len(set(gpus(seen_ranks))) == ranks
    both = min(ranks, actors)
    assert gpus(seen_actors)[:both] == gpus(seen_ranks)[:both]
    assert sums == ([] if ranks == 1 else [sum(range(1, ranks + 1))] * ranks)


@pytest.mark.parametrize(("state", "raised"), [("CREATED", NotStarted), ("RESCHEDULING", Resized)])
def test_a_replacement_that_does_not_start_is_a_lost_node_if_a_place_is_gone(
    monkeypatch: pytest.MonkeyPatch, state: str, raised: type[Exception]
) -> None:
    monkeypatch.setattr(placement, "placement_group_table", lambda group: {"state": state})
    places = Places(learners=(Place(options={}),), actors=(Place(options={}),), group=object())  # type: ignore[arg-type]
    monkeypatch.setattr(workers, "placed", lambda config, gpus: contextlib.nullcontext(places))
    with pytest.raises(raised) as caught:
        started(monkeypatch, options(), gpus=False, body=NotStarted("too slow"))
    assert type(caught.value) is raised


def test_separate_workers_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    config = options(learner__num_ranks=2, actor__num_actors=1, cluster__layout="separate")
    seen_actors, seen_ranks, sums = started(monkeypatch, config, gpus=True)
    assert len({*gpus(seen_actors), *gpus(seen_ranks)}) == 3
    assert sums == [3, 3]
    config = options(actor__tensor_parallel=2, cluster__layout="separate")
    [(spread, _)], seen_ranks, _ = started(monkeypatch, config, gpus=True)
    assert (len(spread), len({*spread, *gpus(seen_ranks)})) == (2, 3)


def test_workers_share_out_the_processors_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one kind where both sides take turns, all of them where each has a device of its own."""
    cores = sorted(os.sched_getaffinity(0))
    [actor], ranks, sums = started(monkeypatch, options(learner__num_ranks=2), gpus=False)
    assert actor == ([], cores)
    assert [seen for _, seen in ranks] == [part(cores, 0, 2), part(cores, 1, 2)]
    assert sums == [3, 3]
    [actor], [rank], _ = started(monkeypatch, options(cluster__layout="separate"), gpus=False)
    assert (rank[1], actor[1]) == (part(cores, 0, 2), part(cores, 1, 2))


def test_overlapped_sides_have_half_of_the_processors_each(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = sorted(os.sched_getaffinity(0))
    [actor], [rank], _ = started(monkeypatch, options(run__max_staleness=1), gpus=False)
    assert (actor[1], rank[1]) == (part(cores, 0, 2), part(cores, 1, 2))


def test_parts_of_the_processors() -> None:
    assert [part([3, 4, 5], i, 2) for i in (0, 1)] == [[3], [4, 5]]
    assert [part(range(7), i, 3) for i in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [part([7], i, 2) for i in (0, 1)] == [[7], [7]]
    assert [part([1, 2], i, 4) for i in range(4)] == [[1], [1], [2], [2]]


@pytest.mark.parametrize(("nodes", "address"), [(1, "127.0.0.1"), (2, "127.0.0.2")])
def test_ranks_listen_on_loopback_unless_there_is_another_node(
    monkeypatch: pytest.MonkeyPatch, nodes: int, address: str
) -> None:
    met = []

    class Rank(workers._Worker, Side):
        parts = ()

        def meet(self, *where: Any) -> None:
            met.append(where)

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * nodes + [{"Alive": False}])
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.2")  # stands for an address to the outside
    rank = Rank(ranks=Ranks(0, 2))
    where = rank.open()
    rank.join(*where)
    assert met == [(address, *where)]
    assert where in [each.laddr for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"]
    assert where[0] == address


def test_more_devices_than_the_cluster_has_are_refused_at_once() -> None:
    config = options(learner__num_ranks=4)
    with (
        pytest.raises(UserError, match=r"asks for 4 GPUs \(learner\.num_ranks=4, .*and the Ray cluster has 3 GPUs"),
        placed(config, gpus=True),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"asks for 5 times 1 processors .*, and the Ray cluster has 4 CPUs"),
        placed(options(actor__num_actors=5), gpus=False),
    ):
        pass


def test_devices_that_others_hold_are_waited_for_and_then_named() -> None:
    waiting = options(actor__num_actors=2, cluster__wait_seconds=5.0)
    with (
        placed(options(actor__num_actors=2), gpus=True),
        pytest.raises(UserError, match=r"asks for 2 GPUs .*, and after 5 s 1 of the Ray cluster's 3 GPUs are free"),
        placed(waiting, gpus=True),
    ):
        pass
    with placed(waiting, gpus=True) as places:
        assert len(places.actors) == 2


def test_one_worker_of_each_kind_on_processors_is_not_placed() -> None:
    with placed(Config(), gpus=False) as places:
        assert [place.options for place in (*places.learners, *places.actors)] == [{}, {}]
