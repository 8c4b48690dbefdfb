"""What a cell takes of the cluster, and which processors of its machine."""

import os
import threading
import time

import pytest

from common.types import UserError
from launch.experiments import cell
from launch.experiments.cell import processors, share

ALL = sorted(os.sched_getaffinity(0))
TWO = pytest.mark.skipif(len(ALL) < 2, reason="needs two processors")


def node(**resources: float) -> dict:
    return {"Alive": True, "Resources": resources}


def test_a_cell_takes_a_gpu_or_a_whole_machine() -> None:
    assert share([node(CPU=2.0)], None) == {"num_cpus": 2}
    assert share([node(CPU=2.0), node(CPU=16.0)], None) == {"num_cpus": 16}
    assert share([node(CPU=2.0), node(CPU=16.0, GPU=4.0)], None) == {"num_gpus": 1, "num_cpus": 0}
    gone = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 1.0}}
    assert share([node(CPU=2.0), gone], None) == {"num_cpus": 2}


def test_or_as_many_cores_as_it_is_given() -> None:
    assert share([node(CPU=2.0), node(CPU=16.0)], 4) == {"num_cpus": 4}
    assert share([node(CPU=2.0)], 2) == {"num_cpus": 2}


@pytest.mark.parametrize("cores", [0, 3])
def test_cores_that_no_machine_has_are_refused(cores: int) -> None:
    with pytest.raises(UserError, match=f"--cores {cores} is not from 1 to 2"):
        share([node(CPU=1.0), node(CPU=2.0)], cores)


def test_cores_where_gpus_are_shared_out_are_refused() -> None:
    with pytest.raises(UserError, match="--cores 1: this cluster has GPUs"):
        share([node(CPU=16.0), node(CPU=2.0, GPU=1.0)], 1)


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid may be at work on this machine."""
    monkeypatch.setattr(cell, "HELD", f"\0test-{os.getpid()}-")


@TWO
def test_processors_are_held_by_one_at_a_time() -> None:
    with processors(1) as one, processors(1) as other:
        assert len(one) == len(other) == 1
        assert set(one) | set(other) <= set(ALL) and one != other
    with processors(len(ALL)) as everything:
        assert everything == ALL


def test_one_who_finds_none_free_waits() -> None:
    got: list[float] = []

    def late() -> None:
        with processors(len(ALL)):
            got.append(time.monotonic())

    thread = threading.Thread(target=late)
    with processors(1):
        thread.start()
        time.sleep(0.3)
        assert not got
        freed = time.monotonic()
    thread.join(10)
    assert got and got[0] >= freed


def test_more_processors_than_there_are_is_no_long_wait() -> None:
    with (
        pytest.raises(UserError, match=f"--cores {len(ALL) + 1} is more than the {len(ALL)}"),
        processors(len(ALL) + 1),
    ):
        pytest.fail("it cannot have them")


def test_all_processors_are_nobodys_to_hold() -> None:
    """Without --cores a cell has its machine by Ray's own count."""
    with processors(None) as one, processors(None) as other:
        assert one == other == ALL
