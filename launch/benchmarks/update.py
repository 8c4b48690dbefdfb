"""Interleaved methods in one learner: the cost of an update, without sampling and publishing.

    python launch/benchmark.py learn [--pairs 20] [--prompt-tokens 100] [OPTIONS of launch/run.py]

One learner, in this process, updates on the same random rollouts (run.prompts_per_step prompts, actor.group_size
completions each of actor.max_tokens tokens) with both methods, in an order that alternates from pair to pair; the first
pair warms up and is not counted. Needs no Ray and no vLLM.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from common.command_line import load
from common.config import Config
from common.methods import MethodConfig
from common.types import Group, UserError
from launch.planning import devices, memory_fit, model_folder, plan
from launch.planning.synthetic import synthetic_groups
from learner.learner import Learner
from learner.objective import Objective

CONFIG = Path(__file__).parents[1] / "configs" / "benchmark.toml"
CONTENDERS = ("sa-ah-grpo", "grpo")


def random_groups(config: Config, vocab_size: int, prompt_tokens: int) -> list[Group]:
    """The groups of one step."""
    return synthetic_groups(
        config.run.prompts_per_step,
        config.actor.group_size,
        prompt_tokens=prompt_tokens,
        completion_tokens=config.actor.max_tokens,
        vocab_size=vocab_size,
        seed=config.run.seed,
    )


def with_method(config: Config, method: MethodConfig) -> Config:
    """`config` with another method. If the method's importance weights are unset, those of `config` stay."""
    importance = config.method.importance if method.importance == "auto" else method.importance
    return config.model_copy(update={"method": method.model_copy(update={"importance": importance})})


def planned(options: Sequence[str], prompt_tokens: int) -> tuple[Config, Path, PreTrainedModel]:
    """The completed configuration of benchmark.toml and `options`, the model's folder, and the model without weights.

    Raises UserError for what is invalid or does not fit.
    """
    config = plan.with_importance(load(options, CONFIG))
    folder = model_folder.resolve(config.model.path)
    model = plan.check_model(config, folder)
    config, _ = memory_fit.resolve(config, model, longest_prompt_tokens=prompt_tokens, gpus=devices.here())
    return config, folder, model


def measure(learner: Learner, groups: Sequence[Group], pairs: int) -> dict[str, list[float]]:
    """Seconds of `pairs` counted updates, by method."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(pairs + 1):
        for name in CONTENDERS[:: -1 if number % 2 else 1]:
            config = with_method(learner.config, MethodConfig(name=name))
            learner.objective = Objective(config, learner.policy.vocab_size)
            started = time.perf_counter()
            result = learner.update(groups)
            elapsed = time.perf_counter() - started
            assert result.skipped is None, result.skipped
            if number:
                seconds[name].append(elapsed)
    return seconds


def summary(seconds: dict[str, list[float]], num_tokens: int) -> dict[str, Any]:
    """Ratios of the pairs, and completion tokens per second."""
    ratios = sorted(a / b for a, b in zip(*(seconds[name] for name in CONTENDERS), strict=True))
    return {
        "completion_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_second": {name: num_tokens / statistics.median(each) for name, each in seconds.items()},
        "sa_ah_over_grpo": statistics.median(ratios),
        "sa_ah_over_grpo_quartiles": statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios,
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    arguments, options = parser.parse_known_args(list(argv))
    try:
        for name in ("pairs", "prompt_tokens"):
            if getattr(arguments, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give 1 or more")
        config, folder, _ = planned(options, arguments.prompt_tokens)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    learner = Learner(folder, config, np.arange(8, dtype=np.int32))
    groups = random_groups(config, learner.policy.vocab_size, arguments.prompt_tokens)
    num_tokens = sum(int(rollout.mask.sum()) for group in groups for rollout in group.rollouts)
    result = summary(measure(learner, groups, arguments.pairs), num_tokens)
    for name, each in result["seconds"].items():
        print(
            f"{name:12} median {statistics.median(each):.2f} s ({min(each):.2f}-{max(each):.2f}), "
            f"{result['tokens_per_second'][name]:.0f} completion tokens/s"
        )
    low, *_, high = result["sa_ah_over_grpo_quartiles"]
    print(f"sa-ah-grpo / grpo: median {result['sa_ah_over_grpo']:.3f}, quartiles {low:.3f}-{high:.3f}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(json.dumps({"gpu": gpu, "model": config.model.path, **result}))
    return 0
