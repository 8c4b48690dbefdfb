"""The learner ranks as one learner: each is sent the same groups, and computes its part of the step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from common.types import Group, UpdateResult


class Crew:
    """Handles of learner.learner.Learner as Ray actors; the first is rank 0, which speaks for all."""

    def __init__(self, ranks: Sequence[Any]) -> None:
        self.ranks = list(ranks)

    def meet(self) -> None:
        """Let the ranks find one another; one alone has nobody to meet."""
        if len(self.ranks) > 1:
            where = ray.get(self.ranks[0].open.remote())
            ray.get([rank.join.remote(*where) for rank in self.ranks])

    def update(self, groups: Sequence[Group]) -> UpdateResult:
        """One optimizer step of all ranks."""
        return self.call("update", groups)

    def call(self, method: str, *arguments: Any) -> Any:
        """`method` of every rank with the same arguments, which are sent to each node once; rank 0's result."""
        shared = [ray.put(argument) for argument in arguments]
        return ray.get([getattr(rank, method).remote(*shared) for rank in self.ranks])[0]

    def adapter(self, canary: bool) -> Any:
        """Reference to rank 0's adapter."""
        return self.ranks[0].adapter.remote(canary)

    def probe(self) -> Any:
        """Reference to the random adapter of a verified start, which all ranks make."""
        refs = [rank.probe.remote() for rank in self.ranks]
        return refs[0]

    def checksums(self, canary: bool) -> list[Any]:
        """References to the checksums of the other ranks' adapters; `canary` as for rank 0's."""
        return [rank.checksum.remote(canary) for rank in self.ranks[1:]]

    def save(self, folder: Path) -> None:
        """A checkpoint into the driver's existing `folder`: the ranks' states are equal, and rank 0 sends its own."""
        for name, content in ray.get(self.ranks[0].files.remote()).items():
            (folder / name).write_bytes(content)

    def load(self, folder: Path) -> None:
        """The checkpoint in the driver's `folder`, on every rank."""
        self.call("load_files", {path.name: path.read_bytes() for path in folder.iterdir()})

    def close(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
