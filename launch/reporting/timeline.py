"""Who worked when: some steps of a run as lanes of work, one per worker, and the idle share of the devices."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.reporting.curves import smoothed
from launch.reporting.data.groups import Group
from launch.reporting.data.runs import Run
from launch.reporting.figure import Drawn, legend, step_axis
from launch.reporting.style import COLOURS, GRID, INK

NUM_STEPS = 8  # in a figure
MAX_FIGURES = 4  # on a page: one run of each of the first experiments
WORK = {  # kind of work -> the method whose colour it has, on light and dark
    "learn": "ah-grpo",
    "publish": "erpo",
    "sample": "sa-ah-grpo",
    "score": "asym-grpo",
    "load": "holder",
    "evaluate": "grpo",
}
SIDES = {"learner": "learn", "actor": "sample"}  # side -> the work whose colour its line has
CAPTION = (
    "Above: steps from the middle of the run, shaded, and the work of each worker as the driver measured it. "
    "learn: one update, in which the ranks wait for one another. publish: the adapter leaves rank 0. sample, v3: with "
    "adapter version 3. score: an actor waits for rewards, its device is idle. load: the actors take the new version "
    "and verify it. Between two steps lie evaluations, records and checkpoints. At the right: the idle share of the "
    "device during these steps. Below: the idle share per step, mean of the devices with a learner rank and of those "
    "with an actor, smoothed as the learning curves are. Times of a resumed run leave out what lies between the two "
    "processes."
)


def timelines(groups: Sequence[Group]) -> list[Drawn]:
    """One figure for each of the first experiments: of its first run that has a timeline."""
    chosen = [next((run for run in group.runs if run.timeline and run.metrics), None) for group in groups]
    found = [(group, run) for group, run in zip(groups, chosen, strict=True) if run][:MAX_FIGURES]
    return [
        Drawn(
            key=f"timeline-{number}" if len(found) > 1 else "timeline-steps",
            title=f"Who worked when: {group.label}, run {run.name}",
            caption=CAPTION,
            figure=_figure(run),
        )
        for number, (group, run) in enumerate(found, start=1)
    ]


def lanes(run: Run) -> dict[str, int]:
    """The workers of a run with their devices: by device, and the learner rank above the actor."""
    found = {span["worker"]: span["device"] for record in run.timeline for span in record["spans"]}
    learner_first = sorted(found, key=lambda worker: (found[worker], not worker.startswith("learner"), worker))
    return {worker: found[worker] for worker in learner_first}


def of_step(record: Mapping[str, Any]) -> dict[str, Any]:
    """A step's spans of work for the page's script, in seconds from the step's start and cut to it."""
    zero, end = record["start_seconds"], record["end_seconds"]
    inside = [span for span in record["spans"] if span["end_seconds"] > zero and span["start_seconds"] < end]
    return {
        "seconds": round(end - zero, 4),
        "idle": record["idle_fractions"],
        "spans": [
            [
                span["worker"],
                span["work"],
                round(max(span["start_seconds"] - zero, 0.0), 4),
                round(span["end_seconds"] - zero, 4),  # nothing runs beyond a step's end, where the actors pause
            ]
            for span in inside
        ],
    }


def _figure(run: Run) -> Figure:
    first = max((len(run.timeline) - NUM_STEPS) // 2, 0)
    window = run.timeline[first : first + NUM_STEPS]
    height = 0.34 * len(lanes(run)) + 0.6
    figure = Figure(figsize=(10.2, height + 2.2))
    above, below = figure.subplots(2, 1, height_ratios=[height, 1.5])
    _lanes(above, run, window)
    _idle(below, run, window)
    legend(figure, (above, below))
    return figure


def _lanes(axes: Axes, run: Run, window: Sequence[Mapping[str, Any]]) -> None:
    """A lane for each worker, the steps of the window behind them, and how idle the devices were."""
    start, end = window[0]["start_seconds"], window[-1]["end_seconds"]
    workers = lanes(run)
    for number, record in enumerate(window):
        left, right = record["start_seconds"], record["end_seconds"]
        axes.axvspan(left, right, color=GRID, alpha=0.35 + 0.35 * (number % 2), linewidth=0)
        if right - left > 0.045 * (end - start):
            at: Any = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 8}
            axes.text((left + right) / 2, 1.01, f"step {record['step']}", **at)
    _bars(axes, run, start, end)
    for lane, device in enumerate(workers.values()):
        words = f"idle {100 * _share(window, device):.0f} %"
        axes.text(1.01, lane, words, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(range(len(workers)), [f"device {device}: {worker}" for worker, device in workers.items()])
    axes.set_ylim(len(workers) - 0.5, -0.5)
    axes.set_xlim(start, end)
    axes.set_xlabel("seconds since the run's start")
    axes.grid(visible=False)


def _share(window: Sequence[Mapping[str, Any]], device: int) -> float:
    """The idle share of a device over the steps of the window; a resumed run may have other devices than before."""
    known = [record for record in window if device < len(record["idle_fractions"])]
    shares = [record["idle_fractions"][device] for record in known]
    seconds = [record["end_seconds"] - record["start_seconds"] for record in known]
    return float(np.average(shares, weights=seconds)) if known else math.nan


def _bars(axes: Axes, run: Run, start: float, end: float) -> None:
    """The spans of work between two moments, and the adapter versions that the actors sampled with."""
    workers = [*lanes(run)]
    bars: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)  # start and width by work and worker
    versions: dict[tuple[str, int], list[float]] = defaultdict(list)
    for span in (span for record in run.timeline for span in record["spans"]):
        left, right = max(span["start_seconds"], start), min(span["end_seconds"], end)
        if left < right:
            bars[span["work"], span["worker"]].append((left, right - left))
            if span["work"] == "sample":
                versions[span["worker"], span["version"]] += [left, right]
    for work, name in WORK.items():
        colour = COLOURS[name][0]
        look: Any = {"facecolor": (colour, 0.5), "edgecolor": colour, "linewidth": 0.6, "label": work}
        if work == "score":
            look["linewidth"] = 0  # most waits for rewards are thinner than an edge
        for lane, worker in enumerate(workers):
            if bars[work, worker]:
                axes.broken_barh(bars[work, worker], (lane - 0.36, 0.72), **look)
    for (worker, version), moments in versions.items():  # all parts of a version lie between two publishes
        if max(moments) - min(moments) > 0.022 * (end - start):
            middle = (min(moments) + max(moments)) / 2
            axes.text(middle, workers.index(worker), f"v{version}", ha="center", va="center", fontsize=8)


def _idle(axes: Axes, run: Run, window: Sequence[Mapping[str, Any]]) -> None:
    """The idle share of the devices over the steps of the run."""
    curves = {side: run.series(f"idle/{side}_fraction") for side in SIDES}
    axes.axvspan(window[0]["step"] - 0.5, window[-1]["step"] + 0.5, color=GRID, alpha=0.35, linewidth=0)
    marker = "." if len(run.steps) < 3 * NUM_STEPS else ""
    if np.array_equal(
        curves["learner"], curves["actor"], equal_nan=True
    ):  # one learner rank and one actor on each device
        axes.plot(run.steps, smoothed(curves["learner"]), color=INK, marker=marker, label="idle, all devices")
    else:
        for side, work in SIDES.items():
            colour = COLOURS[WORK[work]][0]
            label = f"idle, {side}s' devices"
            axes.plot(run.steps, smoothed(curves[side]), color=colour, marker=marker, label=label)
    axes.set_ylim(0, 1)
    axes.set_ylabel("idle share")
    step_axis(axes)
