"""Learning curves of any runs: reward, accuracy and what explains them, over optimizer steps."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from launch.reporting.data.groups import Group, settings_of
from launch.reporting.data.measures import base, pass_at
from launch.reporting.data.statistics import Estimate
from launch.reporting.figure import Drawn, empty, legend, panels, step_axis
from launch.reporting.style import INK, Style, styles

BANDS = (
    "Bands of Pass@1: 95 %; for two seeds or more the bootstrap interval over seeds, for one seed (and the paper's) "
    "the binomial interval of the evaluation."
)
CAPTION = (
    "Thick lines: mean over seeds, smoothed by a centred mean over a tenth of the steps. Thin line: the steps of a "
    "single seed; band: the range of several; neither with more than four experiments. Accuracy is not smoothed; its "
    "band: the 95 % interval over seeds, or the binomial one of a single seed's evaluation."
)
MAX_BANDS = 4  # more bands on one panel hide each other
ACCURACY = "accuracy: greedy Pass@1"
METRICS = {  # panel title -> metric, in the order of the panels; accuracy is not one of a step
    "reward": "reward/mean",
    ACCURACY: "",
    "tokens per completion": "completion/length_mean",
    "normalised entropy": "entropy/normalized_mean",
    "KL to the reference, nats per token": "kl/mean",
    "token weight": "weight/mean",
}


def learning_curves(groups: Sequence[Group]) -> list[Drawn]:
    """One figure per setting: a panel per metric, a line per group."""
    looks, made = styles(groups), []
    settings = settings_of(groups)
    for number, (setting, members) in enumerate(settings.items(), start=1):
        figure, axes = panels(len(METRICS), height=2.2)
        for each, title in zip(axes, METRICS, strict=True):
            if title == ACCURACY:
                accuracy_panel(each, title, members, looks, first_step=0)
            else:
                _metric_panel(each, title, members, looks)
            each.set_ylabel("")
            last = max((g.steps[-1] for g in members if g.steps), default=1)
            each.set_xlim(-0.03 * last, 1.03 * last)
        legend(figure, axes)
        suffix = (f"-{number}", f": {setting}") if len(settings) > 1 else ("", "")
        made.append(
            Drawn(
                key=f"learning-curves{suffix[0]}", title=f"Learning curves{suffix[1]}", caption=CAPTION, figure=figure
            )
        )
    return made


def _metric_panel(axes: Axes, title: str, groups: Sequence[Group], looks: dict[str, Style]) -> None:
    """A metric of each step."""
    axes.set_title(title)
    for group in groups:
        curves, style = group.curve(METRICS[title]), looks[group.label]
        if not np.isfinite(curves).any():
            continue
        smooth = np.array([smoothed(curve) for curve in curves])
        if len(groups) <= MAX_BANDS and len(curves) == 1:
            axes.plot(group.steps, curves[0], color=style.colour, linewidth=0.6, alpha=0.5)
        elif len(groups) <= MAX_BANDS:
            low, high = np.fmin.reduce(smooth), np.fmax.reduce(smooth)
            axes.fill_between(group.steps, low, high, color=style.colour, alpha=0.15, linewidth=0)
        look = {"color": style.colour, "linestyle": style.line, "marker": "." if len(group.steps) == 1 else ""}
        axes.plot(group.steps, over_seeds(smooth), label=group.label, **look)
    if axes.lines:
        step_axis(axes)
    else:
        empty(axes, "not recorded")


def smoothed(values: np.ndarray) -> np.ndarray:
    """float [steps], centred mean over a tenth of the steps (an odd number of them); NaN where those have no number."""
    window = np.ones(2 * (len(values) // 20) + 1)
    known = np.isfinite(values)
    count = np.convolve(known, window, "same")
    return np.where(count > 0, np.convolve(np.where(known, values, 0), window, "same") / np.maximum(count, 1), np.nan)


def over_seeds(curves: np.ndarray) -> np.ndarray:
    """float [steps], mean over seeds of [seeds, steps]; NaN where no seed has a number."""
    return np.ma.masked_invalid(curves).mean(axis=0).filled(np.nan)


def accuracy_panel(
    axes: Axes, title: str, groups: Sequence[Group], looks: dict[str, Style], *, first_step: int = 1
) -> None:
    """Pass@1 of groups of one setting; step 0, the base model, is at least a dashed line."""
    axes.set_title(title)
    for group in groups:
        steps = [step for step in group.evaluated_steps if step >= first_step]
        estimates = [pass_at(group, step) for step in steps]
        curve(axes, steps, estimates, looks[group.label], group.label, crowded=len(groups) > MAX_BANDS - 1)
    if not axes.lines:
        empty(axes, "no evaluation in these runs" if groups else "no run of it given")
        return
    base_line(axes, base_of(groups))
    step_axis(axes)
    axes.set_ylabel("greedy Pass@1")


def curve(
    axes: Axes, steps: Sequence[int], estimates: Sequence[Estimate], style: Style, label: str, *, crowded: bool = False
) -> None:
    """Pass@1 over steps with its 95 % band, fainter if crowded; a single point has a bar instead."""
    known = [(step, e) for step, e in zip(steps, estimates, strict=True) if math.isfinite(e.value)]
    if not known:
        return
    at, found = zip(*known, strict=True)
    low, high = [e.low for e in found], [e.high for e in found]
    if len(known) > 1:
        axes.fill_between(at, low, high, color=style.colour, alpha=0.06 if crowded else 0.15, linewidth=0)
    else:
        axes.vlines(at, low, high, color=style.colour, linewidth=1)
    values = [e.value for e in found]
    axes.plot(at, values, color=style.colour, linestyle=style.line, marker=style.marker, label=label)


def base_line(axes: Axes, value: float) -> None:
    """The base model's Pass@1, dashed."""
    if math.isfinite(value):
        axes.axhline(value, color=INK, linestyle=(0, (4, 3)), linewidth=1, label="base model (zero-shot)")


def base_of(groups: Sequence[Group]) -> float:
    """The base model's Pass@1 in the first run that measured it."""
    return next((v for g in groups for v in map(base, g.runs) if math.isfinite(v)), math.nan)
