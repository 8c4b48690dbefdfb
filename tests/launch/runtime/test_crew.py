"""The learner ranks as one: how checkpoints travel, and what is done again after a loss."""

from collections.abc import Callable
from pathlib import Path

import local_actor
import numpy as np
import pytest
import ray
import torch
from local_actor import Lazy

from launch.runtime.crew import Crew
from launch.runtime.recovery import MAX_LOSSES, Losses, RunFailed
from learner.ranks import PeerLost


class Learned(str):
    """Stands in for the result of an update that had groups to learn from."""

    tokens = ("some",)


class Rank:
    """Stands in for a learner whose state is the list of the groups that it has learned from."""

    def __init__(self, dies: Callable[[str], bool] = lambda call: False) -> None:
        self.dies = dies  # asked before each call
        self.state: list[str] = []

    def open(self) -> tuple[str, int]:
        return "here", 1

    def join(self, address: str, port: int) -> None:
        assert (address, port) == ("here", 1)

    def update(self, groups: str) -> str:
        self._call("update")
        self.state.append(groups)
        return Learned(f"learned {'+'.join(self.state)}")

    def files(self) -> dict[str, np.ndarray]:
        self._call("files")
        return {"state": np.frombuffer("+".join(self.state).encode(), np.uint8)}

    def load_files(self, files: dict[str, np.ndarray]) -> None:
        self._call("load_files")
        text = files["state"].tobytes().decode()
        self.state = text.split("+") if text else []

    def adapter(self, canary: bool) -> str:
        self._call("adapter")
        return f"adapter of {'+'.join(self.state)}"

    def checksum(self, canary: bool) -> str:
        return self.adapter(canary)

    def _call(self, name: str) -> None:
        if self.dies(name):
            raise ray.exceptions.ActorDiedError


@pytest.fixture(autouse=True)
def _references(monkeypatch: pytest.MonkeyPatch) -> None:
    local_actor.install_lazy(monkeypatch)


def crew(*ranks: Rank, started: bool = True) -> tuple[Crew, Losses, list[str]]:
    """One of a single rank, whose replacements are the others in this order; and the lines that it prints."""
    lines: list[str] = []
    losses, following = Losses(lines.append), iter(ranks)
    losses.started = started
    return Crew([lambda: Lazy(next(following))], losses), losses, lines


def nth(name: str, number: int) -> Callable[[str], bool]:
    """True at the call of this name and number, from 0."""
    calls: list[str] = []

    def dies(call: str) -> bool:
        calls.append(call)
        return call == name and calls.count(name) == number + 1

    return dies


@pytest.mark.parametrize(
    ("call", "number"),
    [("update", 0), ("update", 1), ("update", 2), ("files", 0), ("files", 1), ("adapter", 0), ("adapter", 2)],
)
def test_each_step_is_learned_once_whenever_the_rank_is_lost(call: str, number: int) -> None:
    made, losses, lines = crew(Rank(nth(call, number)), Rank())
    for step, groups in enumerate("abc"):
        learned = "+".join("abc"[: step + 1])
        assert made.update(groups) == f"learned {learned}"  # type: ignore[comparison-overlap, arg-type]
        assert made.adapter(True) == (f"adapter of {learned}", [])
        made.commit()
    assert made.ranks[0].target.state == ["a", "b", "c"]
    assert (len(lines), "the learner was lost (ActorDiedError); replaced in" in lines[0]) == (1, True)
    assert losses.metrics() == {
        "recovery/learner": 1.0,
        "recovery/actor": 0.0,
        "recovery/seconds": pytest.approx(0, abs=1),
    }
    assert losses.metrics()["recovery/learner"] == 0


def test_a_replacement_may_be_lost_too() -> None:
    made, losses, _ = crew(Rank(nth("update", 1)), Rank(nth("load_files", 0)), Rank(nth("update", 0)), Rank())
    made.update("a")  # type: ignore[arg-type]
    made.commit()
    assert made.update("b") == "learned a+b"  # type: ignore[comparison-overlap, arg-type]
    assert losses.metrics()["recovery/learner"] == 3


def test_losses_without_a_step_between_them_end_the_run() -> None:
    made, _, _ = crew(*(Rank(nth("update", 0)) for _ in range(MAX_LOSSES + 1)))
    with pytest.raises(RunFailed, match=rf"{MAX_LOSSES} losses without a step.*the learner \(ActorDiedError\)"):
        made.update("a")  # type: ignore[arg-type]


def test_a_committed_step_is_a_new_beginning() -> None:
    made, _, _ = crew(*(Rank(nth("update", 1)) for _ in range(2 * MAX_LOSSES)))
    for _ in range(2 * MAX_LOSSES):
        made.update("a")  # type: ignore[arg-type]
        made.commit()


def test_what_fails_to_start_is_not_started_again() -> None:
    made, _, lines = crew(Rank(nth("update", 0)), Rank(), started=False)
    with pytest.raises(ray.exceptions.ActorDiedError):
        made.update("a")  # type: ignore[arg-type]
    assert lines == []


def test_an_error_that_only_follows_from_a_loss_is_one() -> None:
    """The first rank's sum fails because the second is gone; without that the error is the run's."""

    class Broken(Rank):
        def update(self, groups: str) -> str:
            raise ray.exceptions.RayTaskError("update", "connection closed", RuntimeError("connection closed"))

    ranks = iter([Broken(), Rank(nth("update", 0)), Rank(), Rank()])
    losses = Losses(lambda text: None)
    losses.started = True
    made = Crew([lambda: Lazy(next(ranks))] * 2, losses)
    assert made.update("a") == "learned a"  # type: ignore[comparison-overlap, arg-type]
    ranks = iter([Broken(), Rank()])
    with pytest.raises(ray.exceptions.RayTaskError):
        Crew([lambda: Lazy(next(ranks))] * 2, losses).update("a")  # type: ignore[arg-type]


def test_the_cause_is_told_and_not_that_another_ranks_sum_failed() -> None:
    """Rank 1 is out of memory and leaves; rank 0's sum fails first."""

    class Waits(Rank):
        def update(self, groups: str) -> str:
            raise PeerLost("rank 0: connection closed")

    class Full(Rank):
        def update(self, groups: str) -> str:
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    ranks = iter([Waits(), Full()])
    losses = Losses(lambda text: pytest.fail(text))
    losses.started = True
    with pytest.raises(RunFailed, match=r"a GPU is full .*; lower learner\.micro_batch_tokens"):
        Crew([lambda: Lazy(next(ranks))] * 2, losses).update("a")  # type: ignore[arg-type]


def test_the_committed_state_is_saved_and_every_rank_loads_it(tmp_path: Path) -> None:
    made, _, _ = crew(Rank())
    made.update("a")  # type: ignore[arg-type]
    made.commit(step=1, prompt_cursor=4)
    made.update("b")  # type: ignore[arg-type]
    made.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "state": b"a",
        "run_state.json": b'{"step": 1, "prompt_cursor": 4}',
    }
    ranks = iter([Rank(), Rank()])
    two = Crew([lambda: Lazy(next(ranks))] * 2, Losses())
    two.load(tmp_path)
    assert [rank.target.state for rank in two.ranks] == [["a"], ["a"]]
