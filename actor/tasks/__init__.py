"""Tasks: each is a module with two functions.

load(task: TaskConfig, split: "train" | "eval") -> Sequence[Prompt]
reward(completion: str, prompt: Prompt) -> Score
"""

from types import ModuleType

from common.files import user_module
from common.types import UserError

TASKS = ("gsm8k", "math", "gym")


def task_module(name: str) -> ModuleType:
    """The module of a task: one of TASKS, or the user's own by its dotted path.

    Raises UserError for an unknown name, a module that cannot be imported, and one without load or reward.
    """
    path = f"{__name__}.{name}" if name in TASKS else name
    try:
        module = user_module(path)
    except (ImportError, ValueError, TypeError) as error:  # ValueError, TypeError: an empty or a relative name
        known = ", ".join(TASKS)
        raise UserError(
            f"unknown task task.name={name} ({error}); name one of {known}, or a module that can be imported"
        ) from None
    for function in ("load", "reward"):
        if not callable(getattr(module, function, None)):
            raise UserError(f"task.name={name}: the module has no function {function}; a task needs load and reward")
    return module
