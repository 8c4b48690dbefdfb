"""Which GPU and processors a worker gets, on a Ray that is configured with two GPUs; and which starts are refused."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray
import torch

from common.config import ActorConfig, Config, RunConfig
from common.types import UserError
from launch.runtime import workers
from launch.runtime.workers import placed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _two_gpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, num_gpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


class Side:
    """Stands in for an actor and for a learner: it says which GPU Ray gave it, and which processors it keeps to."""

    def __init__(self, *arguments: object) -> None:
        pass

    def gpus(self) -> list[str]:
        return ray.get_runtime_context().get_accelerator_ids()["GPU"]

    def processors(self) -> list[int]:
        return workers.cores()

    def close(self) -> None:
        pass


class Unverified:
    """Stands in for the channel, which would compare log-probabilities."""

    def __init__(self, actors: object, **options: object) -> None:
        pass

    def verify(self, learner: object) -> SimpleNamespace:
        return SimpleNamespace(version=0)


def test_the_learner_shares_the_first_actors_gpu_and_each_further_actor_has_its_own(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(workers, "Actor", Side)
    monkeypatch.setattr(workers, "Channel", Unverified)
    config = Config(actor=ActorConfig(num_actors=2))
    plan = SimpleNamespace(config=config, model_folder=None, canary_token_ids=None, resume_from=None)
    with workers.start(plan, learner_class=Side) as started:
        first, second, learners = ray.get(
            [side.gpus.remote() for side in (*started.actors, started.learner)], timeout=60
        )
    assert first == learners != second


def test_overlapped_sides_have_half_of_the_processors_each_and_keep_their_names(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(workers, "Actor", Side)
    monkeypatch.setattr(workers, "Channel", Unverified)
    config = Config(run=RunConfig(max_staleness=1))
    plan = SimpleNamespace(config=config, model_folder=None, canary_token_ids=None, resume_from=None)
    with workers.start(plan, learner_class=Side) as started:
        sides = [*started.actors, started.learner]
        kept = ray.get([side.processors.remote() for side in sides], timeout=60)
        assert all(repr(side).startswith("Actor(Side, ") for side in sides)
    assert kept == [workers.half(workers.cores(), first=first) for first in (True, False)]


def test_more_gpus_than_the_cluster_has_are_refused_at_once() -> None:
    with (
        pytest.raises(UserError, match=r"asks for 3 GPUs .*, and the Ray cluster has 2; start Ray with --num-gpus=3"),
        placed(3),
    ):
        pass


def test_gpus_that_others_hold_are_waited_for_and_then_named() -> None:
    with (
        placed(1),
        pytest.raises(UserError, match=r"asks for 2 GPUs, and after 1 s 1 of the Ray cluster's 2 are free"),
        placed(2, wait_seconds=1),
    ):
        pass
    with placed(2, wait_seconds=30) as places:
        assert len(places) == 2


def test_a_processor_is_not_placed() -> None:
    with placed(0) as places:
        assert places == []
