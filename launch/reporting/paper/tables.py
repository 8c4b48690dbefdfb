"""Tables 2 to 7 of the paper, of the runs given, followed by the paper's own rows."""

import math
from collections.abc import Iterable, Sequence

from launch.reporting.data.groups import Group
from launch.reporting.data.measures import (
    base,
    detrended,
    evaluated,
    final,
    mean_kl,
    pass_at,
    peak,
    variance,
)
from launch.reporting.data.runs import Run
from launch.reporting.data.statistics import Estimate, binomial, bootstrap
from launch.reporting.paper import numbers
from launch.reporting.table import ABSENT, Cell, Row, Table


def _word(value: object, note: str = "") -> Cell:
    return Cell(value=ABSENT if value is None else str(value), note=note)


def _number(value: float | None, digits: int, note: str = "") -> Cell:
    return Cell(value=Estimate(value=math.nan if value is None else value), digits=digits, note=note)


def _paper_pass(value: float, note: str = "") -> Cell:
    return Cell(value=binomial(value, numbers.NUM_PROBLEMS), note=note)


def _method_note(group: Group) -> str:
    """The footnote that a group's own numbers need."""
    return {"GRPO": "token-mean", "SA-AH-GRPO": "denominator"}.get(group.role, "")


def _seeds(group: Group) -> Cell:
    return _word(f"{len(group.seeds)}" + ("" if group.finished else " (not finished)"))


def summary(groups: Sequence[Group]) -> Table:
    """Table 2."""
    rows = []
    previous = None
    for group in groups:
        if group.setting != previous:
            peers = [run for g in groups if g.setting == group.setting for run in g.runs]
            rows.append(_base_row(group.setting, peers))
        previous = group.setting
        cells = (
            _word(group.setting),
            _word(group.label, _method_note(group)),
            _word(group.progress),
            _seeds(group),
            Cell(value=evaluated(group, group.per_seed(final))),
            Cell(value=evaluated(group, group.per_seed(peak))),
            Cell(value=bootstrap(group.per_seed(variance)), digits=4),
            Cell(value=bootstrap(group.per_seed(detrended)), digits=4),
            Cell(value=bootstrap(group.per_seed(mean_kl)), digits=5),
        )
        rows.append(Row(cells=cells))
    for model, results in numbers.RESULTS.items():
        rows += [_paper_row(model, result) for result in results]
    return Table(
        key="table-2",
        number="Table 2",
        title="Summary",
        caption="Pass@1 after the last step, and the peak of all checkpoints (biased upwards: the maximum of several "
        "noisy numbers). Train variance: of the mean step reward over the second half of the steps, which also counts "
        "what a run still learns in them; detrended: around a straight line through them. An unfinished run counts "
        "with the steps that it has.",
        paper_caption="The detrended variance is ours, not the paper's.",
        columns=(
            *("model", "method", "steps", "seeds", "Pass@1 final ↑", "Pass@1 peak ↑"),
            *("train variance ↓", "detrended ↓", "mean KL"),
        ),
        rows=tuple(rows),
    )


def _base_row(setting: str, runs: Sequence[Run]) -> Row:
    """The model before training: greedy, so all runs of a setting measure the same number."""
    measured = [(base(run), run.num_problems) for run in runs if math.isfinite(base(run))]
    value, num = measured[0] if measured else (math.nan, 0)
    words = (_word(setting), _word("base (zero-shot)"), _word(None), _word(None))
    return Row(cells=(*words, Cell(value=binomial(value, num)), *[_word(None)] * 4))


def _paper_row(model: str, result: numbers.Result) -> Row:
    notes = result.notes
    method = result.method if result.alpha is None else f"{result.method}, α {result.alpha:g}"
    cells = (
        _word(model),
        _word(method, notes.get("method", "")),
        _word(result.steps),
        _word(None if result.steps is None else 1),
        _paper_pass(result.final, notes.get("final", "")),
        _word(None) if result.peak is None else _paper_pass(result.peak),
        _number(result.variance, 4, notes.get("variance", "")),
        _word(None),
        _number(result.kl, 5, notes.get("kl", "")),
    )
    return Row(cells=cells, of_paper=True)


def _pass_cells(group: Group, steps: Iterable[int]) -> tuple[Cell, ...]:
    """Pass@1 of a group at each of the steps."""
    return tuple(Cell(value=pass_at(group, step)) for step in steps)


def checkpoints(groups: Sequence[Group]) -> Table:
    """Tables 3 and 4."""
    steps = sorted({step for group in groups for step in group.evaluated_steps} | set(numbers.STEPS))
    rows = [
        Row(cells=(_word(group.setting), _word(group.label, _method_note(group)), *_pass_cells(group, steps)))
        for group in groups
    ]
    for model, results in numbers.RESULTS.items():
        for result in results[1:]:
            known = dict(zip(numbers.STEPS, result.pass_at_1, strict=False))
            passes = (_paper_pass(known.get(step, math.nan)) for step in steps)
            words = (_word(model), _word(f"{result.method}, α {result.alpha:g}", result.notes.get("method", "")))
            rows.append(Row(cells=(*words, *passes), of_paper=True))
    return Table(
        key="tables-3-4",
        number="Tables 3 and 4",
        title="Pass@1 at each evaluated checkpoint",
        caption="Greedy decoding; step 0 is the base model.",
        paper_caption="The paper's rows: Table 3 (3B) and Table 4 (1.5B); their ± by its formula.",
        columns=("model", "method", *(f"step {step}" for step in steps)),
        rows=tuple(rows),
    )


def ablation(groups: Sequence[Group]) -> Table:
    """Table 5, and the sweep of SA-AH-GRPO, which the paper leaves to future work."""
    chosen = [group for group in groups if group.role and group.method != "grpo"]  # Eq. 2: another loss
    steps = sorted({step for group in chosen for step in group.evaluated_steps if step} | set(numbers.STEPS[:-1]))
    rows = [
        Row(
            cells=(
                _word(group.setting),
                _word(group.label, _method_note(group)),
                _word(f"{group.alpha:g}"),
                *_pass_cells(group, steps),
                Cell(value=evaluated(group, group.per_seed(peak))),
                Cell(value=evaluated(group, group.per_seed(final))),
            )
        )
        for group in sorted(chosen, key=lambda g: (g.setting, g.role != "GRPO", g.method, g.alpha))
    ]
    published = [("AH-GRPO", numbers.ABLATION_NOTES.get(alpha, ""), alpha, c) for alpha, c in numbers.ABLATION.items()]
    last = numbers.ABLATION_SELECTIVE
    for method, note, alpha, curve in [*published, (last.method, "denominator", last.alpha, last.pass_at_1)]:
        known = dict(zip(numbers.STEPS, curve, strict=False))
        cells = (
            _word("Qwen2.5-1.5B"),
            _word(method, note),
            _word(f"{alpha:g}"),
            *(_paper_pass(known.get(step, math.nan)) for step in steps),
            _paper_pass(max(curve)),
            _paper_pass(curve[-1]),
        )
        rows.append(Row(cells=cells, of_paper=True))
    return Table(
        key="table-5",
        number="Table 5",
        title="α ablation",
        caption="Pass@1 at each checkpoint; peak and final. α 0: the recipe's GRPO.",
        paper_caption="The paper sweeps AH-GRPO alone; peak and final of its last row are those of 180 steps.",
        columns=("model", "method", "α", *(f"step {step}" for step in steps), "peak ↑", "final ↑"),
        rows=tuple(rows),
    )


def diagnostics(groups: Sequence[Group]) -> Table:
    """Tables 6 and 7, of every method."""
    rows = [row for group in groups for row in _diagnostic_rows(group)]
    for model, lines in numbers.DIAGNOSTICS.items():
        for step, pass_at_1, *values in lines:
            cells = (
                _word(model),
                _word("SA-AH-GRPO, α 0.5"),
                _word(f"{step:g}", numbers.DIAGNOSTIC_NOTES.get((model, step), "")),
                _paper_pass(pass_at_1),
                *(_number(value, digits) for value, digits in zip(values, DIAGNOSTIC_DIGITS, strict=True)),
            )
            rows.append(Row(cells=cells, of_paper=True))
    return Table(
        key="tables-6-7",
        number="Tables 6 and 7",
        title="Diagnostics at selected steps",
        caption="Single steps, means over seeds. Reward: mean and standard deviation over the step's rollouts; KL: "
        "mean per token (k3 here); H̄: mean normalised entropy; w̄: mean token weight, w̄₋: on rollouts of negative "
        "advantage; f₋: fraction of these; len: mean completion length in tokens.",
        columns=("model", "method", "step", "Pass@1", "reward", "reward std", "KL", "H̄", "w̄", "w̄₋", "f₋", "len"),
        rows=tuple(rows),
    )


DIAGNOSTIC_DIGITS = (3, 3, 5, 4, 3, 3, 2, 0)


def _diagnostic_rows(group: Group) -> list[Row]:
    """One row for the fifth step, for each evaluated one and for the last."""
    recorded = group.steps
    wanted = {5, *group.evaluated_steps, *recorded[-1:]}
    steps = [step for step in recorded if step in wanted]
    curves = {metric: dict(zip(recorded, group.curve(metric).T, strict=True)) for metric in numbers.DIAGNOSTIC_METRICS}
    return [
        Row(
            cells=(
                _word(group.setting),
                _word(group.label, _method_note(group)),
                _word(step),
                *_pass_cells(group, [step]),
                *(
                    Cell(value=bootstrap(curves[metric][step]), digits=digits)
                    for metric, digits in zip(numbers.DIAGNOSTIC_METRICS, DIAGNOSTIC_DIGITS, strict=True)
                ),
            )
        )
        for step in steps
    ]


def all_tables(groups: Sequence[Group]) -> list[Table]:
    """Every table of the paper, in its order."""
    return [summary(groups), checkpoints(groups), ablation(groups), diagnostics(groups)]


def words_row(words: Sequence[str]) -> Row:
    """A row without numbers."""
    return Row(cells=tuple(Cell(value=word) for word in words))
