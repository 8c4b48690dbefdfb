"""Scores completions in a pool of processes, with a hard time-out for each call.

A reward that raises, hangs, gives no finite total or takes its process down costs its own rollout only: the caller
gets a text that names the failure in place of a Score.
"""

import ctypes
import math
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib.machinery import ModuleSpec
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from actor.tasks import task_module
from common.types import Prompt, Score

START_SECONDS = 120.0  # a worker that has not come up after this never will
MAX_FRUITLESS = 3  # restarts in a row that settle no call
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Scoring(NamedTuple):
    """Calls that were started; a future of None is one that the pool did not take."""

    completions: Sequence[tuple[str, Prompt]]
    futures: Sequence[ProcessFuture | None]


class RewardPool:
    """The reward of one task, in `workers` processes that stay warm.

    Example: pool = RewardPool("gsm8k", workers=2, timeout_seconds=10.0); pool.score_all([("42", prompt)])
    """

    def __init__(self, task_name: str, *, workers: int, timeout_seconds: float) -> None:
        """Returns when every worker has imported the task. Raises UserError for an unknown task."""
        task_module(task_name)
        self._task_name = task_name
        self._workers = workers
        self._timeout_seconds = timeout_seconds
        self._start()

    def score_all(self, completions: Sequence[tuple[str, Prompt]]) -> list[Score | str]:
        """One Score, or the text of a failure, for each (completion, prompt), in their order.

        The time-out of a call starts when a worker takes it up; a queue costs nothing.
        """
        return self.finish([self.start(completions)])

    def start(self, completions: Sequence[tuple[str, Prompt]]) -> Scoring:
        """Begin to score, while the caller does something else."""
        if self._closed.is_set():
            raise RuntimeError("the reward pool is closed")
        try:
            futures = [
                self._pool.schedule(_call, args=(self._task_name, *call), timeout=self._timeout_seconds)
                for call in completions
            ]
        except RuntimeError:  # pebble's word for a pool that broke while it was idle
            return Scoring(completions, [None] * len(completions))
        return Scoring(completions, futures)

    def finish(self, started: Sequence[Scoring]) -> list[Score | str]:
        """What score_all gives, for all of `started` in the order in which they were started."""
        completions = [call for scoring in started for call in scoring.completions]
        results = [self._settle(future) for scoring in started for future in scoring.futures]
        num_fruitless = 0
        while None in results:  # the pool broke: a worker died at a bad moment, or while idle
            self._restart()
            waiting = [index for index, result in enumerate(results) if result is None]
            for index, future in zip(waiting, self.start([completions[i] for i in waiting]).futures, strict=True):
                results[index] = self._settle(future)
            num_fruitless = num_fruitless + 1 if all(results[i] is None for i in waiting) else 0
            if num_fruitless == MAX_FRUITLESS:
                results = ["the reward pool breaks on this call" if r is None else r for r in results]
        return [result for result in results if result is not None]

    def close(self) -> None:
        """Ends the workers, also those that hang. The pool cannot be used after it."""
        self._pool.stop()
        self._pool.join()
        self._closed.set()

    def _settle(self, future: ProcessFuture | None) -> Score | str | None:
        """None for a call that the pool never settled: the pool is broken and needs a restart."""
        if future is None:
            return None
        try:
            # Calls are taken up in order, so once the ones before are settled this one runs or is next.
            return future.result(timeout=self._timeout_seconds + START_SECONDS)
        except TimeoutError:
            return f"time-out: no reward within {self._timeout_seconds:g} s" if future.done() else None
        except ProcessExpired as error:
            return f"the reward ended its process (exit code {error.exitcode})"
        except BrokenProcessPool:
            return None
        except Exception as error:  # noqa: BLE001 (what cannot be pickled raises many types, each its rollout's own)
            return _describe(error)

    def _start(self) -> None:
        context = _LightContext()
        ready = context.Semaphore(0)
        self._pool = ProcessPool(
            self._workers, initializer=_initialize, initargs=(self._task_name, os.getpid(), ready), context=context
        )
        self._closed = threading.Event()
        threading.Thread(target=_own, args=(self._pool, self._closed), name="reward-pool", daemon=True).start()
        for _ in range(self._workers):
            if not ready.acquire(timeout=START_SECONDS):
                self.close()
                raise RuntimeError(f"a reward worker did not start within {START_SECONDS:g} s; its log says why")

    def _restart(self) -> None:
        self.close()
        self._start()


def _own(pool: ProcessPool, closed: threading.Event) -> None:
    """Starts the workers and outlives them: Linux sends their death signal when the *thread* that made them ends."""
    pool.active  # noqa: B018 (the property starts the pool)
    closed.wait()


def _call(task_name: str, completion: str, prompt: Prompt) -> Score | str:
    """In a worker: the Score of a completion in plain values, or what went wrong."""
    try:
        score = task_module(task_name).reward(completion, prompt)
        if not isinstance(score, Score):
            return f"the reward gave {type(score).__name__}, not a Score"
        total = float(score.total)
        if not math.isfinite(total):
            return f"the reward gave total={total}, which is not finite"
        parts = {str(name): float(value) for name, value in score.parts.items()}
        return Score(total=total, correct=bool(score.correct), parts=parts)
    except BaseException as error:  # noqa: BLE001 (any failure, sys.exit too, costs this rollout only and is named)
        return _describe(error)


def _describe(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _initialize(task_name: str, owner: int, ready: Any) -> None:
    """In a worker, once (pebble has SIGINT ignored already): never outlive the owner, and import the task."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:  # it died before the line above
        os._exit(1)
    task_module(task_name)
    ready.release()


class _LightProcess(SpawnProcess):
    """A spawned process that does not import the owner's main module, which may bring in ray, torch or vllm."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        spec = main.__spec__
        main.__spec__ = ModuleSpec("__main__", None)  # the one name that multiprocessing leaves alone in the child
        try:
            return SpawnProcess._Popen(process_obj)
        finally:
            main.__spec__ = spec


class _LightContext(SpawnContext):
    Process = _LightProcess
