"""Any reasoning-gym data set, generated when it is loaded, with the prompt and reward of composite_reward.py.

Train and eval have no problem in common, for any task.seed, task.num_train and task.num_eval: the hash of a question
assigns it to one split. A problem occurs once in eval, but may repeat in train, since easy data sets have few.
The worked example is in neither split.

Our reading [R] of answers that are not numbers: the answer is the text inside <SOLUTION>, or without one the last line
of the completion. The data set's own scorer judges it: 1 is correct (4.0), at least PARTIAL is partly correct (1.5),
less is incorrect (0.0); an empty answer, or one on which the scorer raises, is unparseable (-0.5).
"""

import hashlib
import json
import re
import string
from collections.abc import Iterator
from dataclasses import fields
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

import reasoning_gym
from reasoning_gym.factory import DATASETS

from actor.tasks.composite_reward import SOLUTION, chat, completion_of, inside, score, style
from common.config import TaskConfig
from common.types import Prompt, Score, UserError, suggest

PARTIAL = 0.5  # lower bound of partial credit; most scorers give 0.01 to 0.1 to any answer in the expected format
MAX_PROBLEMS = 100_000  # of a split: all are in memory, and each takes 10 KB and a third of a millisecond
NUM_CANDIDATES = 32  # problems from which the worked example is chosen
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")  # no leading zeros: 0110 is a string
# What data sets' scorers raise on an answer that they cannot parse. Any other exception is reported as a failed reward.
UNPARSEABLE = (ValueError, SyntaxError, TypeError, LookupError, ArithmeticError)


def load(task: TaskConfig, split: Literal["train", "eval"]) -> list[Prompt]:
    """`task.num_train` (`task.num_eval`) generated problems, the same for the same task section.

    Raises UserError for an unknown data set, an invalid option, a data set that has fewer problems than requested, and
    one whose problems JSON cannot represent.
    """
    wanted = task.num_train if split == "train" else task.num_eval
    if wanted > MAX_PROBLEMS:
        raise UserError(f"task.num_{split}={wanted} exceeds {MAX_PROBLEMS}, the most that gym generates; lower it")
    example = _example(task) if task.example else None
    seen = {example[0]} if example else set()
    prompts: list[Prompt] = []
    for entry in _entries(task, split, 16 * wanted + 256):
        question = entry["question"]
        if question in seen or _split(question) != split:
            continue
        if not prompts:
            _check_json(task, entry)
        if split == "eval":
            seen.add(question)
        prompts.append(
            Prompt(
                messages=chat(question, example),
                answer=entry["answer"] or "",
                metadata={"gym": task.gym, "options": task.gym_options, "entry": _as_json(entry)},
                index=len(prompts),
            )
        )
        if len(prompts) == wanted:
            return prompts
    raise UserError(
        f"task.num_{split}={wanted} exceeds the {len(prompts)} {split} problems found in task.gym={task.gym}; "
        "lower it, or widen task.gym_options"
    )


def reward(completion: str, prompt: Prompt) -> Score:
    """The composite reward (Eq. 10); the data set's own scorer also judges numbers, and alone any other answer."""
    parts = {"correct": _correctness(completion, prompt), **style(completion)}
    return Score(total=round(sum(parts.values()), 1), correct=parts["correct"] == 4.0, parts=parts)


def _correctness(completion: str, prompt: Prompt) -> float:
    if not _NUMBER.fullmatch(prompt.answer):
        return _judge(completion, prompt)
    correct = score(completion, prompt.answer)["correct"]
    # A data set that rounds its answers has a scorer that tolerates the rounding.
    return 4.0 if correct < 4.0 and _judge(completion, prompt) == 4.0 else correct


def _judge(completion: str, prompt: Prompt) -> float:
    answer = inside(completion, *SOLUTION)
    if answer is None:
        answer = (completion.strip().splitlines() or [""])[-1]
    answer = answer.strip()
    if not answer:
        return -0.5
    meta = prompt.metadata
    scorer = _scorer(meta["gym"], json.dumps(meta["options"], sort_keys=True))
    try:
        value = scorer.score_answer(answer, meta["entry"])
    except UNPARSEABLE:
        return -0.5
    return 4.0 if value >= 1.0 else 1.5 if value >= PARTIAL else 0.0


@lru_cache(maxsize=8)
def _scorer(name: str, options: str) -> Any:
    return reasoning_gym.create_dataset(name, **json.loads(options), seed=0, size=1)


def _split(question: str) -> str:
    return "train" if hashlib.sha256(question.encode()).digest()[0] % 2 else "eval"


def _entries(task: TaskConfig, purpose: str, size: int) -> Iterator[dict[str, Any]]:
    """`size` problems with question, answer and metadata; each purpose has its own random seed."""
    name, options = task.gym, task.gym_options
    if name not in DATASETS:
        raise UserError(f"unknown reasoning-gym data set task.gym={name}{suggest(name, DATASETS)}")
    known = [field.name for field in fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    for option in options:
        if option not in known:
            raise UserError(f"unknown option task.gym_options.{option} of task.gym={name}{suggest(option, known)}")
    # Item i of most data sets depends on seed + i alone, so neighbouring seeds would share problems.
    seed = int.from_bytes(hashlib.sha256(f"{task.seed} {purpose}".encode()).digest()[:4]) >> 1
    try:
        yield from reasoning_gym.create_dataset(name, **options, seed=seed, size=size)
    except Exception as error:  # noqa: BLE001 (data sets raise many types for invalid options, some only while they generate)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"task.gym_options={options} does not suit task.gym={name}: {reason}; correct it") from None


def _as_json(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry as plain JSON values; others, such as the fractions of gsm_symbolic, become text."""
    copy: dict[str, Any] = json.loads(json.dumps(entry, default=str))
    return copy


def _check_json(task: TaskConfig, entry: dict[str, Any]) -> None:
    """Raise UserError unless the scorer judges the JSON copy of a problem, which its reward gets, as the original."""
    scorer = _scorer(task.gym, json.dumps(task.gym_options, sort_keys=True))
    try:
        copy = _as_json(entry)
        kept = scorer.score_answer(copy["answer"], copy) == scorer.score_answer(entry["answer"], entry)
    except (TypeError, ValueError, KeyError, AttributeError):
        kept = False
    if not kept:
        raise UserError(f"task.gym={task.gym} has problems that JSON cannot represent; choose another data set")


def _example(task: TaskConfig) -> tuple[str, str, str]:
    """A worked example, in neither split: the shortest of the candidates that earn the full reward for steps."""
    shown = [
        (entry["question"], _working(task.gym, entry), entry["answer"])
        for entry in _entries(task, "example", NUM_CANDIDATES)
        if entry["answer"]
    ]
    if not shown:
        raise UserError(f"task.example=true, but task.gym={task.gym} has no answers to show; set task.example=false")
    return min(shown, key=lambda example: (-style(completion_of(*example[1:]))["steps"], len("".join(example))))


def _working(name: str, entry: dict[str, Any]) -> str:
    """The working of a problem. Even a sum of two terms has more than four steps, which Eq. 10 rewards in full."""
    if name not in ("chain_sum", "decimal_chain_sum"):
        return "I work through the problem one step at a time and check the result."
    first, *rest = entry["metadata"]["expression"].split()
    terms = [("+", first), *zip(rest[::2], rest[1::2], strict=True)]
    lines = [f"{letter} = {term}" for letter, (_, term) in zip(string.ascii_lowercase, terms, strict=False)]
    total = Decimal(0)
    for sign, term in terms:
        before, total = total, total + Decimal(term) if sign == "+" else total - Decimal(term)
        lines.append(f"{before} {sign} {term} = {total}")
    return "\n".join([*lines, f"total = {total}"])
