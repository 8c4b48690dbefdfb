"""The channel: how it verifies that an actor samples with the published adapter."""

import pickle
from dataclasses import replace
from itertools import pairwise

import local_actor
import numpy as np
import pytest
import torch

from actor.actor import Receipt
from common.adapter import Adapter, Canary, tensors
from launch.runtime import channel
from launch.runtime.channel import AdapterMismatch, Channel, check

TENSORS = {"layer.lora_A.weight": torch.full((2, 3), 1.01), "layer.lora_B.weight": torch.zeros(3, 2)}
LEARNER = np.array([-1.0, -2.0, -3.0], np.float32)
BASE = np.array([-1.5, -2.5, -3.5], np.float32)


def version_7(factors, dtype="float32"):
    return Adapter.of(
        factors,
        dtype,
        version=7,
        rank=2,
        alpha=4.0,
        target_modules=("layer",),
        canary=Canary(token_ids=np.arange(4, dtype=np.int32), logprobs=LEARNER, base_logprobs=BASE),
    )


ADAPTER = version_7(TENSORS)
RECEIPT = Receipt(version=7, checksum=ADAPTER.checksum, canary_logprobs=LEARNER + 0.04, load_seconds=0.1)


def test_noise_below_the_bound_passes():
    assert check(ADAPTER, RECEIPT, bound_nats=0.1) == pytest.approx(0.04, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 6}, ["version 7", "holds 6"]),
        ({"checksum": "f" * 32}, [ADAPTER.checksum, "f" * 32]),
        ({"canary_logprobs": BASE}, ["-2.0000", "-2.5000", "0.5000"]),  # the adapter is silently unused
        ({"canary_logprobs": LEARNER + np.float32("nan")}, ["nan"]),
        ({"canary_logprobs": LEARNER - 0.2}, ["-2.2000", "bound 0.1"]),
    ],
)
def test_mismatch_names_both_numbers(change, words):
    with pytest.raises(AdapterMismatch) as error:
        check(ADAPTER, replace(RECEIPT, **change), bound_nats=0.1)
    for word in words:
        assert word in str(error.value)


def test_unused_adapter_is_found_even_within_a_loose_bound():
    """With a bound of .45 the base lies .5 off; an actor at .42 from the learner is still nearer to the base."""
    receipt = replace(RECEIPT, canary_logprobs=BASE + 0.08)
    with pytest.raises(AdapterMismatch):
        check(ADAPTER, receipt, bound_nats=0.45)


def test_the_checksum_sees_names_shapes_the_dtype_and_single_bits():
    name = "layer.lora_A.weight"
    flipped = {n: t.clone() for n, t in TENSORS.items()}
    flipped[name].view(torch.int32)[0, 0] ^= 1
    reshaped = TENSORS | {name: TENSORS[name].reshape(3, 2)}
    renamed = {n.replace("layer", "other"): t for n, t in TENSORS.items()}
    swapped = dict(reversed(TENSORS.items()))
    assert len({version_7(t).checksum for t in (TENSORS, flipped, reshaped, renamed, swapped)}) == 5
    assert version_7(TENSORS, "bfloat16").checksum != ADAPTER.checksum
    assert version_7({n: t.clone() for n, t in TENSORS.items()}).checksum == ADAPTER.checksum


@pytest.mark.parametrize(("dtype", "item_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_the_values_are_one_buffer_that_is_rounded_once(dtype, item_bytes):
    adapter = version_7(TENSORS, dtype)
    assert adapter.values.shape == (12 * item_bytes,)
    got = tensors(adapter)
    assert list(got) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(got[name], tensor.to(getattr(torch, dtype)))


def test_what_crosses_processes_pickles():
    again, receipt = pickle.loads(pickle.dumps((ADAPTER, RECEIPT)))
    assert all(torch.equal(t, TENSORS[n]) for n, t in tensors(again).items())
    assert receipt.version == 7


class Scripted:
    """Learner and actor in one object, called by .remote(...); a canary takes `seconds`."""

    def __init__(self, seconds, clock):
        self.seconds, self.clock, self.asked = seconds, clock, []
        self.others = []
        self.load = type("Method", (), {"remote": self._load})

    def adapter(self, canary):
        self.asked.append(canary)
        if not canary:
            return replace(ADAPTER, canary=None), self.others
        self.clock[0] += self.seconds
        return replace(ADAPTER, canary=replace(ADAPTER.canary, seconds=self.seconds / 2)), self.others

    def _load(self, adapter):
        logprobs = LEARNER if adapter.canary else None
        return replace(RECEIPT, canary_logprobs=logprobs, canary_seconds=self.seconds / 2 if adapter.canary else 0.0)


@pytest.mark.parametrize(("seconds", "every"), [(0.05, 1), (0.25, 3), (1.0, 10)])
def test_the_canary_takes_a_hundredth_of_the_time(seconds, every, monkeypatch):
    """Steps of 10 s, canaries of .05, .25 and 1 s: every step, every third (2.5), every tenth (of 11 s)."""
    clock = [1000.0]
    local_actor.install(monkeypatch)
    monkeypatch.setattr(channel.time, "perf_counter", lambda: clock[0])
    both = Scripted(seconds, clock)
    made = Channel(local_actor.fleet(both), canary_bound_nats=0.1)
    found = []
    for _ in range(31):
        clock[0] += 10.0
        found.append(made.publish(both))
    asked = [step for step, canary in enumerate(both.asked) if canary]
    assert asked[0] == 0
    gaps = {later - before for before, later in pairwise(asked[1:])}
    assert gaps == {every}
    assert found[-1].canary_version == 7
    assert found[-1].canary_signal == pytest.approx(0.5)


def test_learner_ranks_with_different_adapters_end_the_run(monkeypatch):
    local_actor.install(monkeypatch)
    both = Scripted(0.0, [1000.0])
    both.others = [ADAPTER.checksum, "another"]
    with pytest.raises(AdapterMismatch, match=r"has checksum .* on rank 0 of the learner, but another on rank 2"):
        Channel(local_actor.fleet(both), canary_bound_nats=0.1).publish(both)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"canary_logprobs": BASE}, "does not compute what the learner does"),  # the probe is not used
        ({"version": 6}, "published adapter version 7, but an actor holds 6"),
        ({"checksum": "f" * 32}, "buffers hold other values"),
    ],
)
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_replacement_is_admitted_if_it_holds_the_probe_and_then_the_adapter(monkeypatch, change, words, wrong):
    """`wrong` is the load whose receipt is changed."""
    local_actor.install(monkeypatch)
    both = Scripted(0.0, [1000.0])
    both.probe = lambda: ADAPTER
    both.prefix_difference = type("Method", (), {"remote": lambda token_ids: 0.0})
    made = Channel(local_actor.fleet(both), canary_bound_nats=0.1)
    made.verify(both)
    loaded = []

    def call(method, adapter):
        assert method == "load"
        receipt = replace(RECEIPT, canary_logprobs=LEARNER)
        loaded.append(adapter)
        return replace(receipt, **change) if len(loaded) == wrong + 1 else receipt

    if words is None or (
        wrong == 1 and "canary_logprobs" in change
    ):  # the second load is checked by its checksum alone
        made.admit(call)
        assert loaded == [made._probe, made._adapter]
    else:
        with pytest.raises(AdapterMismatch, match=words):
            made.admit(call)
