"""Calls of asynchronous rewards: up to MAX_CALLS wait at the same time, in the event loop of one process.

Further calls start as others end, in their order, and the time-out of a call begins when it starts. A call that exceeds
it is cancelled alone. One that the process leaves unanswered, since a reward has ended or blocked it, goes to a worker
of the reward pool, where it is alone: so the guilty call fails and the others do not.
"""

import asyncio
import contextlib
import itertools
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from actor.reward_functions import Call, Values, awaited_values_of, find
from actor.reward_pool import START_SECONDS, connected, describe, started

MAX_CALLS = 100  # at one time; httpx's default too, whose client fails a call that waits for a connection for 5 s
GRACE_SECONDS = 2.0  # after the time-out of a call, within which a loop that is not blocked has answered
TICK_SECONDS = 0.2  # between two looks for calls that are overdue

Answer = Future[Values | str]


@dataclass(frozen=True, slots=True)
class _Asked:
    call: Call
    answer: Answer = field(default_factory=Future)
    at: float = field(default_factory=time.monotonic)


class AsyncRewards:
    """The process with the event loop, which is started again after it has ended."""

    def __init__(self, functions: Sequence[str], *, timeout_seconds: float, alone: Callable[[Call], Answer]) -> None:
        """Return when the process has imported the modules of `functions`. `alone` makes a call that was unanswered."""
        self._functions = functions
        self._timeout_seconds = timeout_seconds
        self._alone = alone
        self._numbers = itertools.count()
        self._asked: dict[int, _Asked] = {}  # the calls without an answer, the oldest first
        self._started_at: dict[int, float] = {}  # of these, when the process started them, the oldest first
        self._heard_at = 0.0  # from the process
        self._lock = threading.Lock()  # of _asked, _connection and _closed
        self._sending = threading.Lock()  # separate, since a full pipe holds it until the thread below has read on
        self._connection: Connection | None = None  # None: no process takes calls
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = threading.Event()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="async rewards", daemon=True)
        self._thread.start()
        self._ready.result()

    def call(self, call: Call) -> Answer:
        """Start to call a reward function; the result is a text if the whole call has failed."""
        asked, number = _Asked(call), next(self._numbers)
        try:
            message = (number, pickle.dumps(call))
        except Exception as error:  # noqa: BLE001 (a prompt that cannot be pickled may raise anything)
            asked.answer.set_result(describe(error))
            return asked.answer
        with self._lock:
            connection = self._connection
            if connection is not None:
                self._asked[number] = asked
        if connection is None:
            self._call_alone(asked)
        else:
            with self._sending, contextlib.suppress(OSError):  # its process has ended: `_hand_over` takes the call
                connection.send(message)
        return asked.answer

    def close(self) -> None:
        """End the process, and cancel the calls that wait."""
        with self._lock:
            self._closed.set()
            if self._process is not None:
                self._process.kill()
        self._thread.join()

    def _run(self) -> None:
        """Start the process, read its answers until it has to be replaced, and so on. It dies with this thread."""
        try:
            while not self._closed.is_set():
                process, connection = started("actor.async_rewards", f"{self._timeout_seconds!r}", *self._functions)
                with self._lock:
                    self._process = process
                    if self._closed.is_set():
                        process.kill()
                try:
                    self._serve(connection)
                finally:
                    process.kill()
                    process.wait()
                    self._hand_over(connection)
        except (_NotStarted, OSError) as error:  # OSError: no more processes
            if not self._ready.done():
                self._ready.set_exception(error)

    def _serve(self, connection: Connection) -> None:
        """Read answers until the process has ended or does not answer in time. Raises _NotStarted."""
        try:
            if not connection.poll(START_SECONDS):
                raise EOFError
            connection.recv()
        except (EOFError, OSError):
            raise _NotStarted("the process of asynchronous rewards did not start; see its output above") from None
        with self._lock:
            self._connection = connection
        if not self._ready.done():
            self._ready.set_result(None)
        with contextlib.suppress(EOFError, OSError):
            while not self._overdue():
                if connection.poll(TICK_SECONDS):
                    self._hear(*connection.recv())

    def _overdue(self) -> bool:
        """Whether the process should have answered a call by now; or started one, if none is at work in it."""
        with self._lock:
            oldest = next(iter(self._asked.values()), None)
        if oldest is None:
            return False
        since = next(iter(self._started_at.values()), max(oldest.at, self._heard_at))
        return time.monotonic() - since > self._timeout_seconds + GRACE_SECONDS

    def _hear(self, number: int, answer: Values | str | None) -> None:
        """The process has started a call (None), or answered it."""
        self._heard_at = time.monotonic()
        if answer is None:
            self._started_at[number] = self._heard_at
            return
        del self._started_at[number]
        with self._lock:
            asked = self._asked.pop(number)
        asked.answer.set_result(answer)

    def _hand_over(self, connection: Connection) -> None:
        """Make the calls without an answer alone."""
        with self._lock:
            self._connection = None
            unanswered, self._asked = list(self._asked.values()), {}
        self._started_at.clear()
        with self._sending:
            connection.close()
        for asked in unanswered:
            self._call_alone(asked)

    def _call_alone(self, asked: _Asked) -> None:
        if self._closed.is_set():
            asked.answer.cancel()
            return

        def answer(alone: Answer) -> None:
            if alone.cancelled():
                asked.answer.cancel()
            else:
                asked.answer.set_result(alone.result())

        self._alone(asked.call).add_done_callback(answer)


class _NotStarted(RuntimeError):
    """The process has ended before it had imported the rewards."""


async def _work(connection: Connection, timeout_seconds: float) -> None:
    """Answer calls, MAX_CALLS at one time, until the connection ends."""
    ended, loop, places = asyncio.Event(), asyncio.get_running_loop(), asyncio.Semaphore(MAX_CALLS)
    tasks: set[asyncio.Task[None]] = set()  # the loop itself holds its tasks weakly

    async def answer(number: int, call: bytes) -> None:
        async with places:
            connection.send((number, None))  # it starts
            connection.send((number, await _answer(call, timeout_seconds)))

    def receive() -> None:
        try:
            task = loop.create_task(answer(*pickle.loads(connection.recv_bytes())))
        except (EOFError, OSError):
            ended.set()
        else:
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    loop.add_reader(connection.fileno(), receive)
    connection.send(None)  # ready
    await ended.wait()


async def _answer(call: bytes, timeout_seconds: float) -> Values | str:
    try:
        async with asyncio.timeout(timeout_seconds) as limit:
            return await awaited_values_of(pickle.loads(call))
    except BaseException as error:  # noqa: BLE001 (any failure, sys.exit too, affects this call only)
        return f"time-out: no reward within {timeout_seconds:g} s" if limit.expired() else describe(error)


if __name__ == "__main__":
    to_owner = connected(sys.argv[1])
    for path in sys.argv[3:]:
        find(path)
    asyncio.run(_work(to_owner, float(sys.argv[2])))
