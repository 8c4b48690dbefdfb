"""Pass@1 by problem: what one of two evaluations solved and the other did not, as McNemar's test counts it."""

from collections.abc import Mapping, Sequence
from typing import Any

from launch.evaluation.compare import read_problems
from launch.evaluation.statistics import mcnemar
from launch.reporting.data.runs import Run

OWN = "task"  # the set of the task's own problems
Evaluated = tuple[Run, int]  # a run, and the step after which it was evaluated


def by_problem(pairs: Sequence[tuple[Evaluated, Evaluated]]) -> str:
    """In words, the problems that one side of each pair solved alone, summed over the pairs; "" without any in common.

    McNemar's test takes problems as what is drawn, so it tells these checkpoints apart; whether another seed would
    decide the same is for the seeds to say.
    """
    gained = lost = 0
    for left, right in pairs:
        solved, others = _solved(*left), _solved(*right)
        common = solved.keys() & others.keys()
        if not common:
            return ""
        gained += sum(solved[problem] and not others[problem] for problem in common)
        lost += sum(others[problem] and not solved[problem] for problem in common)
    if not pairs:
        return ""
    return f"; by problem: {gained} gained, {lost} lost, p {mcnemar(gained, lost):.2g} (McNemar, of these checkpoints)"


def _solved(run: Run, step: int) -> Mapping[str, bool]:
    """Whether each of the task's own problems was solved greedily; empty for a run without such records.

    A link is not followed: it may show any file of the reader's machine to whoever gets the report.
    """
    path = run.folder / "evaluations" / f"step-{step:06d}.jsonl"
    if not path.is_file() or path.is_symlink() or path.parent.is_symlink():
        return {}
    records: Mapping[str, Any] = read_problems(path).get(OWN, {})
    return {problem: record["correct"] for problem, record in records.items()}
