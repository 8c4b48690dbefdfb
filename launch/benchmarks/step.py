"""Throughput of whole steps of several contenders, interleaved in one run.

    python launch/benchmark.py train [--peer trl [--peer-after]] [--steps 3] [--batches 2 4 8] [--methods reft erpo]
                                     [--model-shape qwen2.5-3b] [--out FOLDER] [--config FILE.toml]
                                     [OPTIONS of launch/run.py]

Each round runs one whole step of every contender (sampling, reward, learning, publishing) while the others are idle, in
an order that alternates from round to round; the first round warms up and is not counted. --batches then runs two steps
of each multiple of the prompts, counts the second, and fits how the cost grows with the tokens. Prints a table, and one
JSON object as the last line; --out saves that and a chart. --methods adds further methods, without their group filter,
refill and inner updates, so that all of them learn from the same tokens; --model-shape takes random weights of a
published shape. --peer-after runs the peer after our side has ended, for GPUs on which the two do not fit together.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig

from actor.rollout import Sampling
from common.command_line import load
from common.config import Config, with_values
from common.methods import METHODS, MethodConfig
from common.types import Group, UpdateResult, UserError
from launch.benchmarks import roofline, step_results
from launch.benchmarks.update import CONFIG, with_method
from launch.planning import model_folder, plan
from launch.planning.plan import Plan
from launch.recording.recorder import num_completion_tokens
from launch.runtime import cluster, workers
from learner.learner import Learner
from learner.objective import Objective, demands

CONTENDERS = {
    "sa-ah-grpo": MethodConfig(name="sa-ah-grpo"),
    "alpha 0": MethodConfig.model_validate({"name": "sa-ah-grpo", "alpha": 0.0}),
    "grpo": MethodConfig(name="grpo"),
}
Measured = dict[str, float]  # one step: seconds by phase ("step" is the whole), rooflines, tokens, bytes


class AnyMethod(Learner):
    """A learner that takes another objective at each step; the benchmarked methods differ in nothing else."""

    def update_with(self, config: Config, groups: Sequence[Group]) -> UpdateResult:
        self.objective = Objective(config, self.policy.vocab_size)
        return self.update(groups)


class Horizon:
    """One actor and one learner, and the roofline of their steps."""

    def __init__(self, checked: Plan, stack: ExitStack) -> None:
        self.config = checked.config
        self.stream = checked.stream()
        self.shape = roofline.shape(AutoConfig.from_pretrained(checked.model_folder), self.config.model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rates = roofline.measure_rates(getattr(torch, self.config.model.dtype), device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the workers need the memory
        self.workers = stack.enter_context(workers.start(checked, learner_class=AnyMethod))

    def step(self, method: MethodConfig, batch: int = 1) -> Measured:
        """One step of `method` on `batch` times run.prompts_per_step prompts."""
        started = time.perf_counter()
        prompts = self.stream.draw(batch * self.config.run.prompts_per_step)
        config = with_method(self.config, method)
        groups = self.workers.fleet.sample(prompts, Sampling.of(config))
        sampled = time.perf_counter()
        result = self.workers.learner.call("update_with", config, groups)
        learned = time.perf_counter()
        published = self.workers.channel.publish(self.workers.learner)
        ended = time.perf_counter()
        assert result.skipped is None, result.skipped
        return {
            "rollout": sampled - started,
            "reward": max(group.reward_seconds for group in groups),
            "learn": learned - sampled,
            "publish": ended - learned,
            "load": published.load_seconds,
            "step": ended - started,
            "tokens": num_completion_tokens(groups),
            "learner_peak_bytes": result.metrics["memory/peak_bytes"],
            "rollout_roofline": roofline.rollout_seconds(groups, self.shape, self.rates),
            "learn_roofline": roofline.learn_seconds(
                groups, self.shape, self.rates, reference=demands(config).reference
            ),
        }


class Peer:
    """TRL's GRPOTrainer in a process of its own (launch/benchmarks/trl_peer.py), blocked between its steps."""

    def __init__(self, checked: Plan, stack: ExitStack) -> None:
        config = checked.config
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prompts = checked.stream().draw(len(checked.prompts.train))
        job: dict[str, Any] = {
            "config": config.model_dump(mode="json"),
            "model_dir": str(checked.model_folder),
            "prompts": [list(prompt.messages) for prompt in prompts],
            "answers": [prompt.answer for prompt in prompts],
        }
        if checked.memory is not None:  # TRL's vLLM gets as much memory as ours
            gpu_bytes = torch.cuda.get_device_properties(0).total_memory
            job["gpu_memory_fraction"] = round(checked.memory.total("actor") / gpu_bytes, 4)
        (folder / "job.json").write_text(json.dumps(job))
        self.process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "launch.benchmarks.trl_peer", str(folder / "job.json")],
                cwd=cluster.ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        stack.callback(self.process.terminate)
        self._answer()

    def step(self) -> Measured:
        """One optimizer step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        result = self._answer()
        return {
            "rollout": result["generate_seconds"],
            "learn": result["step_seconds"] - result["generate_seconds"],
            "step": result["step_seconds"],
            "tokens": result["tokens"],
            "learner_peak_bytes": result["peak_bytes"],
        }

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the TRL process ended with status {self.process.wait()}; run it alone to see why")
        return json.loads(line)


def rounds(contenders: Mapping[str, Callable[[], Measured]], steps: int) -> dict[str, list[Measured]]:
    """`steps` measured rounds after one that warms up."""
    measured: dict[str, list[Measured]] = {name: [] for name in contenders}
    for number in range(steps + 1):
        order = list(contenders) if number % 2 else list(contenders)[::-1]
        for name in order:
            seconds = contenders[name]()
            print(f"round {number}: {name} {seconds['step']:.2f} s", file=sys.stderr)
            if number:
                measured[name].append(seconds)
    return measured


def _planned(config: Config, batch: int) -> Plan:
    """The plan of `config`, with memory for steps of `batch` times its prompts."""
    number = config.run.prompts_per_step
    planned = plan.make(with_values(config, {"run.prompts_per_step": number * batch}))
    return replace(planned, config=with_values(planned.config, {"run.prompts_per_step": number}))


def _measure(
    arguments: argparse.Namespace, checked: Plan, methods: dict[str, MethodConfig]
) -> tuple[roofline.Rates, dict[str, list[Measured]], dict[int, Measured]]:
    """The device's rates, the rounds of every contender, and one of our steps for each multiple of the prompts."""
    with ExitStack() as stack:
        stack.enter_context(cluster.connect())
        horizon = Horizon(checked, stack)
        contenders: dict[str, Callable[[], Measured]] = {
            name: partial(horizon.step, method) for name, method in (CONTENDERS | methods).items()
        }
        if arguments.peer and not arguments.peer_after:
            contenders["trl"] = Peer(checked, stack).step
        measured = rounds(contenders, arguments.steps)
        batches = {}
        for batch in sorted({1, *arguments.batches}) if arguments.batches else []:
            horizon.step(CONTENDERS["sa-ah-grpo"], batch)
            batches[batch] = horizon.step(CONTENDERS["sa-ah-grpo"], batch)
    if arguments.peer and arguments.peer_after:
        with ExitStack() as stack:
            measured |= rounds({"trl": Peer(checked, stack).step}, arguments.steps)
    return horizon.rates, measured, batches


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["trl"])
    parser.add_argument("--peer-after", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="*", default=[])
    parser.add_argument("--model-shape", choices=model_folder.SHAPES)
    parser.add_argument("--methods", nargs="*", default=[], choices=METHODS, help="further methods to measure")
    parser.add_argument("--out", type=Path)
    arguments, options = parser.parse_known_args(list(argv))
    methods = {
        name: MethodConfig.model_validate({"name": name, "group_filter": "none"})
        for name in arguments.methods
        if name not in CONTENDERS
    }
    try:
        for flag, values in (("steps", [arguments.steps]), ("batches", arguments.batches)):
            if min(values, default=1) < 1:
                raise UserError(f"--{flag} {min(values)} measures nothing; ask for 1 or more")
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if arguments.model_shape:
                made = model_folder.random_weights(arguments.model_shape, folder / arguments.model_shape)
                options += ["--model.path", str(made)]
            config = load([*options, "--run.dir", str(folder / "run")], CONFIG)
            if config.run.max_staleness:
                raise UserError(f"run.max_staleness={config.run.max_staleness} changes from step to step; set it to 0")
            checked = _planned(config, max([1, *arguments.batches]))
            checked.refuse_absent_gpu()
            rates, measured, batches = _measure(arguments, checked, methods)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    model = arguments.model_shape or checked.config.model.path
    summary = step_results.summary(checked, model, rates, measured, batches)
    Console(width=140).print(step_results.table(measured))
    if arguments.out:
        step_results.keep(arguments.out, summary)
    print(json.dumps(summary))
    return 0
