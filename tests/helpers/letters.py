"""A task of a user's own, whose reward varies even with a model of random weights."""

from common.config import TaskConfig
from common.types import Prompt, Score


def load(task: TaskConfig, split: str) -> list[Prompt]:
    numbers = range(task.num_train) if split == "train" else range(1000, 1000 + task.num_eval)
    return [Prompt(messages=({"role": "user", "content": f"Say {n}."},), answer=str(n)) for n in numbers]


def reward(completion: str, prompt: Prompt) -> Score:
    total = sum(map(ord, completion)) % 7 / 7
    return Score(total=total, correct=total > 0.5, parts={"total": total})
