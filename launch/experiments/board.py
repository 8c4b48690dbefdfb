"""The display of a grid: a live table on a terminal, plain lines elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from launch.recording.console import minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The progress of one cell."""

    name: str
    state: str  # a key of STATES
    step: int
    steps: int
    reward: float | None = None  # mean over the last steps
    left_seconds: float | None = None


STATES = {"running": "cyan", "failed": "red", "waiting": "dim", "finished": "green"}  # colours, in the order shown
TENTHS = 10  # without a terminal, a cell has one line for each tenth of its steps


class Board:
    """The display of all cells of a grid."""

    def __init__(self, title: str, *, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.printed: dict[str, tuple[str, int]] = {}  # state and tenth of the steps in the last line of each cell
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        if self.live:
            self.live.start()

    def note(self, text: str) -> None:
        """Print one line, above the live table if there is one."""
        self.console.print(text, markup=False)

    def show(self, cells: Sequence[Progress], left_seconds: float | None) -> None:
        """Show the state of all cells, and the seconds that the grid still takes (None: unknown)."""
        if self.live:
            self.live.update(self._table(cells, left_seconds), refresh=True)
            return
        for cell in cells:
            now = cell.state, TENTHS * cell.step // cell.steps
            if self.printed.get(cell.name) != now:
                self.printed[cell.name] = now
                self.note(" ".join([f"{cell.name}:", *_cell(cell)]) + f"; grid: {minutes(left_seconds)} left")

    def close(self) -> None:
        if self.live:
            self.live.stop()

    def _table(self, cells: Sequence[Progress], left_seconds: float | None) -> Panel:
        table = Table(box=None, padding=(0, 1))
        table.add_column("cell")
        table.add_column("state")
        for label in ("step", "reward", "left"):
            table.add_column(label, justify="right")
        order = list(STATES)  # a terminal cuts off the end of a long table
        for cell in sorted(cells, key=lambda cell: order.index(cell.state)):
            state, *rest = _cell(cell)
            table.add_row(escape(cell.name), f"[{STATES[state]}]{state}[/]", *rest)
        count = ", ".join(f"{n} {state}" for state in order if (n := sum(c.state == state for c in cells)))
        return Panel(table, title=f"{escape(self.title)}  {count}  left {minutes(left_seconds)}", expand=False)


def _cell(cell: Progress) -> list[str]:
    """State, step, reward and time left of a cell, as text."""
    reward = "-" if cell.reward is None else f"{cell.reward:.2f}"
    return [cell.state, f"{cell.step}/{cell.steps}", reward, minutes(cell.left_seconds)]
