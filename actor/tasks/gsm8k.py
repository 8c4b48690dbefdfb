"""GSM8K: grade-school word problems, with the composite reward of composite_reward.py."""

from typing import Literal

from actor.tasks.composite_reward import EXAMPLE, chat, read_number, score
from actor.tasks.table import Problems, Row, problems
from common.config import TaskConfig
from common.types import Prompt, Score, UserError


def reward(completion: str, prompt: Prompt) -> Score:
    """The composite reward of a completion; `correct` means exactly the true answer."""
    parts = score(completion, prompt.answer)
    return Score(total=parts.pop("total"), correct=parts["correct"] == 4.0, parts=parts)


def load(task: TaskConfig, split: Literal["train", "eval"]) -> Problems:
    """The problems of the train (test) split that actor/tasks/table.py draws, in its words.

    Raises UserError for data that cannot be read, for fewer rows than requested, and later for an invalid row, when its
    prompt is read.
    """
    example = EXAMPLE if task.example else None

    def read(row: Row, where: str) -> Prompt:
        question, answer = _row(row, where)
        return Prompt(messages=chat(question, example), answer=answer)

    return problems(task.model_copy(update={"configuration": task.configuration or "main"}), split, read)


def _row(row: Row, where: str) -> tuple[str, str]:
    """Question and final answer of a GSM8K row: {"question": "...", "answer": "... #### 42"}."""
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where} has no {key}; give each row a question and an answer that ends in '#### 42'")
        try:
            row[key].encode()
        except UnicodeEncodeError:  # JSON can escape half of a character, which no tokenizer takes
            raise UserError(f"{where}: the {key} has characters that UTF-8 cannot hold; correct it") from None
    _, mark, answer = row["answer"].rpartition("####")
    if not mark or read_number(answer) is None:
        raise UserError(f"{where}: the answer has no number after '####'; end it in '#### 42'")
    return row["question"], answer.strip()
