"""Figures of training: reward, variance, entropy and weight over steps; and the diagram of the methods."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from launch.reporting.curves import over_seeds
from launch.reporting.data.groups import PAPER_ALPHA, Group, settings_of
from launch.reporting.data.measures import variance
from launch.reporting.data.statistics import bootstrap
from launch.reporting.figure import Drawn, empty, legend, panels, step_axis
from launch.reporting.paper import numbers
from launch.reporting.style import COLOURS, INK, Style, styles


def rewards(groups: Sequence[Group]) -> Drawn:
    """Reward mean +- standard deviation over steps, one panel per group."""
    looks, settings = styles(groups), settings_of(groups)
    figure, axes = panels(max(len(groups), 1), width=3.1, height=2.3, sharex=True, sharey=True)
    for each, group in zip(axes, groups, strict=False):
        style = looks[group.label]
        each.set_title(group.label if len(settings) == 1 else f"{group.label}\n{group.setting}", color=style.colour)
        if not group.steps:
            empty(each, "no step yet")
            continue
        curves = group.curve("reward/mean")
        for seed in curves if len(curves) > 1 else ():
            each.plot(group.steps, seed, color=style.colour, linewidth=0.6, alpha=0.6)
        centre, std = over_seeds(curves), over_seeds(group.curve("reward/std"))
        each.fill_between(group.steps, centre - std, centre + std, color=style.colour, alpha=0.18, linewidth=0)
        each.plot(group.steps, centre, color=style.colour, linestyle=style.line)
        each.axvline(group.steps[len(group.steps) // 2], color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    for each in axes:
        each.set_ylabel("reward")
        each.label_outer()
    for lowest in axes[-3:]:  # of each column, whose last row may be short
        step_axis(lowest)
        lowest.tick_params(labelbottom=True)
    return Drawn(
        key="figure-a3",
        title="Figure A3. Training reward over steps",
        caption="Mean reward of a step's rollouts (thin: single seeds) ± their standard deviation. Right of the dotted "
        "line: the second half of the steps, whose variance is the training variance.",
        figure=figure,
    )


def variances(groups: Sequence[Group]) -> Drawn:
    """Training variance of each group with its interval and its seeds, and the paper's."""
    settings, looks = settings_of(groups), styles(groups)
    tallest = max([3, *map(len, settings.values())])
    figure, axes = panels(len(settings) + 1, columns=2, width=4.9, height=0.75 + 0.27 * tallest, sharex=True)
    for each, (setting, members) in zip(axes, settings.items(), strict=False):
        rows = [(g.label, g.per_seed(variance), looks[g.label]) for g in members]
        _dots(each, setting, rows)
    published = [
        (
            f"{r.method}, {model.removeprefix('Qwen2.5-')}",
            np.array([r.variance]),
            Style(colour=COLOURS[r.method.lower()][0], line="-", marker="D"),
        )
        for model, results in numbers.RESULTS.items()
        for r in results
        if r.variance is not None
    ]
    _dots(axes[-1], "paper (one seed)", published)
    return Drawn(
        key="training-variance",
        title="Training variance",
        caption="Variance of the mean step reward over the second half of the steps (logarithmic). Circles: seeds; "
        "diamond and bar: mean and bootstrap 95 % interval over seeds. Limit: a variance of 0 is not on this scale.",
        figure=figure,
    )


def _dots(axes: Axes, title: str, rows: Sequence[tuple[str, np.ndarray, Style]]) -> None:
    axes.set_title(title)
    if not any((values > 0).any() for _, values, _ in rows):
        empty(axes, "no run has a variance yet")
        return
    for row, (_, values, style) in enumerate(rows):
        estimate = bootstrap(values)
        axes.plot([estimate.low, estimate.high], [row, row], color=style.colour, linewidth=2.2)
        axes.plot(values, [row] * len(values), "o", color=style.colour, markerfacecolor="none", markersize=4)
        axes.plot([estimate.value], [row], "D", color=style.colour, markersize=5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training variance (reward²)")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)


NEGATIVE: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (1, 1)), "marker": ".", "markersize": 3.5}


def entropy_and_weight(groups: Sequence[Group]) -> Drawn:
    """Normalised entropy and mean token weight over steps, of the discounting methods and their baseline."""
    looks = styles(groups)
    chosen = [g for g in groups if g.role and (g.alpha in (0, PAPER_ALPHA))] or list(groups)
    settings = settings_of(chosen)
    figure, axes = panels(2 * len(settings) + 2, columns=2, width=4.9)
    for row, (setting, members) in enumerate(settings.items()):
        entropy, weight = axes[2 * row : 2 * row + 2]
        for group in (g for g in members if g.steps):
            style = looks[group.label]
            look = {"color": style.colour, "linestyle": style.line}
            entropy.plot(group.steps, over_seeds(group.curve("entropy/normalized_mean")), label=group.label, **look)
            weight.plot(group.steps, over_seeds(group.curve("weight/mean")), label=group.label, **look)
            if group.alpha:
                weight.plot(
                    group.steps, over_seeds(group.curve("weight/negative_mean")), color=style.colour, **NEGATIVE
                )
        entropy.set_title(setting)
        weight.set_title(setting)
    published = np.array(numbers.DIAGNOSTICS["Qwen2.5-3B"])
    published_look: dict[str, Any] = {"color": COLOURS["sa-ah-grpo"][0], "marker": "D", "label": "SA-AH-GRPO (paper)"}
    for each, column in zip(axes[-2:], (5, 6), strict=True):
        each.plot(published[:, 0], published[:, column], **published_look)
        each.set_title("paper, Qwen2.5-3B")
    axes[-1].plot(published[:, 0], published[:, 7], color=published_look["color"], **NEGATIVE)
    for index, each in enumerate(axes):
        each.set_ylabel("mean token weight w̄" if index % 2 else "mean normalised entropy H̄")
        step_axis(each)
    legend(figure, axes)
    return Drawn(
        key="figure-a4",
        title="Figure A4. Entropy and token weight over steps",
        caption="Means over seeds; dotted: the weight of tokens in rollouts of negative advantage (0 in the paper's "
        "Table 6 where a step has none).",
        figure=figure,
    )


def diagram() -> Drawn:
    """Token weights of a rollout of positive and of negative advantage under the paper's three methods."""
    entropies = np.array([0.02, 0.05, 0.30, 0.04, 0.02, 0.45, 0.10, 0.03, 0.35, 0.05, 0.02, 0.20])
    discounted = np.exp(-PAPER_ALPHA * np.cumsum(entropies))
    uniform = np.ones_like(discounted)
    figure, axes = panels(8, columns=4, width=2.5, height=1.9, sharex=True)
    for row, sign in enumerate(("positive", "negative")):
        first, *others = axes[4 * row : 4 * row + 4]
        first.bar(range(1, 13), entropies, color=INK, alpha=0.65)
        first.set_title("H̃: normalised entropy")
        first.set_ylabel(f"{sign} advantage")
        for each, method in zip(others, ("GRPO", "AH-GRPO", "SA-AH-GRPO"), strict=True):
            discounts = method == "AH-GRPO" or (method == "SA-AH-GRPO" and sign == "negative")
            colour = COLOURS[method.lower()][0]
            each.bar(range(1, 13), discounted if discounts else uniform, color=colour)
            each.set_title(f"{method}: w", color=colour)
            each.set_ylim(0, 1.1)
    for each in axes[4:]:
        each.set_xlabel("token t")
    return Drawn(
        key="figure-a5",
        title="Figure A5. What the methods do to a token's weight",
        caption="The same made-up entropies in a rollout of positive (above) and of negative advantage (below), α 0.5: "
        "wₜ = exp(−α (H̃₁ + … + H̃ₜ)). AH-GRPO discounts both, SA-AH-GRPO only negative advantages; each uncertain "
        "token lowers the weight of all that follow.",
        figure=figure,
    )
