"""Ranks are only a cut of the step: the same gradient, metrics and adapter for any number of them, dropout included."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_processes
import tiny
import torch

from common.command_line import load
from common.methods import METHODS
from launch.planning import model_folder
from launch.planning.synthetic import synthetic_groups
from launch.runtime.cluster import DEFAULT_CONFIG
from learner.learner import Learner
from learner.ranks import Ranks

OWN = """
import torch
from common.methods import Method

METHOD = Method(paper="mine", equation="-", advantage="rank_method.ranks", token_weight="rank_method.early")


def ranks(rewards_PG):
    return rewards_PG.argsort(dim=-1).argsort(dim=-1) - (rewards_PG.shape[-1] - 1) / 2


def early(entropy_BT, mask_BT, advantages_B):
    return 1.0 / torch.arange(1, mask_BT.shape[1] + 1, dtype=torch.float64).expand_as(entropy_BT)
"""
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in METHODS},
    "weight gradient over the step": {
        "name": "sa-ah-grpo",
        "alpha": 3.0,
        "weight_gradient": True,
        "normaliser": "step",
    },
    "adaptive bonus": {"name": "sa-ah-grpo", "entropy_bonus": 0.3, "entropy_target": 9.0},
    "top-K entropy at another temperature": {"name": "ah-grpo", "entropy": "topk-partial", "entropy_topk": 10},
    "a user's own": {"name": "rank_method"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "rank_method.py").write_text(OWN)
    return tiny.save_model(folder)


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[ProcessPoolExecutor]:
    """Four processes: the imports take longer than all that they compute."""
    with pytest.MonkeyPatch.context() as patch, rank_processes.processes(4) as made:
        patch.syspath_prepend(folder)
        yield made


def updates(ranks: Ranks, folder: Path, method: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Three steps of a tiny learner: the first gradient, and at the end metrics and weights."""
    options = dict(options)
    double = options.pop("double", False)
    config = tiny.config(method=method, gradient_accumulation=3, **options)
    made = Learner(folder, config, tiny.CANARY, ranks=ranks)
    if double:
        made.policy.peft_model.double()
    tiny.move_adapter(made)
    gradients = tiny.kept_gradients(made)
    results = [made.update(tiny.groups()) for _ in range(3)]
    return {
        "gradient": gradients[0],
        "micro_batches": options["micro_batch_tokens"],
        "metrics": {k: v for k, v in results[-1].metrics.items() if k != "memory/peak_bytes"},
        "tokens": [t and (t.advantage, t.entropies, t.weights) for t in results[0].tokens],
        "skipped": [r.skipped for r in results],
        "weights": torch.cat([p.flatten() for p in made.policy.parameters()]).detach().numpy(),
        "bonus": made.objective.entropy_bonus,
    }


def relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


FAST = ("sa-ah-grpo", "arca", "a user's own")


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v if v in FAST else pytest.param(v, marks=pytest.mark.long) for v in VARIANTS])
def test_the_gradient_is_the_same_for_any_number_of_ranks(
    folder: Path, pool: ProcessPoolExecutor, variant: str
) -> None:
    """With dropout where the method allows it; micro-batches of 40 tokens are seven, of uneven lengths."""
    inner = 1 if VARIANTS[variant].get("weight_gradient") else 2
    options = {"dropout": 0.3, "micro_batch_tokens": 40, "inner_updates": inner}
    [alone] = rank_processes.on_ranks(pool, 1, updates, folder, VARIANTS[variant], options)
    for world in (2, 4):
        found = rank_processes.on_ranks(pool, world, updates, folder, VARIANTS[variant], options)
        for each in found:
            assert relative(each["gradient"], alone["gradient"]) < 1e-6
            assert each["skipped"] == alone["skipped"] == [None] * 3
            assert each["bonus"] == pytest.approx(alone["bonus"])
            assert each["metrics"] == pytest.approx(alone["metrics"], rel=1e-3, abs=1e-5, nan_ok=True)
            for ours, theirs in zip(each["tokens"], alone["tokens"], strict=True):
                np.testing.assert_equal(ours, theirs)
        for other in found[1:]:
            np.testing.assert_array_equal(other["weights"], found[0]["weights"])
            assert other["metrics"] == pytest.approx(found[0]["metrics"], rel=0, abs=0, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sa-ah-grpo", "arca", "holder"])
def test_mini_batches_are_the_same_for_any_number_of_ranks(
    folder: Path, pool: ProcessPoolExecutor, variant: str
) -> None:
    """A mini-batch has fewer micro-batches than four ranks, and others compute them than in the first pass."""
    options = {"dropout": 0.3, "micro_batch_tokens": 60, "mini_batches": 3, "double": True}
    [alone] = rank_processes.on_ranks(pool, 1, updates, folder, {"name": variant}, options)
    for world in (2, 4):
        for each in rank_processes.on_ranks(pool, world, updates, folder, {"name": variant}, options):
            assert relative(each["gradient"], alone["gradient"]) < 1e-12
            assert relative(each["weights"], alone["weights"]) < 1e-9
            assert each["skipped"] == [None] * 3


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sa-ah-grpo", "arca", "weight gradient over the step"])
def test_in_float64_the_gradient_is_the_same_to_its_rounding(
    folder: Path, pool: ProcessPoolExecutor, variant: str
) -> None:
    options = {"dropout": 0.3, "micro_batch_tokens": 40, "double": True}
    [alone] = rank_processes.on_ranks(pool, 1, updates, folder, VARIANTS[variant], options)
    assert alone["gradient"].dtype == np.float64
    for each in rank_processes.on_ranks(pool, 2, updates, folder, VARIANTS[variant], options):
        assert relative(each["gradient"], alone["gradient"]) < 1e-12


@pytest.mark.slow
def test_a_rank_without_a_micro_batch_adds_nothing(folder: Path, pool: ProcessPoolExecutor) -> None:
    """Three groups in one row each are three micro-batches: the fourth rank has none. ARCA's residual included."""
    options = {"micro_batch_tokens": 4096}
    for name in ("sa-ah-grpo", "arca"):
        [alone] = rank_processes.on_ranks(pool, 1, updates, folder, {"name": name}, options)
        for each in rank_processes.on_ranks(pool, 4, updates, folder, {"name": name}, options):
            assert relative(each["gradient"], alone["gradient"]) < 1e-6


def not_finite(ranks: Ranks, folder: Path) -> tuple[str | None, bool]:
    """A learner of which one rank alone makes a gradient that is not finite."""
    made = Learner(folder, tiny.config(micro_batch_tokens=40, gradient_accumulation=3), tiny.CANARY, ranks=ranks)
    before = [p.detach().clone() for p in made.policy.parameters()]
    if ranks.rank == 1:
        made.policy.parameters()[0].register_hook(lambda gradient: gradient * torch.nan)
    skipped = made.update(tiny.groups()).skipped
    return skipped, all(map(torch.equal, made.policy.parameters(), before))


@pytest.mark.slow
def test_a_step_that_one_rank_cannot_take_is_skipped_by_all(folder: Path, pool: ProcessPoolExecutor) -> None:
    for skipped, stayed in rank_processes.on_ranks(pool, 2, not_finite, folder):
        assert skipped == "gradient norm nan"
        assert stayed


def one_raises(ranks: Ranks, folder: Path) -> str:
    """An update in which one rank fails before the sums; the text of the error."""
    made = Learner(folder, tiny.config(micro_batch_tokens=40, gradient_accumulation=3), tiny.CANARY, ranks=ranks)
    if ranks.rank == 1:
        made.policy.forward = lambda *_, **__: (_ for _ in ()).throw(ValueError("broken"))  # type: ignore[method-assign]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        made.update(tiny.groups())
    return type(caught.value).__name__


@pytest.mark.slow
def test_a_rank_that_raises_frees_the_others(folder: Path, pool: ProcessPoolExecutor) -> None:
    """Its process lives on, so that no broken connection would tell them; their time-out is a minute."""
    started = time.monotonic()
    assert rank_processes.on_ranks(pool, 2, one_raises, folder) == ["PeerLost", "ValueError"]
    assert time.monotonic() - started < 45


def sum_until_killed(ranks: Ranks, victim: int, seconds: Any) -> None:
    """Puts the seconds until the sum that never comes fails. The victim kills itself before it."""
    ranks._sum(torch.ones(3))
    if ranks.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        ranks._sum(torch.ones(3))
    seconds.put(time.monotonic() - started)
    time.sleep(60)  # the end of this process would free the others too


@pytest.mark.slow
def test_a_killed_rank_frees_all_the_others() -> None:
    """Not only its neighbours in the ring, and long before the time-out of a minute."""
    context = multiprocessing.get_context("spawn")
    seconds, port = context.Queue(), rank_processes.free_port()
    ranks = [
        context.Process(target=rank_processes.on_rank, args=(rank, 4, port, sum_until_killed, (1, seconds)))
        for rank in range(4)
    ]
    for process in ranks:
        process.start()
    try:
        assert max(seconds.get(timeout=50) for _ in range(3)) < 20
    finally:
        for process in ranks:
            process.kill()


def twenty_steps(ranks: Ranks, folder: Path, options: list[str]) -> tuple[list[dict[str, float]], str]:
    """The metrics of each step of the default run on synthetic rollouts, and the adapter's checksum at the end."""
    config = load([*options, "--method.importance", "none", "--learner.gradient_accumulation", "4"], DEFAULT_CONFIG)
    made = Learner(folder, config, tiny.CANARY, ranks=ranks)
    steps = []
    for step in range(20):
        groups = synthetic_groups(
            2, 4, prompt_tokens=12, completion_tokens=12, vocab_size=made.policy.vocab_size, seed=step
        )
        steps.append({k: v for k, v in made.update(groups).metrics.items() if k != "memory/peak_bytes"})
    return steps, made.checksum()


@pytest.mark.long
def test_twenty_steps_of_the_default_run_have_the_same_metrics_on_two_ranks(pool: ProcessPoolExecutor) -> None:
    folder = model_folder.smollm2()
    options = ["--model.dtype", "float32", "--learner.recompute", "none", "--learner.micro_batch_tokens", "4096"]
    options += ["--model.lora_dropout", "0.05", "--actor.max_tokens", "12", "--run.steps", "20"]
    [(alone, _)] = rank_processes.on_ranks(pool, 1, twenty_steps, folder, options)
    (first, checksum), (second, other) = rank_processes.on_ranks(pool, 2, twenty_steps, folder, options)
    assert checksum == other
    for mine, theirs, expected in zip(first, second, alone, strict=True):
        assert mine == theirs
        assert mine == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_alone_nothing_is_summed_and_a_rank_that_has_not_joined_says_so() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    Ranks().sum_gradients([parameter])
    assert parameter.grad is None
    with pytest.raises(RuntimeError, match="rank 1 of 2 is in no group"):
        Ranks(1, 2).sum_gradients([parameter])
