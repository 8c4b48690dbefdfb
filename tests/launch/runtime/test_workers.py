"""Which GPU a worker gets, on a Ray that is told of two GPUs; and what is said where there are too few."""

from collections.abc import Iterator

import pytest
import ray

from common.types import UserError
from launch.runtime.workers import placed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _two_gpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, num_gpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


@ray.remote(num_cpus=0, num_gpus=0.5)
class Worker:
    def gpus(self) -> list[str]:
        return ray.get_runtime_context().get_accelerator_ids()["GPU"]


def test_the_learner_shares_the_first_actors_gpu_and_each_further_actor_has_its_own() -> None:
    with placed(2) as places:
        actors = [Worker.options(**place).remote() for place in places]
        learner = Worker.options(**places[0]).remote()
        first, second, learners = ray.get([worker.gpus.remote() for worker in (*actors, learner)])
        assert first == learners != second
        for worker in (*actors, learner):
            ray.kill(worker)


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
