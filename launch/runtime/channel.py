"""The weight-sync channel: sends an adapter version to every actor, and verifies that each of them computes with it.

Ray's object store holds one copy per node, which the actors on the node map into their memory.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import ray

from actor.actor import Receipt
from common.adapter import Adapter
from launch.runtime.crew import Crew
from launch.runtime.fleet import Call, Fleet

CANARY_FRACTION = 0.01  # of the time between two publishes
# The verified start publishes a random adapter, the probe. An actor may differ from the learner by this fraction of
# what the probe moves the canary by: a hundred times the noise of float32, four times that of bfloat16 on SmolLM2. One
# module of 210 without its adapter makes a difference of .017 to .39.
PROBE_FRACTION = {"float32": 0.005, "bfloat16": 0.1}


class AdapterMismatch(RuntimeError):
    """An actor does not sample with the weights that the learner published. This ends the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What was verified of one version in every actor."""

    version: int
    load_seconds: float  # of the slowest actor, canary included
    canary_version: int  # the last version whose canary was compared; the two numbers below are from that comparison
    canary_difference: float  # nats, mean |learner - actor| of the worst actor
    canary_signal: float  # nats, mean |adapter - base| in the learner: what an unused adapter would differ by


class Channel:
    """Publishes to the actors of `fleet`, and verifies what they hold; so it does for those that are replaced."""

    def __init__(self, fleet: Fleet, *, canary_bound_nats: float) -> None:
        self.fleet = fleet
        fleet.admit = self.admit
        self._probe: Adapter | None = None
        self._adapter: Adapter | None = None  # the last one that every actor held
        self.canary_bound_nats = canary_bound_nats
        self._canary_every = 1  # compare the canary at every n-th publish
        self._num_without = 0  # publishes since the last canary
        self._published_at = 0.0  # time of the last publish
        self._canary = (-1, math.nan, math.nan)  # version, difference, signal

    def verify(self, learner: Crew) -> Published:
        """A verified start: publish a strong random adapter, compare both sides, then publish the learner's own.

        Finds modules without an adapter, with another module's adapter or with a wrong scale, and prefix caches of an
        older version. Raises AdapterMismatch, which names the numbers that disagree.
        """
        self.publish(learner, canary=True)
        self._probe = probe = learner.probe()
        self._prefix_differences(probe)  # fills the prefix caches under the old version
        for receipt in self.fleet.each("load", ray.put(probe)):
            check_probe(probe, receipt)
        assert probe.canary is not None
        bound = PROBE_FRACTION[probe.dtype] * _distance(probe.canary.logprobs, probe.canary.base_logprobs)
        for difference in self._prefix_differences(probe):
            if not difference <= bound:
                raise AdapterMismatch(
                    f"a token after the canary differs by {difference:.4f} nats (bound {bound:.4f}) between sampling "
                    "and a pass without prefix cache: an actor reads cached prefixes of an older version"
                )
        published = self.publish(learner, canary=True)
        self._canary_every = 1  # until the first step has shown how long a step takes
        return published

    def _prefix_differences(self, probe: Adapter) -> list[float]:
        assert probe.canary is not None
        return self.fleet.each("prefix_difference", probe.canary.token_ids)

    def admit(self, call: Call) -> None:
        """Let the new actor of `call` hold what the others hold, after the random adapter of the verified start."""
        assert self._probe is not None and self._adapter is not None, "a start without losses comes first"
        check_probe(self._probe, call("load", self._probe))
        _check_identity(self._adapter, call("load", self._adapter))

    def publish(self, learner: Crew, *, canary: bool | None = None) -> Published:
        """Publish the adapter of `learner`; returns when it is verified that every actor holds it.

        Version and checksum are verified each time. The canary, two forward passes, is compared as often as
        CANARY_FRACTION of the time allows, or as `canary` demands. Raises AdapterMismatch, which names both numbers.
        """
        due = self._num_without + 1 >= self._canary_every if canary is None else canary
        adapter, others = learner.adapter(due)
        receipts: list[Receipt] = self.fleet.each("load", ray.put(adapter))
        for receipt in receipts:
            _check_identity(adapter, receipt)
        for rank, checksum in enumerate(others, start=1):
            if checksum != adapter.checksum:
                raise AdapterMismatch(
                    f"adapter version {adapter.version} has checksum {adapter.checksum} on rank 0 of the learner, but "
                    f"{checksum} on rank {rank}: the ranks have taken different steps"
                )
        self._adapter, now = adapter, time.perf_counter()
        self._num_without += 1
        if adapter.canary is not None:
            self._canary = (
                adapter.version,
                max(check(adapter, receipt, bound_nats=self.canary_bound_nats) for receipt in receipts),
                _distance(adapter.canary.logprobs, adapter.canary.base_logprobs),
            )
            seconds = adapter.canary.seconds + max(receipt.canary_seconds for receipt in receipts)
            self._canary_every = math.ceil(seconds / (CANARY_FRACTION * (now - self._published_at)))
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
    """Raise AdapterMismatch if an actor and the learner disagree on the random adapter of a verified start."""
    _check_identity(probe, receipt)
    assert probe.canary is not None and receipt.canary_logprobs is not None
    moved = _distance(probe.canary.logprobs, probe.canary.base_logprobs)
    difference = _distance(probe.canary.logprobs, receipt.canary_logprobs)
    bound = PROBE_FRACTION[probe.dtype] * moved
    if not difference <= bound:
        raise AdapterMismatch(
            f"an actor does not compute what the learner does: a random adapter moves the canary by {moved:.4f} nats "
            f"in the learner, to a mean log-probability of {probe.canary.logprobs.mean():.4f}; the actor has "
            f"{receipt.canary_logprobs.mean():.4f}, a difference of {difference:.4f} (bound {bound:.4f}): a module has "
            "no adapter, another module's adapter, or a wrong scale"
        )


def _check_identity(adapter: Adapter, receipt: Receipt) -> None:
    if receipt.version != adapter.version:
        raise AdapterMismatch(f"published adapter version {adapter.version}, but an actor holds {receipt.version}")
    if receipt.checksum != adapter.checksum:
        raise AdapterMismatch(
            f"adapter version {adapter.version} has checksum {adapter.checksum} in the learner, "
            f"but {receipt.checksum} in an actor, whose buffers hold other values"
        )


def check(adapter: Adapter, receipt: Receipt, *, bound_nats: float) -> float:
    """Mean |learner - actor| log-probability of the canary, in nats; raises AdapterMismatch if they disagree.

    The bound allows for the noise between two implementations in bfloat16. If the adapter moves the canary by more than
    the bound, the actor must also be nearer to the learner's policy than to the base model.
    """
    _check_identity(adapter, receipt)
    canary = adapter.canary
    assert canary is not None and receipt.canary_logprobs is not None
    difference = _distance(canary.logprobs, receipt.canary_logprobs)
    from_base = _distance(canary.base_logprobs, receipt.canary_logprobs)
    unused = _distance(canary.logprobs, canary.base_logprobs) > bound_nats and from_base < difference
    if not difference <= bound_nats or unused:  # not <=: a NaN is a mismatch too
        raise AdapterMismatch(
            f"adapter version {adapter.version} is not what an actor samples with: mean log-probability of the canary "
            f"{canary.logprobs.mean():.4f} in the learner, {receipt.canary_logprobs.mean():.4f} in the actor, mean "
            f"|difference| {difference:.4f} nats (bound {bound_nats:g}), {from_base:.4f} from the base without adapter"
        )
    return difference


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())
