"""Scores completions in worker processes, with a hard time-out for each call.

A reward that raises, hangs, gives no finite total or ends its process costs its own rollout only: the caller gets a
text that names the failure in place of a Score.
"""

import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from typing import Any

from actor.tasks import task_module
from common.process import child
from common.types import Prompt, Score

START_SECONDS = 120.0  # for a worker to import its task

Scoring = list[Future[Score | str]]  # calls that were started


class RewardPool:
    """The reward of one task, in `workers` processes that stay warm.

    Example: pool = RewardPool("gsm8k", workers=2, timeout_seconds=10.0); pool.score_all([("42", prompt)])
    """

    def __init__(self, task_name: str, *, workers: int, timeout_seconds: float) -> None:
        """Returns when every worker has imported the task. Raises UserError for an unknown task."""
        task_module(task_name)
        self._timeout_seconds = timeout_seconds
        # One thread for each worker. They also start the workers: a child dies with the thread that started it.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self._workers = list(self._threads.map(_Worker, [task_name] * workers))
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def score_all(self, completions: Sequence[tuple[str, Prompt]]) -> list[Score | str]:
        """One Score, or the text of a failure, for each (completion, prompt), in their order.

        The time-out of a call starts when a worker takes it; time in the queue does not count.
        """
        return self.finish(self.start(completions))

    def start(self, completions: Sequence[tuple[str, Prompt]]) -> Scoring:
        """Begin to score, while the caller does something else. Raises RuntimeError after close()."""
        return [self._threads.submit(self._call, call) for call in completions]

    def finish(self, scoring: Scoring) -> list[Score | str]:
        """Wait for what `start` began; returns what score_all returns."""
        return [future.result() for future in scoring]

    def close(self) -> None:
        """End the workers, hung ones included."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.process.kill()  # its thread sees the connection end
        self._threads.shutdown()
        for worker in self._workers:
            worker.end()

    def _call(self, call: tuple[str, Prompt]) -> Score | str:
        worker = self._idle.get()
        try:
            return worker.score(call, self._timeout_seconds)
        except Exception as error:  # noqa: BLE001 (a prompt that cannot be pickled may raise anything)
            return _describe(error)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that scores one call at a time, started again after it has ended."""

    def __init__(self, task_name: str) -> None:
        self._task_name = task_name
        self._start()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            # A new interpreter, not multiprocessing: that would import our main module, with ray, torch and vllm.
            self.process: subprocess.Popen[bytes] = child(
                [sys.executable, "-P", "-m", "actor.reward_pool", self._task_name, str(theirs.fileno())],
                death_signal=signal.SIGKILL,  # a reward may handle, or delay, any other
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        try:
            self._receive(START_SECONDS)
        except (EOFError, OSError):
            self.end()
            raise RuntimeError("a reward worker did not start; its output says why") from None

    def score(self, call: tuple[str, Prompt], timeout_seconds: float) -> Score | str:
        """Raises RuntimeError for a process that cannot be started again, and what pickling the call raises."""
        if self.process.poll() is not None:
            self._connection.close()
            self._start()
        try:
            self._connection.send(call)
            return self._receive(timeout_seconds)
        except TimeoutError:
            self.end()
            return f"time-out: no reward within {timeout_seconds:g} s"
        except (EOFError, OSError):
            return f"the reward ended its process (exit code {self.end()})"

    def end(self) -> int:
        """Kill the process if it has not ended; returns its exit code."""
        self.process.kill()
        self._connection.close()
        return self.process.wait()

    def _receive(self, seconds: float) -> Any:
        """Raises TimeoutError; EOFError or another OSError when the process has ended."""
        if not self._connection.poll(seconds):
            raise TimeoutError
        return self._connection.recv()


def _work(task_name: str, connection: Connection) -> None:
    """The main loop of a worker. The first message says that it is ready; it ends when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the owner
    os.set_inheritable(connection.fileno(), False)  # a process that a reward starts would keep it open
    task_module(task_name)
    connection.send(None)
    while True:
        connection.send(_score(task_name, connection.recv_bytes()))


def _score(task_name: str, call: bytes) -> Score | str:
    """The Score of a pickled call in plain values, or the failure."""
    try:
        completion, prompt = pickle.loads(call)
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


if __name__ == "__main__":
    _work(sys.argv[1], Connection(int(sys.argv[2])))
