"""The display of a run: a live panel on a terminal, plain lines elsewhere (a Ray job's log)."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from common.metrics import mean
from common.types import Group
from launch.evaluation.measure import lines

# Metric, label and format of each column, from left to right.
COLUMNS = (
    ("reward/mean", "reward", "{:.2f}"),
    ("reward/std", "±", "{:.2f}"),
    ("reward/correct_fraction", "correct", "{:.2f}"),
    ("kl/mean", "kl", "{:.4f}"),
    ("entropy/normalized_mean", "entropy", "{:.4f}"),
    ("weight/mean", "weight", "{:.3f}"),
    ("completion/length_mean", "length", "{:.0f}"),
    ("staleness/mean", "stale", "{:.2g}"),  # versions behind: 0 in a synchronous run, 1.3 between 1 and 2
    ("actor_learner_kl", "a-l kl", "{:.4f}"),
    ("throughput/tokens_per_second", "tok/s", "{:.0f}"),
    ("time/step_seconds", "s/step", "{:.1f}"),
    ("idle/mean_fraction", "idle", "{:.2f}"),
)
PART = "reward/parts/"  # the prefix of the metrics of a task's parts of the reward
RECENT = 12  # steps in the live table


class Display:
    """The progress of a run of `steps` optimizer steps, on a terminal a live panel, elsewhere lines."""

    def __init__(self, title: str, *, steps: int, console: Console | None = None) -> None:
        self.title = title
        self.steps = steps
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.recent: list[tuple[int, Mapping[str, float]]] = []
        self.live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        if self.live:
            self.live.start()

    def note(self, text: str) -> None:
        """Print one line, above the live panel if there is one."""
        self.console.print(text, markup=False)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished optimizer step."""
        self.recent = [*self.recent, (step, metrics)][-RECENT:]
        if self.live:
            self.live.update(self._panel(step))
        else:
            shown = " ".join(f"{label} {text}" for label, text in _cells(metrics))
            parts = _parts(metrics)
            shown += f" ({parts})" if parts else ""
            self.note(f"step {step}/{self.steps} {shown} left {self._left(step)}")

    def sample(self, step: int, group: Group) -> None:
        """Print the best and the worst completion of a group."""
        scored = sorted(((r.score, r) for r in group.rollouts if r.score), key=lambda pair: pair[0].total)
        self.note(f"--- sample of step {step}: {group.prompt.messages[-1]['content']} [answer {group.prompt.answer}]")
        for name, (score, rollout) in zip(("best", "worst"), scored[-1:] + scored[:1], strict=False):
            parts = " ".join(f"{part} {value:g}" for part, value in score.parts.items())
            self.note(f"{name}, reward {score.total:g} ({parts}), {rollout.finish_reason}: {rollout.text}")
        self.note("---")

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Print the record of an evaluation (launch/evaluation/measure.py)."""
        for line in lines(record):
            self.note(line)

    def close(self) -> None:
        if self.live:
            self.live.stop()

    def _left(self, step: int) -> str:
        per_step = mean(metrics["time/step_seconds"] for _, metrics in self.recent)
        return minutes(per_step * (self.steps - step))

    def _panel(self, step: int) -> Panel:
        parts = _parts(self.recent[-1][1])  # wrapped under the table: a task may have any number of parts
        caption = Text(f"reward of step {step}: {parts}") if parts else None
        table = Table(box=None, padding=(0, 0, 0, 1), caption=caption)  # all columns fit in 90 characters
        table.add_column("step", justify="right")
        for _, label, _ in COLUMNS:
            table.add_column(label, justify="right")
        for number, metrics in self.recent:
            table.add_row(str(number), *(text for _, text in _cells(metrics)))
        return Panel(table, title=f"{self.title}  step {step}/{self.steps}  left {self._left(step)}", expand=False)


def _cells(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Label and formatted value of every column; a metric that the step lacks is a dash."""
    return [(label, style.format(metrics[name]) if name in metrics else "-") for name, label, style in COLUMNS]


def _parts(metrics: Mapping[str, float]) -> str:
    """Name and value of every part of the reward; empty if the task has none."""
    parts = {name.removeprefix(PART): value for name, value in metrics.items() if name.startswith(PART)}
    return " ".join(f"{name} {value:.2f}" for name, value in parts.items())


def minutes(seconds: float | None) -> str:
    """Minutes and seconds, such as 61:05; a dash for None."""
    whole, rest = divmod(round(seconds or 0), 60)
    return "-" if seconds is None else f"{whole}:{rest:02d}"
