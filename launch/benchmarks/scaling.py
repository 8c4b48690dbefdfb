"""How throughput grows with devices: measured on a few, and modelled on many.

    python launch/benchmark.py scaling [--devices 1 2] [--actors 1 2] [--steps 3] [--publish-actors 4] [--out FOLDER]
                                       [--cluster.layout separate] [--config FILE.toml] [OPTIONS of launch/run.py]

--devices are numbers of learner ranks, --actors the numbers of actors beside them (unset: as many). Without a GPU a
device is an equal share of the processors, the same in every contender, and the contenders' steps are interleaved; on
GPUs one contender runs after the other. Each takes steps of run.prompts_per_step prompts (fixed work) and of that many
per device (growing work; the first contender at least twice as many); the first round warms up and is not counted. Then
an adapter is published to 1, 2, ... --publish-actors actors. The cost model of launch/benchmarks/scaling_model.py is
fitted to all of this and extrapolated. Prints tables with measured and modelled columns apart, and one JSON object as
the last line; --out saves that and a chart.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from common.command_line import load
from common.config import Config, value_of, with_values
from common.types import UserError
from launch.benchmarks import scaling_contender, scaling_results
from launch.benchmarks.scaling_contender import Remote
from launch.benchmarks.scaling_measured import Measured, Point, Step
from launch.benchmarks.update import CONFIG
from launch.planning import plan
from launch.planning.plan import Plan

SAME = ("learner.recompute", "learner.micro_batch_tokens")  # as planned for the first contender: the largest part
PUBLISHES = 5  # rounds of them for each round of steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A contender: its plan, and the prompts of its steps at fixed and at growing work."""

    plan: Plan
    ranks: int
    actors: int
    devices: int
    works: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.ranks} learner rank(s) and {self.actors} actor(s)"


def shares(number: int, most: int) -> list[int]:
    """Processors of `number` devices where `most` devices share out the machine."""
    processors = sorted(os.sched_getaffinity(0))
    return processors[: number * max(1, len(processors) // most)]


def measure(sizes: Sequence[Size], publishing: Size, steps: int) -> Measured:
    """`steps` rounds of every contender, the sums over its ranks, and publishes."""
    measured = Measured()
    most = max(size.devices for size in sizes)
    for together in [[size] for size in sizes] if torch.cuda.is_available() else [sizes]:
        with ExitStack() as stack:
            contenders = [(size, stack.enter_context(started(size, shares(size.devices, most)))) for size in together]
            for number in range(steps + 1):
                for size, remote in contenders[:: -1 if number % 2 else 1]:
                    for prompts in size.works:
                        step: Step = remote("step", prompts)
                        print(f"round {number}: {size}, {prompts} prompts, {step.seconds:.2f} s", file=sys.stderr)
                        if number:
                            measured.steps.append(step)
            for size, remote in contenders:
                measured.sums += [(size.ranks, each) for each in remote("sums")]
                measured.num_nodes, measured.adapter_bytes = remote("copies")
    with started(publishing, sorted(os.sched_getaffinity(0))) as remote:
        measured.publishes = remote("publishes", PUBLISHES * steps)
    return measured


@contextmanager
def started(size: Size, processors: Sequence[int]) -> Iterator[Remote]:
    print(f"starting {size} on {len(processors)} processors", file=sys.stderr)
    with scaling_contender.started(size.plan, processors) as remote:
        yield remote


def planned(config: Config, ranks: int, actors: int, *, first: bool = False) -> Size:
    """The contender of these numbers, with memory for its largest step."""
    fixed = config.run.prompts_per_step
    devices = Point(ranks=ranks, actors=actors, prompts=fixed).devices(config.cluster.layout)
    works = (fixed, fixed * max(devices, 2 if first else 1))
    own = {
        "learner.num_ranks": ranks,
        "actor.num_actors": actors,
        "learner.gradient_accumulation": max(ranks, config.learner.gradient_accumulation),  # work for every rank
        "run.prompts_per_step": max(works),
        "run.steps": 10_000,  # the learning rate stays small
    }
    made = plan.make(with_values(config, own))
    made.refuse_absent_gpu()
    return Size(plan=made, ranks=ranks, actors=actors, devices=devices, works=works)


def check(arguments: argparse.Namespace, config: Config) -> None:
    """Raise UserError for what cannot be measured or fitted."""
    for flag in ("devices", "actors", "steps", "publish_actors"):
        values = getattr(arguments, flag)
        least = min(values) if isinstance(values, list) else values
        if least is not None and least < 1:
            raise UserError(f"--{flag.replace('_', '-')} {least} measures nothing; give 1 or more")
    if len(set(arguments.devices)) < 2:
        raise UserError(f"--devices {arguments.devices[0]} shows no scaling; give two different numbers or more")
    if len(arguments.actors or arguments.devices) != len(arguments.devices):
        raise UserError(
            f"--actors has {len(arguments.actors)} numbers and --devices {len(arguments.devices)}; give one for each"
        )
    if arguments.publish_actors < 3:
        raise UserError(f"--publish-actors {arguments.publish_actors} does not determine the model; give 3 or more")
    if config.actor.part_prompts:
        raise UserError(f"actor.part_prompts={config.actor.part_prompts}: an actor has one part here; leave it out")
    if config.run.max_staleness:
        raise UserError(f"run.max_staleness={config.run.max_staleness} hides sampling behind learning; set it to 0")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--actors", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--publish-actors", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments, options = parser.parse_known_args(list(argv))
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = load([*options, "--run.dir", f"{folder}/run"], CONFIG)
            check(arguments, config)
            numbers = list(zip(arguments.devices, arguments.actors or arguments.devices, strict=True))
            largest = planned(config, *numbers[0], first=True).plan.config
            config = with_values(config, {name: value_of(largest, name) for name in SAME})
            sizes = [planned(config, *each, first=each is numbers[0]) for each in numbers]
            publishing = planned(config, 1, arguments.publish_actors)
            measured = measure(sizes, publishing, arguments.steps)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    summary = scaling_results.summary(sizes[0].plan, measured)
    console = Console(width=170)
    for table in scaling_results.tables(summary):
        console.print(table)
    for sentence in scaling_results.findings(summary):
        console.print(sentence, highlight=False)
    if arguments.out:
        scaling_results.keep(arguments.out, summary)
    print(json.dumps(summary))
    return 0
