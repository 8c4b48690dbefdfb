"""How long an answer may take, and how many losses end a run, in hand numbers."""

from typing import Any

import pytest
import ray
import torch

from launch.runtime import recovery
from launch.runtime.recovery import FIRST_SECONDS, MAX_LOSSES, SPARE_SECONDS, TIMES, Losses, Patience, RunFailed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time now, and the limits that were given; an answer is the seconds that it takes, or an error."""
    now: list[float] = [100.0]

    def get(seconds: Any, timeout: float) -> Any:
        now.append(timeout)
        if isinstance(seconds, Exception):
            raise seconds
        if seconds > timeout:
            raise ray.exceptions.GetTimeoutError
        now[0] += seconds
        return seconds

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(recovery.time, "perf_counter", lambda: now[0])
    return now


def test_the_limit_follows_from_the_slowest_answer_and_from_the_slowest_unit(clock: list[float]) -> None:
    patience = Patience("")
    patience.get(6.0, 3)  # 2 s for each of three
    patience.get(8.0, 8)  # may take 5 x 8 x 2 s
    patience.get(1.0, 1)  # as long as the slowest answer: it decodes as many steps
    patience.get(1.0, 64)  # as long as 64 of the slowest units
    patience.get(1.0, 1, more_seconds=80.0)
    assert clock[1:] == [
        FIRST_SECONDS,
        TIMES * 16 + SPARE_SECONDS,
        TIMES * 8 + SPARE_SECONDS,
        TIMES * 128 + SPARE_SECONDS,
        TIMES * 8 + SPARE_SECONDS + 80,
    ]


def test_an_answer_without_work_teaches_nothing_and_a_time_out_doubles_the_limit(clock: list[float]) -> None:
    patience = Patience("")
    patience.get(0.001, counts=lambda answer: False)
    patience.get(10.0)
    for _ in range(3):
        with pytest.raises(ray.exceptions.GetTimeoutError):
            patience.get(1e9)
    assert clock[1:3] == [FIRST_SECONDS, FIRST_SECONDS]
    first = TIMES * 10 + SPARE_SECONDS
    assert clock[3:] == [first, 2 * first + SPARE_SECONDS, 2 * (2 * first + SPARE_SECONDS) + SPARE_SECONDS]


def test_a_full_gpu_names_its_remedy(clock: list[float]) -> None:
    with pytest.raises(RunFailed, match=r"a GPU is full \(tried to allocate 3 GiB\); lower something"):
        Patience("lower something").get(torch.OutOfMemoryError("Traceback\ntried to allocate 3 GiB"))


def test_a_node_takes_many_workers_along_and_each_has_its_own_count() -> None:
    losses = Losses(lambda text: None)
    losses.started = True
    for index in range(2 * MAX_LOSSES):
        losses.replace("actor", f"actor {index}", ray.exceptions.ActorDiedError(), lambda: None)
    assert losses.metrics()["recovery/actor"] == 2 * MAX_LOSSES
    for _ in range(MAX_LOSSES - 1):
        losses.replace("actor", "actor 3", ray.exceptions.ActorDiedError(), lambda: None)
    with pytest.raises(RunFailed, match=r"the last: actor 3 \(ActorDiedError\)"):
        losses.replace("actor", "actor 3", ray.exceptions.ActorDiedError(), lambda: None)
    losses.committed()
    losses.replace("actor", "actor 3", ray.exceptions.ActorDiedError(), lambda: None)
