"""The channel: what counts as proof that an actor samples with the published adapter."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from actor.actor import Receipt
from common.adapter import Adapter, Canary, checksum
from launch.channel import AdapterMismatch, check

TENSORS = {"layer.lora_A.weight": np.ones((2, 3), np.float32), "layer.lora_B.weight": np.zeros((3, 2), np.float32)}
LEARNER = np.array([-1.0, -2.0, -3.0], np.float32)
BASE = np.array([-1.5, -2.5, -3.5], np.float32)
ADAPTER = Adapter(
    version=7,
    tensors=TENSORS,
    rank=2,
    alpha=4.0,
    target_modules=("layer",),
    canary=Canary(token_ids=np.arange(4, dtype=np.int32), logprobs=LEARNER, base_logprobs=BASE),
    checksum=checksum(TENSORS),
)
RECEIPT = Receipt(version=7, checksum=ADAPTER.checksum, canary_logprobs=LEARNER + 0.04, load_seconds=0.1, way="merged")


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


def test_checksum_sees_names_shapes_and_single_bits():
    assert checksum(dict(reversed(TENSORS.items()))) == ADAPTER.checksum  # order does not matter
    flipped = {n: t.copy() for n, t in TENSORS.items()}
    flipped["layer.lora_A.weight"].view(np.uint8)[0, 0] ^= 1
    reshaped = TENSORS | {"layer.lora_A.weight": TENSORS["layer.lora_A.weight"].reshape(3, 2)}
    renamed = {n.replace("layer", "other"): t for n, t in TENSORS.items()}
    assert len({checksum(t) for t in (TENSORS, flipped, reshaped, renamed)}) == 4


def test_what_crosses_processes_pickles():
    again = pickle.loads(pickle.dumps((ADAPTER, RECEIPT)))
    assert checksum(again[0].tensors) == ADAPTER.checksum
    assert again[1].version == 7
