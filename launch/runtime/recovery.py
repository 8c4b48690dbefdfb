"""A process of the run that is lost is replaced: a bounded number of times in a row, and each told in one line.

An answer that does not come in time is a loss, too: the limit follows from how long such answers took so far.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from learner.ranks import PeerLost

MAX_LOSSES = 5  # of one worker, without a committed step between them
FIRST_SECONDS = 7200.0  # for the first answer of a kind: it may compile, read a model, or be an evaluation
TIMES, SPARE_SECONDS = 5.0, 30.0  # for a later one: so many times the slowest so far, and so many seconds

LOST = (
    ray.exceptions.RayActorError,  # its process or node is gone, or does not answer
    ray.exceptions.GetTimeoutError,  # it hangs
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,  # Ray's memory monitor has killed it
    ray.exceptions.NodeDiedError,
    torch.AcceleratorError,  # its GPU has failed, and the process cannot use it again
    PeerLost,  # another rank is gone
)


class RunFailed(RuntimeError):
    """The run cannot continue; it ends with status 1."""


class NotStarted(RunFailed):
    """A lost worker's replacement has not started in time."""


def full(error: Exception, remedy: str) -> RunFailed:
    """What a full GPU ends the run with: it would be full again."""
    return RunFailed(f"a GPU is full ({last_line(error)}); {remedy}")


def last_line(error: Exception) -> str:
    """What an error says, without the traceback that Ray puts before it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


class Patience:
    """How long answers of one kind take, and so how long the next one may; `remedy` is for a full GPU."""

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy
        self._slowest = 0.0  # seconds of an answer
        self._slowest_unit = 0.0  # seconds for a unit of work

    def limit_seconds(self, units: int = 1) -> float:
        """For `units` of work: as if each took as long as the slowest, and never less than for the slowest answer."""
        if not self._slowest:
            return FIRST_SECONDS
        return TIMES * max(self._slowest, self._slowest_unit * units) + SPARE_SECONDS

    def get(
        self,
        refs: Any,
        units: int = 1,
        *,
        more_seconds: float = 0.0,
        counts: Callable[[Any], bool] = lambda answer: True,
    ) -> Any:
        """`ray.get` of references to `units` of work, with an allowance of `more_seconds`.

        The limit does not follow from an answer that does not count, since it took no work. Raises GetTimeoutError
        after the limit, which is twice as long the next time, and RunFailed for a full GPU.
        """
        started = time.perf_counter()
        limit = self.limit_seconds(units) + more_seconds
        try:
            answer = ray.get(refs, timeout=limit)
        except torch.OutOfMemoryError as error:
            raise full(error, self.remedy) from None
        except ray.exceptions.GetTimeoutError:
            self._learn(2 * limit / TIMES, units)
            raise
        if counts(answer):
            self._learn(time.perf_counter() - started, units)
        return answer

    def _learn(self, seconds: float, units: int) -> None:
        self._slowest = max(self._slowest, seconds)
        self._slowest_unit = max(self._slowest_unit, seconds / units)


class Losses:
    """Counts the losses of a run. Before the first step nothing is replaced: what fails to start would fail again."""

    def __init__(self, note: Callable[[str], None] | None = None, *, wait_seconds: float = 1800.0) -> None:
        self.started = False
        self.wait_seconds = wait_seconds  # for a replacement to start: cluster.node_wait_seconds
        self._note = note or (lambda text: print(text, file=sys.stderr))
        self._lock = threading.Lock()
        self._in_a_row: Counter[str] = Counter()  # by worker
        self._seconds = 0.0
        self._by_kind = {"learner": 0, "actor": 0}

    def replace(self, kind: str, name: str, error: Exception, new: Callable[[], None]) -> None:
        """Call `new`, which replaces the lost worker `name`, until it succeeds. Raises RunFailed after MAX_LOSSES."""
        while True:
            cause = type(error).__name__
            with self._lock:
                if not self.started:
                    raise error
                self._in_a_row[name] += 1
                if self._in_a_row[name] > MAX_LOSSES:
                    raise RunFailed(f"{MAX_LOSSES} losses without a step between them; the last: {name} ({cause})")
                self._by_kind[kind] += 1
            began = time.perf_counter()
            try:
                new()
            except LOST as again:
                error = again
                continue
            seconds = time.perf_counter() - began
            self._note(f"{name} was lost ({cause}); replaced in {seconds:.1f} s")
            with self._lock:
                self._seconds += seconds
            return

    def await_start(self, workers: Sequence[Any]) -> None:
        """Return once these replacements have started. Raises NotStarted if one has not in time."""
        try:
            ray.get([worker.__ray_ready__.remote() for worker in workers], timeout=self.wait_seconds)
        except ray.exceptions.GetTimeoutError:
            raise NotStarted(
                f"a lost worker's replacement has not started within cluster.node_wait_seconds={self.wait_seconds:g}; "
                "raise it, and resume with --run.resume"
            ) from None

    def committed(self) -> None:
        """A step is safe: the next loss is the first in a row."""
        with self._lock:
            self._in_a_row.clear()

    def metrics(self) -> dict[str, float]:
        """Number of replaced workers by kind since the last call, and the seconds that this took."""
        with self._lock:
            counted = {f"recovery/{kind}": float(number) for kind, number in self._by_kind.items()}
            counted["recovery/seconds"] = self._seconds
            self._by_kind, self._seconds = dict.fromkeys(self._by_kind, 0), 0.0
            return counted
