"""Learner ranks in processes of their own, for tests."""

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from learner.ranks import Ranks

ADDRESS = "127.0.0.1"


@contextmanager
def processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh interpreters of one thread each, which keep what they have imported."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(number, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def on_ranks(pool: ProcessPoolExecutor, world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(ranks, *arguments)` of `world` ranks that have met, each in a process of its own; their results."""
    port = free_port()
    futures = [pool.submit(on_rank, rank, world, port, work, arguments) for rank in range(world)]
    return [future.result() for future in futures]


def on_rank(rank: int, world: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """`work(ranks, *arguments)` as one of `world` ranks that meet at `port`."""
    ranks = Ranks(rank, world)
    if world > 1:
        if rank == 0:
            ranks.open(ADDRESS, port)
        ranks.join(ADDRESS, ADDRESS, port, timeout_seconds=60)
    return work(ranks, *arguments)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])
