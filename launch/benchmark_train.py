"""Throughput of whole steps, side by side in one run and by turns.

    python launch/benchmark.py train [--peer trl] [--steps 3] [--config FILE.toml] [OPTIONS of launch/run.py]

Each round runs one whole step of every contender (sampling, reward, learning, publishing) while the others are idle,
in an order that turns around from round to round; the first round warms up and is not counted. Prints a table, and
one JSON object as the last line.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console
from rich.table import Table

from actor.rollout import Sampling
from common.command_line import load
from common.config import Config, MethodConfig
from common.types import UserError
from launch import cluster, plan, wiring
from launch.buffer import PromptStream
from launch.evaluate import sample
from launch.plan import Plan
from launch.record import num_completion_tokens

CONFIG = Path(__file__).parent / "configs" / "benchmark.toml"
METHODS = ("sa-ah-grpo", "grpo")
Seconds = dict[str, float]  # by phase; "step" is the whole


class Horizon:
    """One actor, and a learner for each method, so that methods differ in nothing else."""

    def __init__(self, checked: Plan, stack: ExitStack) -> None:
        self.config = checked.config
        self.stream = PromptStream(checked.train_prompts, seed=self.config.run.seed)
        self.sampling = Sampling.of(self.config)
        self.workers = stack.enter_context(wiring.start(checked))
        self.learners = {self.config.method.name: self.workers.learner}
        for name in METHODS:
            if name not in self.learners:
                config = self.config.model_copy(update={"method": MethodConfig(name=name)})
                self.learners[name] = stack.enter_context(wiring.learner(replace(checked, config=config)))

    def step(self, method: str) -> Seconds:
        """One step of `method`."""
        learner = self.learners[method]
        started = time.perf_counter()
        groups = sample(self.workers.actors, self.stream.draw(self.config.run.prompts_per_step), self.sampling)
        sampled = time.perf_counter()
        result = ray.get(learner.update.remote(groups))
        learned = time.perf_counter()
        self.workers.channel.publish(learner.adapter.remote())
        ended = time.perf_counter()
        assert result.refused is None, result.refused
        return {
            "rollout": sampled - started,
            "learn": learned - sampled,
            "publish": ended - learned,
            "step": ended - started,
            "tokens": num_completion_tokens(groups),
            "learner_peak_bytes": result.metrics["memory/peak_bytes"],
        }


class Peer:
    """TRL's GRPOTrainer in a process of its own (launch/peer_trl.py), blocked between its steps."""

    def __init__(self, checked: Plan, stack: ExitStack) -> None:
        config = checked.config
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prompts = PromptStream(checked.train_prompts, seed=config.run.seed).draw(len(checked.train_prompts))
        job = {
            "model_dir": str(checked.model_folder),
            "task": "gsm8k",  # the composite reward
            "prompts": [list(prompt.messages) for prompt in prompts],
            "answers": [prompt.answer for prompt in prompts],
            "group_size": config.actor.group_size,
            "prompts_per_step": config.run.prompts_per_step,
            "max_tokens": config.actor.max_tokens,
            "fixed_length": config.actor.fixed_length,
            "temperature": config.actor.temperature,
            "beta": config.method.resolve().beta,
            "clip": config.method.resolve().clip_low,
            "learning_rate": config.learner.learning_rate,
            "lora_rank": config.model.lora_rank,
            "lora_alpha": int(config.model.lora_alpha),
            "lora_dropout": config.model.lora_dropout,
            "lora_targets": config.model.lora_targets,
            "seed": config.run.seed,
        }
        (folder / "job.json").write_text(json.dumps(job))
        self.process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "launch.peer_trl", str(folder / "job.json")],
                cwd=cluster.ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        stack.callback(self.process.terminate)
        self._answer()

    def step(self) -> Seconds:
        """One optimizer step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        said = self._answer()
        return {
            "rollout": said["generate_seconds"],
            "learn": said["step_seconds"] - said["generate_seconds"],
            "step": said["step_seconds"],
            "tokens": said["tokens"],
            "learner_peak_bytes": said["peak_bytes"],
        }

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the TRL process ended with status {self.process.wait()}; run it alone to see why")
        return json.loads(line)


def rounds(contenders: dict[str, Callable[[], Seconds]], steps: int) -> dict[str, list[Seconds]]:
    """`steps` measured rounds after one that warms up."""
    measured: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for number in range(steps + 1):
        order = list(contenders) if number % 2 else list(contenders)[::-1]
        for name in order:
            seconds = contenders[name]()
            print(f"round {number}: {name} {seconds['step']:.2f} s", file=sys.stderr)
            if number:
                measured[name].append(seconds)
    return measured


def ratios(measured: dict[str, list[Seconds]], above: str, below: str) -> list[float]:
    """Step time of `above` over that of `below`, round by round."""
    pairs = zip(measured[above], measured[below], strict=True)
    return [a["step"] / b["step"] for a, b in pairs]


def summary(config: Config, measured: dict[str, list[Seconds]]) -> dict[str, Any]:
    """The JSON object: medians, spreads and every figure behind them."""
    sa_ah = ratios(measured, *METHODS)
    over_trl = ratios(measured, "trl", METHODS[0]) if "trl" in measured else None
    return {
        "machine": {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "processor": platform.processor() or platform.machine(),
            "cores": len(wiring.cores()),
        },
        "model": config.model.path,
        "work": {
            "prompts": config.run.prompts_per_step,
            "completions": config.actor.group_size,
            "max_tokens": config.actor.max_tokens,
            "publish": config.actor.publish,
        },
        "measured": measured,
        "sa_ah_over_grpo": statistics.median(sa_ah),
        "sa_ah_over_grpo_by_round": sa_ah,
        "speedup_over_trl": statistics.median(over_trl) if over_trl else None,
        "speedup_over_trl_by_round": over_trl,
    }


def table(measured: dict[str, list[Seconds]]) -> Table:
    """Median seconds by phase, with the range of whole steps."""
    drawn = Table("", "rollout s", "learn s", "publish s", "step s", "range", "tokens/s", "learner peak GB")
    for name, rows in measured.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        steps = [row["step"] for row in rows]
        drawn.add_row(
            name,
            f"{middle['rollout']:.2f}",
            f"{middle['learn']:.2f}",
            f"{middle['publish']:.2f}" if "publish" in middle else "-",
            f"{middle['step']:.2f}",
            f"{min(steps):.2f}-{max(steps):.2f}",
            f"{middle['tokens'] / middle['step']:.0f}",
            f"{middle['learner_peak_bytes'] / 1e9:.1f}",
        )
    return drawn


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["trl"])
    parser.add_argument("--steps", type=int, default=3)
    arguments, options = parser.parse_known_args(list(argv))
    try:
        if arguments.steps < 1:
            raise UserError(f"--steps {arguments.steps} measures nothing; ask for 1 or more")
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            checked = plan.make(load([*options, "--run.dir", folder], CONFIG))
            stack.enter_context(cluster.connect())
            horizon = Horizon(checked, stack)
            contenders: dict[str, Callable[[], Seconds]] = {name: partial(horizon.step, name) for name in METHODS}
            if arguments.peer == "trl":
                contenders["trl"] = Peer(checked, stack).step
            measured = rounds(contenders, arguments.steps)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    Console(width=120).print(table(measured))
    print(json.dumps(summary(checked.config, measured)))
    return 0
