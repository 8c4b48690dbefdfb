"""Figures: panels of one size, one legend, and a reason in each empty panel."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One figure of the report; `key` names its file when it is exported."""

    key: str
    title: str
    caption: str
    figure: Figure


def panels(
    num: int, *, columns: int = 3, width: float = 3.4, height: float = 2.7, **share: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `num` axes in rows of at most `columns`; sizes of one panel in inches."""
    columns = min(num, columns)
    rows = math.ceil(num / columns)
    figure = Figure(figsize=(max(width * columns, 4.6), height * rows + 0.35))
    axes = figure.subplots(rows, columns, squeeze=False, **share).ravel().tolist()
    for spare in axes[num:]:
        spare.remove()
    return figure, axes[:num]


def empty(axes: Axes, words: str) -> None:
    """Write in a panel why nothing is drawn in it."""
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, wrap=True)
    axes.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)  # shared axes keep their ticks
    axes.grid(visible=False)


def legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = max(1, min(len(entries), int(figure.get_figwidth() / 2.1)))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, handlelength=3)


def step_axis(axes: Axes) -> None:
    """Optimizer steps along the bottom."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
