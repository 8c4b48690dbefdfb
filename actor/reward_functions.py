"""Functions of a user that task.rewards names, and their calls inside a worker process.

A function has the parameters (completion, prompt) and returns a number, or (completions, prompts), in the plural as
TRL's and verifiers' have them, and returns one number for each; `**kwargs` may follow. Either may be `async`.
Completions are texts, for chats too, and a None is a failure: TRL has lists of messages, and passes over a None.
"""

import inspect
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from common.method import function
from common.types import Prompt, UserError

ONE, BATCH = ("completion", "prompt"), ("completions", "prompts")  # names of the parameters


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a reward function: of a group's completions if it takes a batch, else of a single one."""

    path: str
    completions: tuple[str, ...]
    prompts: tuple[Prompt, ...]


Values = list[float | str]  # a reward, or the text of a failure, for each completion of a call


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A function of a user."""

    called: Callable[..., Any]
    batched: bool
    is_async: bool


@cache
def find(path: str) -> RewardFunction:
    """The function at a dotted path. Raises UserError if there is none, or one with other parameters."""
    try:
        called = function(path)
    except ValueError as error:
        raise UserError(f"task.rewards: {error}") from None
    for names in (ONE, BATCH):
        try:
            inspect.signature(called).bind(**dict.fromkeys(names))
        except (TypeError, ValueError):  # ValueError: a builtin without a signature
            continue
        is_async = inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(type(called).__call__)
        return RewardFunction(called, batched=names == BATCH, is_async=is_async)
    raise UserError(
        f"task.rewards: {path} has neither the parameters ({', '.join(ONE)}) nor, for a batch, ({', '.join(BATCH)}); "
        "name them so"
    )


def values_of(call: Call, wait: Callable[[Awaitable[Any]], Any]) -> Values:
    """Call the function, with `wait` for the result of an asynchronous one. Raises whatever it raises."""
    found, result = _called(call)
    return _checked(wait(result) if inspect.isawaitable(result) else result, call, found)


async def awaited_values_of(call: Call) -> Values:
    """Call an asynchronous function. Raises whatever it raises."""
    found, result = _called(call)
    return _checked(await result, call, found)


def _called(call: Call) -> tuple[RewardFunction, Any]:
    found = find(call.path)
    if found.batched:
        return found, found.called(completions=list(call.completions), prompts=list(call.prompts))
    return found, found.called(completion=call.completions[0], prompt=call.prompts[0])


def _checked(result: Any, call: Call, found: RewardFunction) -> Values:
    """The result of a call as plain floats. Raises TypeError or ValueError unless there is one for each completion."""
    results = list(result) if found.batched else [result]
    if len(results) != len(call.completions):
        raise ValueError(f"{len(results)} rewards for {len(call.completions)} completions")
    return [_number(each) for each in results]


def _number(result: Any) -> float | str:
    try:
        number = math.nan if isinstance(result, str) else float(result)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    return number if math.isfinite(number) else f"the reward returned {repr(result)[:100]}, not a finite number"
