"""The learner ranks as one learner: each is sent the same groups, and computes its part of the step."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from common.types import Group, UpdateResult
from launch.runtime.recovery import LOST, Losses, Patience, full
from learner.ranks import PeerLost

REMEDY = "lower learner.micro_batch_tokens, or set learner.recompute=micro-batch"
PEER_SECONDS = 10.0  # in which Ray has noticed that a process is gone whose peer's sum has failed


class Crew:
    """learner.learner.Learner as Ray actors, one for each of `makers`; the first is rank 0, which speaks for all.

    If a rank is lost, all are replaced, restored to the last committed step, and take the later steps again with the
    same groups. All that a rank computes follows from its state and the groups, so these steps come out equal.
    """

    def __init__(self, makers: Sequence[Callable[[], Any]], losses: Losses) -> None:
        self.makers = list(makers)
        self.losses = losses
        self.ranks: list[Any] = []
        self._patience: dict[str, Patience] = {}  # by method
        self._state: dict[str, np.ndarray] | None = None  # a checkpoint's files, of the last committed step
        self.position: dict[str, int] = {}  # of the run at that step; empty before the first one
        self._later: list[Sequence[Group]] = []  # the groups of the steps after it
        self._snapshot: Any = None  # reference to the files of the step that is not committed
        self._begin()

    def update(self, groups: Sequence[Group]) -> UpdateResult:
        """One optimizer step of all ranks."""
        result: UpdateResult = self._kept(lambda: self.call("update", groups))
        self._later.append(groups)
        self._snapshot = None
        return result

    def commit(self, run_files: Mapping[str, np.ndarray] | None = None, **position: int) -> None:
        """Keep the state here, in the driver, with the run's position: no later loss goes back behind this step.

        `run_files` are the bytes of further files of a checkpoint.
        """
        [files] = self._kept(lambda: self._get("files", [self._snapshot or self.ranks[0].files.remote()]))
        copies = {name: np.array(content) for name, content in files.items()}  # a copy frees the object store
        self._state, self.position = {**copies, **(run_files or {})}, position
        self._later.clear()
        self._snapshot = None
        self.losses.committed()

    def adapter(self, canary: bool) -> tuple[Any, list[str]]:
        """Rank 0's adapter (common.adapter.Adapter), and the checksums of the other ranks' adapters.

        The files that `commit` waits for are made next, while the actors load the adapter.
        """

        def ask() -> tuple[Any, list[str]]:
            first = self.ranks[0].adapter.remote(canary)
            others = [rank.checksum.remote(canary) for rank in self.ranks[1:]]
            self._snapshot = self.ranks[0].files.remote()
            adapter, *checksums = self._get("adapter", [first, *others])
            return adapter, checksums

        answer: tuple[Any, list[str]] = self._kept(ask)
        return answer

    def probe(self) -> Any:
        """The random adapter of a verified start, which all ranks make."""
        return self._kept(lambda: self.call("probe"))

    def call(self, method: str, *arguments: Any) -> Any:
        """`method` of every rank with the same arguments, which are sent to each node once; rank 0's result."""
        shared = [ray.put(argument) for argument in arguments]
        return self._get(method, [getattr(rank, method).remote(*shared) for rank in self.ranks])[0]

    def save(self, folder: Path) -> None:
        """A checkpoint of the last committed step into the driver's existing `folder`."""
        assert self._state is not None, "commit first"
        for name, content in self._state.items():
            (folder / name).write_bytes(content.data)
        (folder / "run_state.json").write_text(json.dumps(self.position))

    def load(self, folder: Path) -> None:
        """The checkpoint in the driver's `folder`, on every rank."""
        self._state = {path.name: np.fromfile(path, np.uint8) for path in folder.iterdir()}
        self.call("load_files", self._state)

    def close(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)

    def _begin(self) -> None:
        """Start the ranks, and let them find one another; one alone has nobody to meet."""
        self.ranks = [make() for make in self.makers]
        if self.losses.started:
            self.losses.await_start(self.ranks)
        if len(self.ranks) > 1:
            where = self._get("open", self.ranks[0].open.remote())
            self.call("join", *where)

    def _kept(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, which is repeated after a loss."""
        while True:
            try:
                return call()
            except LOST as error:
                self.losses.replace("learner", "the learner", error, self._replace)

    def _replace(self) -> None:
        self.close()
        self._snapshot = None
        self._begin()
        if self._state is not None:
            self.call("load_files", self._state)
        for groups in self._later:
            self.call("update", groups)

    def _get(self, method: str, refs: Sequence[Any]) -> list[Any]:
        """The answers of the ranks. An error of one may only follow from that of another, which is then raised."""
        try:
            patience = self._patience.setdefault(method, Patience(REMEDY))
            answers: list[Any] = patience.get(refs, counts=lambda answers: method != "update" or _learned(answers[0]))
            return answers
        except (ray.exceptions.RayTaskError, PeerLost):
            errors = [error for error in map(_error, refs) if error is not None]
            for error in errors:
                if isinstance(error, ray.exceptions.RayActorError):
                    raise error from None
                if isinstance(error, torch.OutOfMemoryError):
                    raise full(error, REMEDY) from None
            raise next((error for error in errors if not isinstance(error, PeerLost)), errors[0]) from None


def _learned(result: UpdateResult) -> bool:
    """Whether an update had groups to learn from."""
    return any(tokens is not None for tokens in result.tokens)


def _error(ref: Any) -> Exception | None:
    """The error that a rank answers with; None for an answer, or for none in time."""
    try:
        ray.get(ref, timeout=PEER_SECONDS)
    except ray.exceptions.GetTimeoutError:
        return None
    except (ray.exceptions.RayError, RuntimeError) as error:
        return error
    return None
