"""The weight-sync channel: an adapter version goes through Ray's object store to every actor, and comes back proved.

The store holds one copy per node; actors on it map that copy, they do not receive it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from actor.actor import Receipt
from common.adapter import Adapter

# Of what the random adapter moves the canary by, what an actor may differ: a hundred times the noise of float32, four
# times that of bfloat16 on SmolLM2. One module of 210 without its adapter lies .017 to .39 off.
CANARY_SHARE = 0.01  # of the time between two publishes
PROBE_SHARE = {"float32": 0.005, "bfloat16": 0.1}


class AdapterMismatch(RuntimeError):
    """An actor does not sample with the weights that the learner published. Ends the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What every actor proved of one version."""

    version: int
    load_seconds: float  # of the slowest actor, canary included
    canary_version: int  # the last one that was proved by a canary too; the two numbers are of that
    canary_difference: float  # nats, mean |learner - actor| of the worst actor
    canary_signal: float  # nats, mean |adapter - base| in the learner: what an unused adapter would differ by


class Channel:
    """Publishes to `actors` (handles of actor.actor.Actor), and insists on proof."""

    def __init__(self, actors: Sequence[Any], *, canary_bound_nats: float) -> None:
        self.actors = list(actors)
        self.canary_bound_nats = canary_bound_nats
        self._canary_every = 1  # publishes
        self._num_without = 0  # since the last canary
        self._published_at = 0.0  # clock
        self._canary = (-1, math.nan, math.nan)  # version, difference, signal

    def verify(self, learner: Any) -> Published:
        """A verified start: publish the learner's adapter, a strong random one that must be computed alike, and return.

        Finds modules that are not adapted, or with another's factors, share or scale, and prefixes cached of an older
        version. Raises AdapterMismatch, naming the numbers that disagree.
        """
        self.publish(learner, canary=True)
        probe_ref = learner.probe.remote()
        probe: Adapter = ray.get(probe_ref)
        self._prefix_differences(probe)  # fills the caches
        for receipt in ray.get([actor.load.remote(probe_ref) for actor in self.actors]):
            check_probe(probe, receipt)
        assert probe.canary is not None
        bound = PROBE_SHARE[probe.dtype] * _distance(probe.canary.logprobs, probe.canary.base_logprobs)
        for difference in self._prefix_differences(probe):
            if not difference <= bound:
                raise AdapterMismatch(
                    f"a token behind the canary differs by {difference:.4f} nats (bound {bound:.4f}) between sampling "
                    "and a pass that reads no prefix cache: an actor reads prefixes of an older version"
                )
        published = self.publish(learner, canary=True)
        self._canary_every = 1  # the first step says how long a step takes
        return published

    def _prefix_differences(self, probe: Adapter) -> list[float]:
        assert probe.canary is not None
        return ray.get([actor.prefix_difference.remote(probe.canary.token_ids) for actor in self.actors])

    def publish(self, learner: Any, *, canary: bool | None = None) -> Published:
        """Returns when every actor holds the adapter of `learner` (a handle) and has proved it.

        Version and checksum are proved each time; the canary, two forward passes, as often as a hundredth of the time
        between two publishes allows, unless `canary` says. Raises AdapterMismatch, naming both numbers.
        """
        due = self._num_without + 1 >= self._canary_every if canary is None else canary
        adapter_ref = learner.adapter.remote(due)
        receipts: list[Receipt] = ray.get([actor.load.remote(adapter_ref) for actor in self.actors])
        adapter: Adapter = ray.get(adapter_ref)
        for receipt in receipts:
            _check_identity(adapter, receipt)
        now = time.perf_counter()
        self._num_without += 1
        if adapter.canary is not None:
            self._canary = (
                adapter.version,
                max(check(adapter, receipt, bound_nats=self.canary_bound_nats) for receipt in receipts),
                _distance(adapter.canary.logprobs, adapter.canary.base_logprobs),
            )
            seconds = adapter.canary.seconds + max(receipt.canary_seconds for receipt in receipts)
            self._canary_every = math.ceil(seconds / (CANARY_SHARE * (now - self._published_at)))
            self._num_without = 0
        self._published_at = now
        version, difference, signal = self._canary
        return Published(
            version=adapter.version,
            load_seconds=max(receipt.load_seconds for receipt in receipts),
            canary_version=version,
            canary_difference=difference,
            canary_signal=signal,
        )


def check_probe(probe: Adapter, receipt: Receipt) -> None:
    """AdapterMismatch where an actor computes the random adapter of a verified start otherwise than the learner."""
    _check_identity(probe, receipt)
    assert probe.canary is not None and receipt.canary_logprobs is not None
    moved = _distance(probe.canary.logprobs, probe.canary.base_logprobs)
    difference = _distance(probe.canary.logprobs, receipt.canary_logprobs)
    bound = PROBE_SHARE[probe.dtype] * moved
    if not difference <= bound:
        raise AdapterMismatch(
            f"an actor does not compute what the learner does: a random adapter moves the canary by {moved:.4f} nats "
            f"in the learner, to a mean log-probability of {probe.canary.logprobs.mean():.4f}, and the actor's "
            f"{receipt.canary_logprobs.mean():.4f} lies {difference:.4f} off (bound {bound:.4f}): a module is without "
            "its adapter, or has another's, or is wrongly scaled"
        )


def _check_identity(adapter: Adapter, receipt: Receipt) -> None:
    if receipt.version != adapter.version:
        raise AdapterMismatch(f"published adapter version {adapter.version}, but an actor holds {receipt.version}")
    if receipt.checksum != adapter.checksum:
        raise AdapterMismatch(
            f"adapter version {adapter.version} has checksum {adapter.checksum} in the learner, "
            f"but {receipt.checksum} in an actor, whose buffers hold something else"
        )


def check(adapter: Adapter, receipt: Receipt, *, bound_nats: float) -> float:
    """Mean |learner - actor| log-probability of the canary, nats; AdapterMismatch if anything disagrees.

    The bound is on the noise between two implementations in bfloat16. An adapter that moves the canary by more
    than the bound must also leave the actor nearer to the learner's adapter than to its base.
    """
    _check_identity(adapter, receipt)
    canary = adapter.canary
    assert canary is not None and receipt.canary_logprobs is not None
    difference = _distance(canary.logprobs, receipt.canary_logprobs)
    from_base = _distance(canary.base_logprobs, receipt.canary_logprobs)
    unused = _distance(canary.logprobs, canary.base_logprobs) > bound_nats and from_base < difference
    if not difference <= bound_nats or unused:  # a NaN is a mismatch too
        raise AdapterMismatch(
            f"adapter version {adapter.version} is not what an actor samples with: mean log-probability of the canary "
            f"{canary.logprobs.mean():.4f} in the learner, {receipt.canary_logprobs.mean():.4f} in the actor, mean "
            f"|difference| {difference:.4f} nats (bound {bound_nats:g}), {from_base:.4f} from the base without adapter"
        )
    return difference


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())
