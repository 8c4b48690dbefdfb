"""Colours and lines of the figures, the same per method everywhere; figures as SVG for both themes, and as PNG."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from common.methods import METHODS
from launch.reporting.data.groups import PAPER_ALPHA, Group

INK, GRID = "#1c2430", "#d8dde4"

# On a light and on a dark background. The paper's three are grey, orange and blue, which colour-blind readers can
# distinguish; the others differ in line and marker too.
COLOURS = {
    "grpo": ("#5b6470", "#b4bdc8"),
    "ah-grpo": ("#c65200", "#ff9d4d"),
    "sa-ah-grpo": ("#0069a8", "#5cb8f0"),
    "asym-grpo": ("#00795a", "#3ed6a8"),
    "erpo": ("#a03f98", "#e49add"),
    "arca": ("#836700", "#e3c64a"),
    "reft": ("#127a8a", "#5fd4e4"),
    "holder": ("#8c1d40", "#ff8fb0"),
    "dr-grpo": ("#3f4fb8", "#9aa8ff"),
    "dapo": ("#4a7318", "#a5d65e"),
    "gspo": ("#7a4a2a", "#d9a27c"),
    "cispo": ("#b8246b", "#ff7fbd"),
    "entropy-mask": ("#2f5d62", "#8fc1c6"),
    "rloo": ("#6b3fa0", "#c09bff"),
    "other": ("#3d3d00", "#d8d890"),
}
LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX"

RC: Any = {  # Any: matplotlib types its keys one by one
    "svg.fonttype": "none",  # text stays text: searchable, read aloud, in the theme's colour
    "text.parse_math": False,  # a label may contain $
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    colour: str
    line: Any
    marker: str


def method_of(group: Group) -> str:
    """The method whose colour a group has: alpha 0 of sa-ah-grpo is the recipe's GRPO and has GRPO's."""
    name = group.role.lower() or group.method
    return name if name in COLOURS else "other"


def styles(groups: Sequence[Group]) -> dict[str, Style]:
    """Label -> style: the method's colour, and for each of its groups another line and marker."""
    found: dict[str, Style] = {}
    order = list(METHODS)
    for group in sorted(groups, key=lambda g: (g.alpha != PAPER_ALPHA, abs(g.alpha))):
        if group.label in found:
            continue
        colour = COLOURS[method_of(group)][0]
        index = sum(style.colour == colour for style in found.values())
        first = order.index(group.method) if group.method in order and not group.role else 0
        found[group.label] = Style(
            colour=colour, line=LINES[index % len(LINES)], marker=MARKERS[(first + index) % len(MARKERS)]
        )
    return found


def svg(figure: Figure, salt: str) -> str:
    """The figure as SVG; the same figure gives the same bytes."""
    out = io.StringIO()
    with mpl.rc_context({**RC, "svg.hashsalt": salt}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as PNG on white."""
    out = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(out, format="png", dpi=160, facecolor="white")
    return out.getvalue()


def inline(drawn: str, key: str, title: str) -> str:
    """An SVG for the page: unique ids, the theme's colours, the page's width, and an accessible name."""
    body = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", body)
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    width = re.search(r'width="([\d.]+)pt"', head)
    assert box and width, head
    for name, (light, _) in COLOURS.items():
        rest = rest.replace(light, f"var(--method-{name})")
    rest = rest.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    size = f"max-width:{float(width[1]) * 1.6:.0f}px"
    return f'<svg {box[0]} role="img" aria-label="{title}" style="{size}">{rest}'
