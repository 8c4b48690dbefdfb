"""Figures of Pass@1, of runs and of the paper: 1 to 4, and the appendix's first."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from launch.reporting.curves import BANDS, accuracy_panel, base_line, base_of, curve
from launch.reporting.data.groups import PAPER_ALPHA, Group, settings_of
from launch.reporting.data.measures import evaluated, final, peak
from launch.reporting.data.statistics import Estimate, binomial
from launch.reporting.figure import Drawn, empty, legend, panels, step_axis
from launch.reporting.paper import numbers
from launch.reporting.style import COLOURS, Style, styles

PAPER_STYLES = {
    name: Style(colour=COLOURS[name.lower()][0], line="-", marker=marker)
    for name, marker in (("GRPO", "o"), ("AH-GRPO", "s"), ("SA-AH-GRPO", "D"))
}


def paper_panel(axes: Axes, model: str, methods: Sequence[str]) -> None:
    """Pass@1 in the paper."""
    axes.set_title(f"paper, {model}")
    for result in numbers.RESULTS[model]:
        if result.method in methods:
            estimates = [binomial(value, numbers.NUM_PROBLEMS) for value in result.pass_at_1]
            steps = numbers.STEPS[: len(estimates)]
            curve(axes, steps, estimates, PAPER_STYLES[result.method], f"{result.method} (paper)")
    base_line(axes, numbers.RESULTS[model][0].final)
    step_axis(axes)
    axes.set_ylabel("greedy Pass@1")


def _chosen(groups: Sequence[Group], roles: Sequence[str]) -> list[Group]:
    """The groups of some of the paper's methods; of a sweep those at the paper's alpha, if there are any."""
    found = []
    for role in roles:
        of_role = [g for g in groups if g.role == role]
        found += [g for g in of_role if role == "GRPO" or g.alpha == PAPER_ALPHA] or of_role
    return found


def _trajectories(key: str, title: str, groups: Sequence[Group], roles: Sequence[str], models: Sequence[str]) -> Drawn:
    settings, looks = settings_of(groups), styles(groups)
    figure, axes = panels(len(settings) + len(models))
    for each, (setting, members) in zip(axes, settings.items(), strict=False):
        accuracy_panel(each, setting, _chosen(members, roles), looks)
    for each, model in zip(axes[len(settings) :], models, strict=True):
        paper_panel(each, model, roles)
    legend(figure, axes)
    caption = f"{' and '.join(roles)}: these runs, and the paper's. {BANDS}"
    return Drawn(key=key, title=title, caption=caption, figure=figure)


def figure_1(groups: Sequence[Group]) -> Drawn:
    roles = ("GRPO", "AH-GRPO")
    return _trajectories("figure-1", "Figure 1. Pass@1 of GRPO and AH-GRPO", groups, roles, ("Qwen2.5-3B",))


def figures_2_3(groups: Sequence[Group]) -> Drawn:
    models = ("Qwen2.5-3B", "Qwen2.5-1.5B")
    return _trajectories("figures-2-3", "Figures 2 and 3. Pass@1 of SA-AH-GRPO", groups, ("SA-AH-GRPO",), models)


def all_methods(groups: Sequence[Group]) -> Drawn:
    """The appendix's first: every method on one panel."""
    settings, looks = settings_of(groups), styles(groups)
    figure, axes = panels(len(settings) + 1, columns=2, width=4.9, height=3.6)
    for each, (setting, members) in zip(axes, settings.items(), strict=False):
        accuracy_panel(each, setting, members, looks)
    paper_panel(axes[-1], "Qwen2.5-3B", tuple(PAPER_STYLES))
    legend(figure, axes)
    return Drawn(key="figure-a1", title="Figure A1. Pass@1 of all methods on one panel", caption=BANDS, figure=figure)


def ablation(groups: Sequence[Group], key: str, title: str, roles: Sequence[str]) -> Drawn:
    """Figure 4: peak (solid circles) and final (open squares) Pass@1 over alpha."""
    settings = settings_of(groups)
    shown = [(setting, role) for setting in settings for role in roles]
    figure, axes = panels(len(shown) + 1)
    for each, (setting, role) in zip(axes, shown, strict=False):
        sweep = sorted((g for g in settings[setting] if g.role in (role, "GRPO")), key=lambda g: g.alpha)
        sweep = [g for g in sweep if g.method != "grpo"]  # Eq. 2 is another reduction than the sweep's
        for measure, look, side in ((peak, PEAK, -DODGE), (final, FINAL, DODGE)):
            points = [(g.alpha + side, evaluated(g, g.per_seed(measure))) for g in sweep]
            _points(each, points, look, COLOURS[role.lower()][0])
        each.set_title(f"{setting}: {role}")
        if each.lines:
            base_line(each, base_of(settings[setting]))
            each.set_xlabel("discount strength α")
            each.set_ylabel("greedy Pass@1")
        else:
            empty(each, f"no evaluated sweep of {role}")
    for look, choose, side in ((PEAK, max, -DODGE), (FINAL, lambda passes: passes[-1], DODGE)):
        points = [(alpha + side, binomial(choose(c), numbers.NUM_PROBLEMS)) for alpha, c in numbers.ABLATION.items()]
        _points(axes[-1], points, look, COLOURS["ah-grpo"][0])
    axes[-1].set_title("paper, Qwen2.5-1.5B: AH-GRPO")
    axes[-1].set_xlabel("discount strength α")
    axes[-1].set_ylabel("greedy Pass@1")
    base_line(axes[-1], numbers.RESULTS["Qwen2.5-1.5B"][0].final)
    legend(figure, axes)
    caption = "Peak (solid circles) and final Pass@1 (open squares); bars: 95 %, as the bands above."
    return Drawn(key=key, title=title, caption=caption, figure=figure)


DODGE = 0.008  # of alpha, so that neither point hides the other
PEAK = {"marker": "o", "label": "peak", "linestyle": "-"}
FINAL = {"marker": "s", "label": "final", "linestyle": (0, (4, 2)), "markerfacecolor": "none"}


def _points(axes: Axes, points: Sequence[tuple[float, Estimate]], look: dict[str, Any], colour: str) -> None:
    known = [(x, e) for x, e in points if math.isfinite(e.value)]
    if known:
        x, found = zip(*known, strict=True)
        values = np.array([e.value for e in found])
        low, high = (np.array([getattr(e, end) for e in found]) for end in ("low", "high"))
        bars = np.nan_to_num([values - low, high - values])
        axes.errorbar(x, values, yerr=bars, color=colour, capsize=2.5, elinewidth=0.9, **look)


def figure_4(groups: Sequence[Group]) -> Drawn:
    return ablation(groups, "figure-4", "Figure 4. α ablation of AH-GRPO", ("AH-GRPO",))


def both_ablations(groups: Sequence[Group]) -> Drawn:
    """The appendix's second, with the sweep of SA-AH-GRPO that the paper leaves to future work."""
    return ablation(groups, "figure-a2", "Figure A2. α ablation of AH-GRPO and SA-AH-GRPO", ("AH-GRPO", "SA-AH-GRPO"))
