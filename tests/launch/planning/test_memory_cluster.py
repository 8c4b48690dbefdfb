"""The memory plan of sides on GPUs of their own and of a base spread over several GPUs, against hand numbers."""

from dataclasses import replace

import pytest

from common.config import ActorConfig, ClusterConfig, Config, LearnerConfig, ModelConfig
from common.types import UserError
from launch.planning import memory, memory_fit
from launch.planning.memory import GIB, Size, Work
from learner.policy.activations import Activations

HIDDEN, LAYERS, INTERMEDIATE, VOCAB = 5120, 64, 27648, 152064  # Qwen2.5-32B, of which 8 key heads of 128
WEIGHTS = 2 * 32_760_000_000
WORK = Work(
    size=Size(
        num_parameters=WEIGHTS // 2,
        num_adapter_parameters=134_000_000,
        kv_elements=2 * LAYERS * 8 * 128,
        kv_heads=8,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        vocab=VOCAB,
    ),
    longest_prompt_tokens=250,
    activations=lambda *_: Activations(kept=GIB, peak=2 * GIB),
)


def config(*, shard: bool, tensor_parallel: int) -> Config:
    return Config(
        model=ModelConfig(dtype="bfloat16"),
        learner=LearnerConfig(num_ranks=8, shard=shard),
        actor=ActorConfig(tensor_parallel=tensor_parallel),
        cluster=ClusterConfig(layout="separate"),
    )


def test_each_gpu_holds_its_share_of_a_spread_base_and_of_an_engine() -> None:
    work = replace(WORK, ranks_beside=8)
    chosen = memory_fit.on_gpu(config(shard=True, tensor_parallel=4), work, 40 * GIB)
    made = memory.plan(chosen, work, 40 * GIB)
    assert made.of("learner", "frozen weights") == WEIGHTS // 8
    layer = HIDDEN * (4 * HIDDEN + 3 * INTERMEDIATE)
    assert made.of("learner", "gathered weights") == 2 * (VOCAB * HIDDEN + 2 * layer)
    assert made.of("actor", "frozen weights") == WEIGHTS // 4
    whole = memory.plan(
        chosen.model_copy(update={"actor": chosen.actor.model_copy(update={"tensor_parallel": 1})}), work, 40 * GIB
    )
    assert whole.of("actor", "adapter") == pytest.approx(4 * made.of("actor", "adapter"), rel=1e-6)
    unset = chosen.actor.model_copy(update={"kv_cache_gib": None})
    of_four = memory.kv_cache_bytes(chosen.model_copy(update={"actor": unset}), work)
    of_one = memory.kv_cache_bytes(
        chosen.model_copy(update={"actor": unset.model_copy(update={"tensor_parallel": 1})}), work
    )
    assert of_one == 4 * of_four
    of_more = memory.kv_cache_bytes(
        chosen.model_copy(update={"actor": unset.model_copy(update={"tensor_parallel": 16})}), work
    )
    assert of_one == 8 * of_more, "with more ranks than key heads several ranks hold the same one"


def test_a_base_that_neither_side_holds_whole_is_refused() -> None:
    with pytest.raises(UserError, match="are too few for this run"):
        memory_fit.on_gpu(config(shard=False, tensor_parallel=4), WORK, 40 * GIB)
    with pytest.raises(UserError, match="are too few for this run"):
        memory_fit.on_gpu(config(shard=True, tensor_parallel=1), replace(WORK, ranks_beside=8), 40 * GIB)


def test_separate_sides_need_not_fit_together() -> None:
    alone = config(shard=False, tensor_parallel=1)
    made = memory.plan(memory_fit.on_gpu(alone, WORK, 80 * GIB), WORK, 80 * GIB)
    assert made.total() == max(made.total("learner"), made.total("actor"))
    together = alone.model_copy(update={"cluster": ClusterConfig()})
    with pytest.raises(UserError, match="are too few for this run"):
        memory_fit.on_gpu(together, WORK, 80 * GIB)
