"""Scores completions in worker processes, with a hard time-out for each call.

A reward that raises, hangs, returns a non-finite total or ends its process affects its own rollout only: for that
rollout the caller gets a text that describes the failure instead of a Score. A call whose process something else has
killed or stopped is repeated.
"""

import asyncio
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from typing import Any

import psutil

from actor.reward_functions import Call, Values, find, values_of
from actor.tasks import task_module
from common.process import child
from common.types import Prompt, Score

START_SECONDS = 120.0  # for a worker to import its task
TRIES = 3  # of a call: a reward may itself be the reason that its process is killed, as for too much memory

Scoring = list[Future[Score | str]]  # calls that were started


class _Interrupted(RuntimeError):
    """Something else has killed or stopped the process of a reward."""


class RewardPool:
    """The reward of a task, or of the one that a prompt names, in `workers` processes that stay warm.

    Example: pool = RewardPool("gsm8k", workers=2, timeout_seconds=10.0); pool.finish(pool.start([("42", prompt)]))
    """

    def __init__(
        self,
        task_name: str,
        *,
        workers: int,
        timeout_seconds: float,
        graders: Sequence[str] = (),
        functions: Sequence[str] = (),
    ) -> None:
        """Return when every worker has imported the task, the `graders` (other tasks, which prompts may name), and the
        modules of the reward `functions` that `call` will be asked for: no import takes the time of a reward.

        Raises UserError for an unknown task or function.
        """
        tasks = (task_name, *graders)
        imports(tasks, functions)
        self._timeout_seconds = timeout_seconds
        # One thread per worker. It also starts its worker, since a child process dies with the thread that started it.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self._workers = list(self._threads.map(_Worker, [(",".join(tasks), *functions)] * workers))
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def start(self, completions: Sequence[tuple[str, Prompt]]) -> Scoring:
        """Start to score (completion, prompt) pairs in the background. Raises RuntimeError after close().

        The time-out of a call starts when a worker takes it; time in the queue does not count.
        """
        return [self._threads.submit(self._call, call) for call in completions]

    def call(self, call: Call) -> "Future[Values | str]":
        """Start to call a reward function in the background; its result is a text if the whole call has failed."""
        return self._threads.submit(self._call, call)

    def finish(self, scoring: Scoring) -> list[Score | str]:
        """Wait for the calls that `start` started: one Score, or the text of a failure, for each, in their order."""
        return [future.result() for future in scoring]

    def close(self) -> None:
        """End the workers, including hung ones."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.tries = 1
            worker.process.kill()  # its thread then reads the end of the connection and returns
        self._threads.shutdown()
        for worker in self._workers:
            worker.end()

    def _call(self, call: tuple[str, Prompt] | Call) -> Any:
        worker = self._idle.get()
        try:
            return worker.score(call, self._timeout_seconds)
        except Exception as error:  # noqa: BLE001 (a prompt that cannot be pickled may raise anything)
            return describe(error)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that scores one call at a time. It is started again after it has ended."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names`: the arguments of `_work`."""
        self.tries = TRIES
        self._names = names
        self._start()

    def _start(self) -> None:
        self.process, self._connection = started("actor.reward_pool", *self._names)
        try:
            self._receive(START_SECONDS)
        except (EOFError, OSError):
            kind = _Interrupted if self.end() == -signal.SIGKILL else RuntimeError
            raise kind("a reward worker did not start; see its output above") from None

    def score(self, call: tuple[str, Prompt] | Call, timeout_seconds: float) -> Any:
        """Score one call. Raises RuntimeError if the process cannot be started again, and what pickling raises."""
        tried = 0
        while True:
            try:
                return self._score(call, timeout_seconds)
            except _Interrupted as error:
                tried += 1
                if tried >= self.tries:
                    return str(error)

    def _score(self, call: tuple[str, Prompt] | Call, timeout_seconds: float) -> Any:
        if self.process.poll() is not None:
            self._connection.close()
            self._start()
        try:
            self._connection.send(call)
            return self._receive(timeout_seconds)
        except TimeoutError:
            failure = f"time-out: no reward within {timeout_seconds:g} s"
            if interrupted := psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED:
                failure = f"{failure}: its process was stopped"
            self.end()
        except (EOFError, OSError):
            code = self.end()
            failure, interrupted = f"the reward ended its process (exit code {code})", code == -signal.SIGKILL
        if interrupted:
            raise _Interrupted(failure)
        return failure

    def end(self) -> int:
        """Kill the process if it has not ended; returns its exit code."""
        self.process.kill()
        self._connection.close()
        return self.process.wait()

    def _receive(self, seconds: float) -> Any:
        """The next message. Raises TimeoutError, or EOFError or another OSError when the process has ended."""
        if not self._connection.poll(seconds):
            raise TimeoutError
        return self._connection.recv()


def started(module: str, *arguments: str) -> tuple["subprocess.Popen[bytes]", Connection]:
    """A process that runs `module` with a descriptor and the arguments, and our end of the connection to it.

    It is killed when the thread that called this ends.
    """
    ours, theirs = Pipe()
    with theirs:
        # A new interpreter: multiprocessing would import our main module, and with it ray, torch and vLLM.
        process: subprocess.Popen[bytes] = child(
            [sys.executable, "-P", "-m", module, str(theirs.fileno()), *arguments],
            death_signal=signal.SIGKILL,  # a reward may ignore any other signal
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    return process, ours


def connected(descriptor: str) -> Connection:
    """Their end of the connection, inside the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, but only the owner reacts to it
    os.set_inheritable(int(descriptor), False)  # else a process that a reward starts would keep it open
    return Connection(int(descriptor))


def imports(tasks: Sequence[str], functions: Sequence[str]) -> None:
    """Import tasks and reward functions. Raises UserError for an unknown one."""
    for name in tasks:
        task_module(name)
    for path in functions:
        find(path)


def _work(descriptor: str, tasks: str, *functions: str) -> None:
    """The main loop of a worker, which runs until the process is killed.

    `tasks` are names with commas between them; the first grades the prompts that name none.
    """
    connection = connected(descriptor)
    task_name, *_ = names = tasks.split(",")
    imports(names, functions)
    connection.send(None)  # ready
    with asyncio.Runner() as runner:  # one event loop, since a client that a reward keeps belongs to its first one
        while True:
            connection.send(_answer(task_name, connection.recv_bytes(), runner))


def _answer(task_name: str, call: bytes, runner: asyncio.Runner) -> Score | Values | str:
    """The result of a pickled call, in plain Python values, or the text of a failure."""
    try:
        asked = pickle.loads(call)
        if isinstance(asked, Call):
            return values_of(asked, lambda result: runner.run(_awaited(result)))
        return _score(task_name, *asked)
    except BaseException as error:  # noqa: BLE001 (any failure, sys.exit too, affects this call only)
        return describe(error)


def _score(task_name: str, completion: str, prompt: Prompt) -> Score | str:
    """The task's own reward. Raises whatever it raises."""
    score = task_module(prompt.task or task_name).reward(completion, prompt)
    if not isinstance(score, Score):
        return f"the reward returned {type(score).__name__}, not a Score"
    total = float(score.total)
    if not math.isfinite(total):
        return f"the reward returned total={total}, which is not finite"
    parts = {str(name): float(value) for name, value in score.parts.items()}
    return Score(total=total, correct=bool(score.correct), parts=parts)


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def describe(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


if __name__ == "__main__":
    _work(*sys.argv[1:])
