"""The report: claims, tables, figures, samples, timeline and settings of some runs in one HTML file of its own."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup

from common.types import UserError
from launch.reporting.data.groups import Group, differences, group, settings_of
from launch.reporting.data.runs import Run
from launch.reporting.figure import Drawn
from launch.reporting.paper import claims, figures_accuracy, figures_training, numbers, tables
from launch.reporting.paper.verdicts import Verdict
from launch.reporting.samples import Samples, all_samples
from launch.reporting.style import COLOURS, RC, inline, method_of, png, svg
from launch.reporting.table import ABSENT, Table

ASSETS = Path(__file__).parent / "assets"
PHASES = ("rollout", "reward", "wait", "learn", "ahead", "publish", "step")  # time/*_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    html: str
    tables: tuple[Table, ...]
    figures: tuple[Drawn, ...]

    def export(self, folder: Path) -> None:
        """Tables as CSV; figures as SVG and PNG. Raises UserError where they cannot be written."""
        try:
            self._export(folder)
        except OSError as error:
            raise UserError(f"--export {folder} cannot be written ({error.strerror}); name another folder") from None

    def _export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for table in self.tables:
            out = io.StringIO()
            csv.writer(out, lineterminator="\n").writerows(table.lines())
            (folder / f"{table.key}.csv").write_text(out.getvalue(), encoding="utf-8")
        for drawn in self.figures:
            (folder / f"{drawn.key}.svg").write_text(svg(drawn.figure, drawn.key), encoding="utf-8")
            (folder / f"{drawn.key}.png").write_bytes(png(drawn.figure))


def make(runs: Sequence[Run]) -> Report:
    """The report of the runs."""
    groups = group(runs)
    made = tables.all_tables(groups)
    verdicts = claims.verdicts(settings_of(groups))
    settings = _settings_table(runs)
    drawn = draw(groups)
    samples = all_samples(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined
    )
    html = environment.get_template("report.html.j2").render(
        css=Markup(_asset("report.css")),
        js=Markup(_asset("report.js")),
        colours=COLOURS,
        data=Markup(embedded(page_data(runs, samples))),
        differences=settings,
        figures=[(each, Markup(inline(svg(each.figure, each.key), each.key, escape(each.title)))) for each in drawn],
        footnotes=list(numbers.FOOTNOTES.items()),
        groups=[(each, method_of(each)) for each in groups],
        note_number={key: place for place, key in enumerate(numbers.FOOTNOTES, start=1)},
        runs=runs,
        num_recorded=sum(each.num_recorded for each in samples),
        num_shown=sum(each.num_shown for each in samples),
        tables=made,
        verdicts=verdicts,
    )
    return Report(html=html, tables=(*made, _claims_table(verdicts), settings), figures=tuple(drawn))


def draw(groups: Sequence[Group]) -> list[Drawn]:
    """Every figure of the paper, in its order, and the training variance after its summary."""
    with mpl.rc_context(RC):
        return [
            figures_accuracy.figure_1(groups),
            figures_accuracy.figures_2_3(groups),
            figures_accuracy.figure_4(groups),
            figures_training.variances(groups),
            figures_accuracy.all_methods(groups),
            figures_accuracy.both_ablations(groups),
            figures_training.rewards(groups),
            figures_training.entropy_and_weight(groups),
            figures_training.diagram(),
        ]


def page_data(runs: Sequence[Run], samples: Sequence[Samples]) -> dict[str, Any]:
    """What the page's script draws from: samples, times and settings of each run."""
    return {
        "runs": [
            {
                "name": run.name,
                "steps": run.steps.tolist(),
                "times": {phase: _plain(run.series(f"time/{phase}_seconds")) for phase in PHASES},
                "recorded": of_run.num_recorded,
                "shown": of_run.num_shown,
                "groups": of_run.groups,
                "horizon": run.settings.get("method.token_weight") == "horizon",
                "settings": {key: str(value) for key, value in sorted(run.settings.items())},
            }
            for run, of_run in zip(runs, samples, strict=True)
        ],
    }


def embedded(data: Any) -> str:
    """JSON for a script element: nothing in it can end the element, whatever a model wrote."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _plain(values: Any) -> list[float | None]:
    return [None if value != value else round(value, 4) for value in values.tolist()]


def _settings_table(runs: Sequence[Run]) -> Table:
    """The settings in which the runs differ, a row a run."""
    keys = differences(runs)
    rows = []
    for run in runs:
        planned = run.settings["run.steps"]
        words = [run.name, f"{run.num_steps} of {planned}", *(str(run.settings.get(key, ABSENT)) for key in keys)]
        rows.append(tables.words_row(words))
    return Table(
        key="settings",
        title="Runs and the settings in which they differ",
        caption="",
        columns=("run", "steps", *keys),
        rows=tuple(rows),
    )


def _claims_table(verdicts: Sequence[Verdict]) -> Table:
    """The claims for a CSV file; the page has them as a list."""
    words = ("claim", "setting", "verdict", "reason", "paper")
    rows = tuple(tables.words_row([getattr(each, word) for word in words]) for each in verdicts)
    return Table(key="claims", title="The paper's claims", caption="", columns=words, rows=rows)


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
