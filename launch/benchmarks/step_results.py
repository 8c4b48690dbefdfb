"""The results of launch/benchmarks/step.py as one JSON object, one table and one chart."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table

from launch.benchmarks.roofline import Rates
from launch.planning.plan import Plan

Results = Mapping[str, Sequence[Mapping[str, float]]]  # by contender: its measured steps
PHASES = {"rollout": "#0072b2", "learn": "#e69f00", "publish": "#009e73"}  # phases of a step; colour-blind safe


def summary(
    plan: Plan, model: str, rates: Rates, measured: Results, batches: Mapping[int, Mapping[str, float]]
) -> dict[str, Any]:
    """Medians, and every figure behind them. Memory peaks are the learner's, or those of the peer's whole process."""
    over_grpo = ratios(measured, "sa-ah-grpo", "grpo")
    over_trl = ratios(measured, "trl", "sa-ah-grpo") if "trl" in measured else None
    return {
        "machine": machine() | asdict(rates),
        "model": model,
        "planned_learner_peak_bytes": plan.memory.learner_peak_bytes if plan.memory else None,
        "settings": plan.config.model_dump(mode="json"),
        "measured": measured,
        "sa_ah_over_grpo": statistics.median(over_grpo),
        "sa_ah_over_grpo_by_round": over_grpo,
        "speedup_over_trl": statistics.median(over_trl) if over_trl else None,
        "speedup_over_trl_by_round": over_trl,
        "batches": batches,
        "cost_exponent": exponent(batches) if len(batches) > 1 else None,
    }


def machine() -> dict[str, Any]:
    """What the measurements are of."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _processor() -> str:
    """The processor's model name, if the system reports it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def ratios(measured: Results, above: str, below: str) -> list[float]:
    """Step time of `above` over that of `below`, for each round."""
    pairs = zip(measured[above], measured[below], strict=True)
    return [a["step"] / b["step"] for a, b in pairs]


def exponent(batches: Mapping[int, Mapping[str, float]]) -> float:
    """Slope of log seconds over log tokens: 1 is a cost linear in tokens."""
    tokens, seconds = (np.log([step[key] for step in batches.values()]) for key in ("tokens", "step"))
    return float(np.polyfit(tokens, seconds, 1)[0])


def medians(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.median(step[key] for step in steps) for key in steps[0]}


def table(measured: Results) -> Table:
    """Median seconds by phase, the roofline in per cent of them, and the range of whole steps."""
    drawn = Table(
        "", "rollout s", "roofline %", "learn s", "roofline %", "publish s", "step s", "range", "tokens/s", "learner GB"
    )
    for name, steps in measured.items():
        middle, seconds = medians(steps), [step["step"] for step in steps]

        def share(phase: str, middle: Mapping[str, float] = middle) -> str:
            bound = f"{phase}_roofline"
            return f"{100 * middle[bound] / middle[phase]:.0f}" if bound in middle else "-"

        drawn.add_row(
            name,
            f"{middle['rollout']:.2f}",
            share("rollout"),
            f"{middle['learn']:.2f}",
            share("learn"),
            f"{middle['publish']:.2f}" if "publish" in middle else "-",
            f"{middle['step']:.2f}",
            f"{min(seconds):.2f}-{max(seconds):.2f}",
            f"{middle['tokens'] / middle['step']:.0f}",
            f"{middle['learner_peak_bytes'] / 1e9:.1f}",
        )
    return drawn


def keep(folder: Path, summary: Mapping[str, Any]) -> None:
    """benchmark.json and benchmark.svg in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(summary, indent=1))
    chart(summary["measured"]).savefig(folder / "benchmark.svg")


def chart(measured: Results) -> Figure:
    """A bar for each contender, of the median seconds of its phases; a black line marks the roofline of each."""
    figure = Figure(figsize=(8, 1 + 0.5 * len(measured)), layout="constrained")
    axes = figure.subplots()
    for position, steps in enumerate(measured.values()):
        middle, left = medians(steps), 0.0
        for phase, colour in PHASES.items():
            if phase not in middle:
                continue
            axes.barh(position, middle[phase], left=left, color=colour, label=phase if position == 0 else None)
            if f"{phase}_roofline" in middle:
                bound = left + middle[f"{phase}_roofline"]
                axes.plot([bound] * 2, [position - 0.4, position + 0.4], color="black", linewidth=1)
            left += middle[phase]
    axes.set_yticks(range(len(measured)), list(measured))
    axes.invert_yaxis()
    axes.set_xlabel("s/step, median; a black line is the roofline of its phase")
    axes.legend(loc="lower right")
    return figure
