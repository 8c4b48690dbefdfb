"""GSM8K: grade-school word problems, with the composite reward of composite_reward.py."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from actor.tasks.composite_reward import chat, read_number, score
from common.config import TaskConfig
from common.types import Prompt, Score, UserError

EXAMPLE = (
    (
        "A box holds 12 pens. Mia buys 3 boxes, gives 8 pens away and shares the rest among 4 friends. "
        "Then each friend loses 2 pens and finds 1. How many pens has each friend?"
    ),
    "3 * 12 = 36\n36 - 8 = 28\n28 / 4 = 7\n7 - 2 = 5\n5 + 1 = 6",
    "6",
)
"""The worked example: question, working, answer."""


def reward(completion: str, prompt: Prompt) -> Score:
    """The composite reward of a completion; `correct` means exactly the true answer."""
    parts = score(completion, prompt.answer)
    return Score(total=parts.pop("total"), correct=parts["correct"] == 4.0, parts=parts)


def load(task: TaskConfig, split: Literal["train", "eval"]) -> list[Prompt]:
    """`task.num_train` (`task.num_eval`) problems of the train (test) split, drawn by `task.seed` without replacement.

    A larger number extends a smaller draw, and the splits are drawn independently. Raises UserError for data that
    cannot be read, for an invalid row, and for fewer rows than requested.
    """
    name, wanted = ("train", task.num_train) if split == "train" else ("test", task.num_eval)
    rows = _rows(task.data, name)
    if len(rows) < wanted:
        raise UserError(
            f"task.num_{split}={wanted} exceeds the {len(rows)} {name} problems of task.data={task.data}; lower it"
        )
    random.Random(task.seed).shuffle(rows)
    example = EXAMPLE if task.example else None
    return [
        Prompt(messages=chat(question, example), answer=answer, index=index)
        for index, (question, answer) in enumerate(rows[:wanted])
    ]


def _rows(data: str | None, name: str) -> list[tuple[str, str]]:
    """(question, answer) of every row of the split `name`, from a folder or a hub data set."""
    if not data:
        raise UserError("task.data is not set; name a folder with train.jsonl and test.jsonl, or openai/gsm8k")
    if not Path(data).is_dir():
        return [_row(row, f"{data}[{name}] row {number}") for number, row in enumerate(_hub_rows(data, name), start=1)]
    path = Path(data) / f"{name}.jsonl"
    if path.exists() and not path.is_file():  # a pipe has no end
        raise UserError(f"{path} is not a file; task.data needs train.jsonl and test.jsonl")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); task.data needs train.jsonl and test.jsonl"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # ValueError: not JSON, or not UTF-8
                raise UserError(f"{path}:{number} is not JSON; correct or remove the line") from None
            rows.append(_row(row, f"{path}:{number}"))
    if not rows:
        raise UserError(f"{path} is empty; task.data needs one JSON object per line with question and answer")
    return rows


def _hub_rows(data: str, name: str) -> Iterable[Any]:
    import datasets  # slow to import, and only needed for the hub

    try:
        rows: Iterable[Any] = datasets.load_dataset(data, "main", split=name)
    except Exception as error:  # noqa: BLE001 (the hub's client and transports raise many unrelated types)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"task.data={data} is not a directory and could not be loaded from the hub ({reason}); "
            "name a folder with train.jsonl and test.jsonl, or openai/gsm8k"
        ) from None
    return rows


def _row(row: Any, where: str) -> tuple[str, str]:
    """Question and final answer of a GSM8K row: {"question": "...", "answer": "... #### 42"}."""
    for key in ("question", "answer"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where} has no {key}; give each row a question and an answer that ends in '#### 42'")
        try:
            row[key].encode()
        except UnicodeEncodeError:  # JSON can escape half of a character, which no tokenizer takes
            raise UserError(f"{where}: the {key} has characters that UTF-8 cannot hold; correct it") from None
    _, mark, answer = row["answer"].rpartition("####")
    if not mark or read_number(answer) is None:
        raise UserError(f"{where}: the answer has no number after '####'; end it in '#### 42'")
    return row["question"], answer.strip()
