"""The operations of one update and of one sampling, by their own time.

    python launch/benchmark.py profile [--model-shape qwen2.5-3b] [--prompt-tokens 100] [--top 20]
                                       [OPTIONS of launch/run.py]

The learner updates on random rollouts (run.prompts_per_step prompts, actor.group_size completions each of
actor.max_tokens tokens), then vLLM samples as many from random prompts. Both run in this process, once to warm up and
once under torch's profiler: kernels on a GPU, operators on a CPU. The profiler slows both: only shares count.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from actor.vllm_engine import VLLMEngine
from common.adapter import Adapter
from common.config import Config
from common.types import UserError
from launch.benchmarks.update import planned, random_groups
from launch.planning import model_folder
from learner.learner import Learner


def operations(work: Callable[[], object], title: str, top: int) -> dict[str, float]:
    """Own seconds of each operation in one call of `work`, after a warm-up; longest first. Prints the `top` longest."""
    on_gpu = torch.cuda.is_available()
    own_time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    work()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    found = profiled.key_averages()
    print(found.table(sort_by=own_time, row_limit=top, max_name_column_width=90, header=title))
    seconds = {event.key: getattr(event, own_time) / 1e6 for event in found}
    return {name: each for name, each in sorted(seconds.items(), key=lambda item: -item[1]) if each > 0}


def _update(folder: Path, config: Config, prompt_tokens: int, top: int) -> tuple[dict[str, float], Adapter]:
    learner = Learner(folder, config, np.arange(8, dtype=np.int32))
    groups = random_groups(config, learner.policy.vocab_size, prompt_tokens)
    return operations(lambda: learner.update(groups), "update", top), learner.adapter()


def _sampling(folder: Path, config: Config, prompts: list[list[int]], adapter: Adapter, top: int) -> dict[str, float]:
    engine = VLLMEngine(str(folder), config.model, config.actor, seed=config.run.seed)
    engine.load(adapter)
    found = operations(
        lambda: engine.sample(
            prompts,
            num_samples=config.actor.group_size,
            temperature=config.actor.temperature,
            max_tokens=config.actor.max_tokens,
            stop=(),
            seeds=range(len(prompts)),
            fixed_length=True,
        ),
        "sampling",
        top,
    )
    engine.close()
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-shape", choices=model_folder.SHAPES)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--top", type=int, default=20)
    arguments, options = parser.parse_known_args(list(argv))
    with tempfile.TemporaryDirectory() as temporary:
        try:
            if arguments.model_shape:
                made = model_folder.random_weights(arguments.model_shape, Path(temporary) / arguments.model_shape)
                options += ["--model.path", str(made)]
            config, folder, model = planned(options, arguments.prompt_tokens)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        result: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
        result["update"], adapter = _update(folder, config, arguments.prompt_tokens, arguments.top)
        gc.collect()  # frees the learner's tensors before vLLM allocates its share
        torch.cuda.empty_cache()
        size = (config.run.prompts_per_step, arguments.prompt_tokens)
        prompts = np.random.default_rng(config.run.seed).integers(model.config.get_text_config().vocab_size, size=size)
        result["sampling"] = _sampling(folder, config, prompts.tolist(), adapter, arguments.top)
    print(json.dumps(result))
    return 0
