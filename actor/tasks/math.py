r"""Problems with a checkable answer, from any table of rows; math-verify grades the answers (math_answer.py).

    --task.name math --task.data math500/test.jsonl --task.question problem
    --task.name math --task.data gsm8k --task.answer_pattern "####"
    --task.name math --task.data svamp/test.jsonl --task.question "{Body} {Question}" --task.answer Answer

task.question and task.answer name columns, or are templates of columns; "{reward_model[ground_truth]}" reads into one.
Of the answer's text the task takes what follows the last match of task.answer_pattern (or its group, if it has one),
and of that the last `\boxed{}` if there is one, so that a solution can stand for its answer.

Before the run a number is graded by each of the first CHECKED answers of a split, in processes with a time-out.
Problems whose answer cannot be read are named and left out. Nothing else is a reason for that: what takes too long may
depend on the machine, and a problem that is left out moves all after it, which a resumed run would not survive. So a
problem on which math-verify hangs or raises is named and stays. The rewards of such a problem, and of one beyond
CHECKED, fail, which excludes its rollouts and is counted. An answer that is a number needs no check.
"""

import os
import re
import string
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from actor.tasks.composite_reward import EXAMPLE, SYSTEM, completion_of, correctness, style
from actor.tasks.math_answer import answer_text, clean, equal, last_box, read_as_number
from actor.tasks.table import Problems, Row, place, problems
from common.config import TaskConfig
from common.types import Prompt, Score, UserError, suggest

BOXED_SYSTEM = "Solve the problem step by step. Put only the final answer into \\boxed{}."
CHECKED = 3_000  # problems; a formula takes some 10 ms of a processor, so these take half a minute at most
CHECK_SECONDS = 10.0  # to grade by one of them
PROBE = r"\boxed{1}"
UNREADABLE = "ValueError: "  # how the failure of a reward begins whose true answer cannot be read: see verify
NAMED = 10  # of those that are left out or fail
_COLUMN = re.compile(r"[^.\[\]{}!:]+(\[[^.\[\]{}!:]+\])*")  # of a template; no attributes and no formats


def verify(completion: str, answer: str) -> bool:
    """Whether the answer that a completion gives is equal to the true one; math_answer.py has the rules.

    Raises ValueError if `answer` cannot be read, and what math-verify raises. May not return: call it in a process that
    has a time-out.
    """
    given, truth = answer_text(completion), clean(answer)
    if truth is None:
        raise ValueError("the true answer is empty")
    return given is not None and equal(given, truth)


def reward(completion: str, prompt: Prompt) -> Score:
    """1 for a correct answer (task.reward=correct), or the composite reward of Eq. 10.

    In the composite reward a number within 10 % is partly correct, and a completion without an answer is unparseable.
    Raises what `verify` raises.
    """
    correct = verify(completion, prompt.answer)
    if prompt.metadata["reward"] == "correct":
        return Score(total=float(correct), correct=correct, parts={"correct": float(correct)})
    parts = {"correct": 4.0 if correct else _partly(completion, prompt.answer), **style(completion)}
    return Score(total=round(sum(parts.values()), 1), correct=correct, parts=parts)


def _partly(completion: str, answer: str) -> float:
    """The first term of Eq. 10 for an answer that is not correct."""
    given = answer_text(completion)
    if given is None:
        return -0.5
    value, truth = read_as_number(given), read_as_number(answer)
    return 0.0 if value is None or truth is None else correctness(value, truth)


def load(task: TaskConfig, split: Literal["train", "eval"]) -> Problems:
    """`task.num_train` (`task.num_eval`) problems, less those that cannot be graded (see above).

    Raises UserError for data that cannot be read, a column that is not there, an invalid task.answer_pattern, a row
    without a question, and if no problem is left.
    """
    try:
        pattern = re.compile(task.answer_pattern) if task.answer_pattern else None
    except re.error as error:
        raise UserError(f"task.answer_pattern={task.answer_pattern} is no regular expression ({error})") from None
    question, answer = _template("question", task.question), _template("answer", task.answer)
    drawn = problems(task, split, _Reader(question, answer, pattern, _opening(task), task.reward))
    known = drawn.table.column_names
    for option, template in (("question", question), ("answer", answer)):
        for column in _columns(template):
            if column not in known:
                raise UserError(f"task.{option}: {place(task, split)} has no column {column}{suggest(column, known)}")
    return _gradable(drawn, split)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes the prompt of a row."""

    question: str  # template
    answer: str  # template
    pattern: "re.Pattern[str] | None"  # of task.answer_pattern
    opening: tuple[dict[str, str], ...]  # the messages before the question
    reward: str  # task.reward

    def __call__(self, row: Row, where: str) -> Prompt:
        """Raises UserError if the row has no question, or not the keys of a template; its answer may be empty."""
        texts = {column: _text(value) for column, value in row.items()}
        question = _filled("question", self.question, texts, where).strip()
        if not question:
            raise UserError(f"{where} has no question; remove the row")
        return Prompt(
            messages=(*self.opening, {"role": "user", "content": question}),
            answer=_final(_filled("answer", self.answer, texts, where), self.pattern),
            metadata={"reward": self.reward},
        )


def _template(option: str, text: str) -> str:
    """A template; a text without braces names a column."""
    template = text if "{" in text else f"{{{text}}}"
    try:
        fields = [field for _, *field in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"task.{option}={text} is no template of columns ({error}); write {{NAME}}") from None
    for name, form, conversion in fields:
        if name is not None and (form or conversion or not _COLUMN.fullmatch(name)):
            raise UserError(f"task.{option}={text}: {{{name}}} names no column; write {{NAME}} or {{NAME[KEY]}}")
    if not _columns(template):
        raise UserError(f"task.{option}={text} names no column; write {{NAME}}")
    return template


def _columns(template: str) -> list[str]:
    return [name.partition("[")[0] for _, name, *_ in string.Formatter().parse(template) if name]


def _opening(task: TaskConfig) -> tuple[dict[str, str], ...]:
    """The messages before the question: the system prompt, unless it is empty, and the worked example, if asked for."""
    composite = task.reward == "composite"
    system = (SYSTEM if composite else BOXED_SYSTEM) if task.system is None else task.system
    messages = [{"role": "system", "content": system}] if system else []
    if task.example:
        question, working, answer = EXAMPLE
        shown = completion_of(working, answer) if composite else f"{working}\n\\boxed{{{answer}}}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": shown}]
    return tuple(messages)


def _filled(option: str, template: str, texts: Mapping[str, Any], where: str) -> str:
    try:
        return template.format_map(texts)
    except (LookupError, TypeError) as error:  # of a key in brackets
        raise UserError(f"task.{option}={template} does not fit {where} ({type(error).__name__}: {error})") from None


def _text(value: Any) -> Any:
    """A column's value for a template: null as nothing, and 145.0 as 145."""
    if value is None:
        return ""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _final(text: str, pattern: "re.Pattern[str] | None") -> str:
    """The final answer in an answer's text; empty if it has none."""
    if pattern is not None:
        *_, match = [None, *pattern.finditer(text)]
        text = "" if match is None else (match[1] or "" if pattern.groups else text[match.end() :])
    return (last_box(text) or "" if "\\boxed" in text else text).strip()


def _gradable(drawn: Problems, split: str) -> Problems:
    """The problems without those among the first CHECKED whose answer cannot be read, which are named."""
    checked = list(islice(drawn, CHECKED))
    failed = _failures([prompt for prompt in checked if read_as_number(prompt.answer) is None], split)
    if failed and len(failed) == len(checked):
        index, reason = next(iter(failed.items()))
        raise UserError(
            f"no answer of the {split} problems can be graded ({drawn.where(index)}: {reason}); set task.answer "
            "or task.answer_pattern to what is the final answer alone"
        )
    left_out = {index: reason for index, reason in failed.items() if reason.startswith(UNREADABLE)}
    kept = {index: reason for index, reason in failed.items() if index not in left_out}
    for what, named in (("are left out, since their answer cannot be read", left_out), ("fail to be graded", kept)):
        if named:
            print(
                f"{len(named)} of {len(checked)} {split} problems {what}:",
                *(f"  {drawn.where(index)}: {reason}" for index, reason in islice(named.items(), NAMED)),
                *(["  …"] if len(named) > NAMED else []),
                sep="\n",
                file=sys.stderr,
            )
    return drawn.at(np.delete(np.arange(len(drawn)), list(left_out)))


def _failures(prompts: list[Prompt], split: str) -> dict[int, str]:
    """Why a probe could not be graded, by the index of its prompt; whatever but an unreadable answer is tried twice."""
    from actor.reward_pool import RewardPool  # which imports the tasks

    if not prompts:
        return {}
    workers = min(len(os.sched_getaffinity(0)), len(prompts))
    try:
        pool = RewardPool("math", workers=workers, timeout_seconds=CHECK_SECONDS)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"the answers of the {split} problems cannot be checked ({error}); start the run again"
        ) from None

    def failures(tried: list[Prompt]) -> dict[int, str]:
        scores = pool.finish(pool.start([(PROBE, prompt) for prompt in tried]))
        return {prompt.index: score for prompt, score in zip(tried, scores, strict=True) if isinstance(score, str)}

    try:
        first = failures(prompts)
        unreadable = {index: reason for index, reason in first.items() if reason.startswith(UNREADABLE)}
        return unreadable | failures([prompt for prompt in prompts if prompt.index in first.keys() - unreadable.keys()])
    finally:
        pool.close()
