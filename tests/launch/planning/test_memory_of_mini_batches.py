"""The plan of a step in mini-batches is that of its largest one, learned alone."""

import pytest

from common.command_line import load
from launch.planning import memory
from launch.planning.memory import Size, Work
from launch.runtime.cluster import DEFAULT_CONFIG
from learner.policy.activations import Activations

SIZE = Size(
    num_parameters=10**8, num_adapter_parameters=10**6, kv_elements=10**4, kv_heads=3, hidden=576, intermediate=1536,
    vocab=49152,
)  # fmt: skip


def kept(prompts: int, group_size: int, mini_batches: int) -> int:
    options = ["--model.dtype", "float32", "--learner.micro_batch_tokens", "512", "--learner.recompute", "none"]
    options += ["--run.prompts_per_step", str(prompts), "--actor.group_size", str(group_size)]
    config = load([*options, "--learner.mini_batches", str(mini_batches)], DEFAULT_CONFIG)

    def activations(lengths: tuple[int, ...], recompute: str) -> Activations:
        return Activations(kept=1000 * sum(lengths), peak=1100 * sum(lengths))

    return memory.step_activations(config, Work(size=SIZE, longest_prompt_tokens=50, activations=activations)).kept


@pytest.mark.parametrize(
    ("mini_batches", "prompts", "group_size"),
    [(2, 2, 4), (3, 2, 4), (4, 1, 4), (8, 1, 2), (16, 1, 1)],
)
def test_the_largest_mini_batch_is_planned(mini_batches: int, prompts: int, group_size: int) -> None:
    """Four groups of four in three are 1, 1 and 2 groups; in eight, halves of a group."""
    alone = kept(prompts, max(group_size, 2), 1 if group_size > 1 else 2)
    assert kept(4, 4, mini_batches) == alone
    assert kept(4, 4, 1) > 1.8 * alone
