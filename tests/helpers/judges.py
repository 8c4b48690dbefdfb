"""Rewards of a user's own, as task.rewards names them (`judges.length`): plain, batched, asynchronous, and broken ones.

The task of the same module has the parts `digits` and `words`.
"""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path

import httpx

from common.config import TaskConfig
from common.types import Prompt, Score

TOGETHER = 8  # calls that `together` waits for

_client = httpx.AsyncClient(timeout=None)
_arrived: list[str] = []
_all_there = asyncio.Event()
_num_inside = 0
_loops: set[asyncio.AbstractEventLoop] = set()


def load(task: TaskConfig, split: str) -> list[Prompt]:
    """task.data is the address of the server that `judge` asks."""
    number = task.num_train if split == "train" else task.num_eval
    return [
        Prompt(messages=({"role": "user", "content": f"Say {n}."},), answer=str(n), metadata={"judge": task.data})
        for n in range(number)
    ]


def reward(completion: str, prompt: Prompt) -> Score:
    parts = {"digits": float(sum(map(str.isdigit, completion))), "words": float(len(completion.split()))}
    return Score(total=sum(parts.values()), correct=completion.strip() == prompt.answer, parts=parts)


def length(completion: str, prompt: Prompt) -> float:
    if completion == "0" * 99:
        raise KeyError("too long")
    return len(completion) / 10


def rank(completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
    """The number of the group's completions that are shorter, which needs the whole group; wrong on some inputs."""
    assert isinstance(completions, list) and len(prompts) == len(completions)
    lengths = [len(completion) for completion in completions]
    values = [float(sum(other < own for other in lengths)) for own in lengths]
    if "3.5" in completions:
        values[completions.index("3.5")] = float("nan")
    return values[1:] if "1111" in completions else values


def like_trl(completions: Sequence[str], **kwargs: object) -> list[float | None]:
    return [None if completion.strip() == "pass over" else 1.0 for completion in completions]


async def judge(completion: str, prompt: Prompt) -> float:
    """Ask the server whose address is the prompt's metadata. The client outlives the call, as a user's would."""
    answer = await _client.post(prompt.metadata["judge"], json={"completion": completion, "answer": prompt.answer})
    return answer.raise_for_status().json()["score"]


async def together(completion: str, prompt: Prompt) -> float:
    """Return once TOGETHER calls wait at the same time."""
    _arrived.append(completion)
    if len(_arrived) == TOGETHER:
        _all_there.set()
    await _all_there.wait()
    return float(completion)


async def crowd(completion: str, prompt: Prompt) -> float:
    """How many calls are there, this one included, after a moment in which others start."""
    global _num_inside
    _num_inside += 1
    await asyncio.sleep(0.1)
    inside = _num_inside
    await asyncio.sleep(float(completion))
    _num_inside -= 1
    return float(inside)


async def trap(completion: str, prompt: Prompt) -> float:
    """Leave something behind that blocks the loop after the answer."""
    asyncio.get_running_loop().call_later(0.2, time.sleep, 600)
    return float(completion)


async def fair(completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
    await asyncio.sleep(0)
    return [float(completion) for completion in completions]


async def odd(completion: str, prompt: Prompt) -> float:
    """What its completion says; the number in other cases, after a moment in which others have started too."""
    await asyncio.sleep(0.1)
    if completion == "hang":
        await asyncio.Event().wait()
    if completion == "stubborn":  # takes no cancellation
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue
    if completion == "block":  # the whole loop
        time.sleep(600)
    if completion == "exit":
        os._exit(3)
    if completion == "leave":
        raise SystemExit(5)
    if completion == "raise":
        raise TimeoutError("of its own")
    if completion == "kill once":
        seen = Path(prompt.metadata["folder"], "seen")
        if not seen.exists():
            seen.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0
    await asyncio.sleep(0.1)
    return float(completion)


def late(completion: str, prompt: Prompt) -> Awaitable[float]:
    """A plain function whose result is to be awaited, as a decorator makes of an asynchronous one."""
    return _late()


async def _late() -> float:
    _loops.add(asyncio.get_running_loop())
    return float(len(_loops))


def judged_by_none(completion: str) -> float:
    return 0.0


number = 5
