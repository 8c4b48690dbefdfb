"""Evaluation sets: benchmarks beside a run's task, each with its own reading and grading (evaluation.sets).

The set gsm8k is read and graded by the task gsm8k, any other by the task math, from the columns that it has. How a
problem is asked follows the options of the run's task: task.example, and for math task.system and task.reward.
"""

import string
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from actor.tasks import task_module
from actor.tasks.table import open_table
from common.config import Config, TaskConfig
from common.types import Prompt, UserError

QUESTIONS = ("{Body} {Question}", "problem", "question", "Question")  # SVAMP, the MATH family, others
ANSWERS = ("answer", "Answer", "final_answer")


def task_of(each: str) -> str:
    """The task that grades the set NAME:DATA."""
    return "gsm8k" if each.partition(":")[0] == "gsm8k" else "math"


def load_sets(config: Config) -> dict[str, list[Prompt]]:
    """The problems of each of evaluation.sets, all or evaluation.num_problems drawn by task.seed; by the set's name.

    Raises UserError for data that cannot be read, and for columns of which none is known.
    """
    loaded = {}
    for each in config.evaluation.sets:
        name, _, data = each.partition(":")
        try:
            loaded[name] = _load(config.task, task_of(each), data, config.evaluation.num_problems)
        except UserError as error:
            raise UserError(f"evaluation.sets, {name}: {error}") from None
    return loaded


def _load(task: TaskConfig, grader: str, data: str, most: int | None) -> list[Prompt]:
    values: dict[str, Any] = {"name": grader, "data": data, "configuration": None, "answer_pattern": None}
    task = TaskConfig(**task.model_dump() | values)
    table = open_table(task, "eval")
    if grader == "math":
        question, answer = (_column(names, table.column_names, data) for names in (QUESTIONS, ANSWERS))
        values |= {"question": question, "answer": answer}
    num = min(len(table), most or len(table))
    whole = task.model_copy(update=values | {"num_train": 0, "num_eval": num})  # nothing of a set is trained on
    return [replace(prompt, task=grader) for prompt in task_module(grader).load(whole, "eval")]


def _column(names: Iterable[str], known: Iterable[str], data: str) -> str:
    """The first of the columns, or templates of columns, that a table has."""
    known = set(known)
    for name in names:
        fields = [field for _, field, *_ in string.Formatter().parse(name) if field] or [name]
        if known.issuperset(fields):
            return name
    raise UserError(f"{data} has none of the columns {', '.join(names)}; rename one of {', '.join(sorted(known))}")
