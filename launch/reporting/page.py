"""The report of runs as one self-contained HTML file: first the runs, then samples, tables, settings, the paper."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup

from common.types import UserError
from launch.reporting import overview
from launch.reporting.curves import learning_curves
from launch.reporting.data.groups import Group, differences, group, settings_of
from launch.reporting.data.runs import Run
from launch.reporting.figure import Drawn
from launch.reporting.paper import claims, figures_accuracy, figures_training, numbers, tables
from launch.reporting.paper.verdicts import Verdict, decided
from launch.reporting.samples import Samples, all_samples
from launch.reporting.style import COLOURS, RC, inline, method_of, png, svg
from launch.reporting.table import ABSENT, Table
from launch.reporting.timeline import WORK, lanes, of_step, timelines

ASSETS = Path(__file__).parent / "assets"
PHASES = ("wait", "ahead")  # time/*_seconds in which the learner is idle


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    html: str
    tables: tuple[Table, ...]
    groups: tuple[Group, ...]

    def export(self, folder: Path) -> None:
        """Tables as CSV; figures as SVG and PNG. Raises UserError where they cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for table in self.tables:
                with (folder / f"{table.key}.csv").open("w", encoding="utf-8") as file:
                    csv.writer(file, lineterminator="\n").writerows(table.lines())
            for drawn in [*_draw(self.groups), *_draw_timelines(self.groups), *_draw_paper(self.groups)]:
                (folder / f"{drawn.key}.svg").write_text(svg(drawn.figure, drawn.key), encoding="utf-8")
                (folder / f"{drawn.key}.png").write_bytes(png(drawn.figure))
        except OSError as error:
            raise UserError(f"--export {folder} cannot be written ({error.strerror}); name another folder") from None


def make(runs: Sequence[Run]) -> Report:
    """The report of the runs; the paper's claims, tables and figures only if the runs decide one of its claims."""
    groups = group(runs)
    compared = tables.all_tables(groups)
    own = [_own_rows(table) for table in compared if table.key != "table-5"]  # whose numbers stand in the others
    verdicts = claims.verdicts(settings_of(groups))
    paper = decided(verdicts)
    shown = [*own, *(compared if paper else [])]
    marked = {cell.note for table in shown for row in table.rows for cell in row.cells}
    settings = _settings_table(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": False, "separators": (",", ":")}
    html = environment.get_template("report.html.j2").render(
        claims=paper,
        colours=COLOURS,
        css=Markup((ASSETS / "report.css").read_text(encoding="utf-8")),
        curves=_inlined(_draw(groups)),
        data=page_data(runs, all_samples(runs)),
        experiments=[(each, method_of(each), overview.facts(each)) for each in groups],
        footnotes={key: words for key, words in numbers.FOOTNOTES.items() if key in marked},
        js=Markup((ASSETS / "report.js").read_text(encoding="utf-8")),
        paper_figures=_inlined(_draw_paper(groups)) if paper else [],
        paper_tables=compared,
        runs=runs,
        settings=settings,
        setup=overview.setup(runs),
        tables=own,
        timelines=_inlined(_draw_timelines(groups)),
        title=overview.title(groups),
        work=WORK,
    )
    return Report(html=html, tables=(*compared, _claims_table(verdicts), settings), groups=tuple(groups))


def _draw(groups: Sequence[Group]) -> list[Drawn]:
    with mpl.rc_context(RC):
        return learning_curves(groups)


def _draw_timelines(groups: Sequence[Group]) -> list[Drawn]:
    with mpl.rc_context(RC):
        return timelines(groups)


def _draw_paper(groups: Sequence[Group]) -> list[Drawn]:
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


def _inlined(figures: Sequence[Drawn]) -> list[tuple[Drawn, Markup]]:
    return [(each, Markup(inline(svg(each.figure, each.key), each.key, escape(each.title)))) for each in figures]


def _own_rows(table: Table) -> Table:
    """The table without the paper's rows, and without columns that are empty then or have one model for all."""
    rows = [row for row in table.rows if not row.of_paper]
    texts = [{row.cells[i].text for row in rows} for i in range(len(table.columns))]
    kept = [i for i, found in enumerate(texts) if found != {ABSENT} and (len(found) > 1 or table.columns[i] != "model")]
    cut = tuple(replace(row, cells=tuple(row.cells[i] for i in kept)) for row in rows)
    return replace(table, columns=tuple(table.columns[i] for i in kept), rows=cut)


def page_data(runs: Sequence[Run], samples: Sequence[Samples]) -> dict[str, Any]:
    """Samples, times and settings of each run, for the page's script."""
    return {
        "runs": [
            {
                "name": run.name,
                "steps": run.steps.tolist(),
                "times": {phase: _plain(run.series(f"time/{phase}_seconds")) for phase in PHASES},
                "lanes": lanes(run),
                "timeline": _timeline(run, of_run),
                "recorded": of_run.num_recorded,
                "groups": of_run.groups,
                "horizon": run.settings.get("method.token_weight") == "horizon",
                "settings": {key: str(value) for key, value in sorted(run.settings.items())},
            }
            for run, of_run in zip(runs, samples, strict=True)
        ],
    }


def _timeline(run: Run, sampled: Samples) -> dict[int, Any]:
    """Step -> its spans of work, for the steps that the page can show: those with samples, or all of a run without."""
    steps = {group[0]["step"] for group in sampled.groups} or set(run.steps.tolist())
    return {record["step"]: of_step(record) for record in run.timeline if record["step"] in steps}


def _plain(values: Any) -> list[float | None]:
    return [None if value != value else round(value, 4) for value in values.tolist()]


def _settings_table(runs: Sequence[Run]) -> Table:
    """The settings in which the runs differ, one row per run."""
    keys = differences(runs)
    rows = []
    for run in runs:
        steps = f"{run.num_steps} of {run.settings['run.steps']}"
        words = [run.name, steps, *(str(run.settings.get(key, ABSENT)) for key in keys)]
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
    words = ("claim", "setting", "verdict", "reason", "paired", "p_value", "needed", "paper")
    rows = tuple(tables.words_row([getattr(each, word) for word in words]) for each in verdicts)
    return Table(key="claims", title="The paper's claims", caption="", columns=words, rows=rows)
