"""learner.shard: the base spread over two ranks gives the same gradient as the whole base, and holds half of it."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_processes
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learner.learner import Learner
from learner.ranks import Ranks

pytestmark = pytest.mark.slow

UNEVEN = {
    "micro_batch_tokens": 40,
    "gradient_accumulation": 3,
}  # seven micro-batches: four and three, which repeats one


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model, and one whose head is no embedding."""
    tied, untied = (tmp_path_factory.mktemp(name) for name in ("tied", "untied"))
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=tiny.V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(untied)
    return {"tied": tiny.save_model(tied), "untied": untied}


@pytest.fixture
def pool() -> Iterator[ProcessPoolExecutor]:
    """Fresh processes: torch's default group, over which the base is spread, is made once in each."""
    with rank_processes.processes(2) as made:
        yield made


def updates(ranks: Ranks, folder: Path, method: str, options: dict[str, Any], *, sharded: bool) -> dict[str, Any]:
    """Two steps: the gradient of the first, the weights and the metrics after the second, and the canary's."""
    made = Learner(folder, tiny.config(dropout=0.3, method={"name": method}, **options), tiny.CANARY, ranks=ranks)
    if sharded:
        made.policy.shard(ranks)
    tiny.move_adapter(made)
    gradients = tiny.kept_gradients(made)
    results = [made.update(tiny.groups()) for _ in range(2)]
    canary = made.adapter(True).canary
    assert canary is not None
    frozen = [parameter for parameter in made.policy.peft_model.parameters() if not parameter.requires_grad]
    held = [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in frozen]
    return {
        "gradient": gradients[0],
        "weights": torch.cat([p.flatten() for p in made.policy.parameters()]).detach().numpy(),
        "metrics": {k: v for k, v in results[-1].metrics.items() if k != "memory/peak_bytes"},
        "canary": (canary.logprobs, canary.base_logprobs),
        "held": sum(each.untyped_storage().nbytes() for each in held),
    }


def whole(ranks: Ranks, *arguments: Any) -> dict[str, Any]:
    return updates(ranks, *arguments, sharded=False)


def spread(ranks: Ranks, *arguments: Any) -> dict[str, Any]:
    return updates(ranks, *arguments, sharded=True)


def compare(pool: ProcessPoolExecutor, *arguments: Any) -> None:
    expected = rank_processes.on_ranks(pool, 2, whole, *arguments)
    found = rank_processes.on_ranks(pool, 2, spread, *arguments)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours["gradient"], theirs["gradient"])
        np.testing.assert_array_equal(ours["weights"], theirs["weights"])
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=0, abs=0, nan_ok=True)
        for mine, other in zip(ours["canary"], theirs["canary"], strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-5)
        assert ours["held"] <= 0.51 * theirs["held"]


@pytest.mark.parametrize(
    ("model", "method", "options"),
    [
        ("tied", "sa-ah-grpo", {"recompute": "none", "inner_updates": 2} | UNEVEN),
        pytest.param("untied", "arca", {"recompute": "none"} | UNEVEN, marks=pytest.mark.long),
        pytest.param("tied", "sa-ah-grpo", {"recompute": "layer"} | UNEVEN, marks=pytest.mark.long),
        pytest.param("untied", "sa-ah-grpo", {"recompute": "micro-batch"} | UNEVEN, marks=pytest.mark.long),
        # One micro-batch for each group of three, and with one row each none is left for some.
        pytest.param("tied", "sa-ah-grpo", {"micro_batch_tokens": 4096}, marks=pytest.mark.long),
    ],
)
def test_a_spread_base_gives_the_gradient_of_the_whole_one(
    folders: dict[str, Path], pool: ProcessPoolExecutor, model: str, method: str, options: dict[str, Any]
) -> None:
    compare(pool, folders[model], method, options)
