"""A checkpoint travels between the driver's disk and the ranks, which may have none in common."""

from pathlib import Path

import pytest
import ray
from local_actor import Local

from launch.runtime.crew import Crew


class Rank:
    """Stands in for a learner whose state is a few files."""

    def __init__(self, **state: bytes) -> None:
        self.state = state

    def files(self) -> dict[str, bytes]:
        return self.state

    def load_files(self, files: dict[str, bytes]) -> None:
        self.state = dict(files)


def test_rank_0_is_saved_and_every_rank_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda references: references)
    monkeypatch.setattr(ray, "put", lambda value: value)
    Crew([Local(Rank(adapter=b"1", state=b"2")), Local(Rank(other=b"3"))]).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"adapter": b"1", "state": b"2"}
    ranks = [Rank(), Rank()]
    Crew([Local(rank) for rank in ranks]).load(tmp_path)
    assert [rank.state for rank in ranks] == [{"adapter": b"1", "state": b"2"}] * 2
