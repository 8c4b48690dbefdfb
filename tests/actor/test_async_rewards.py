"""The process of asynchronous rewards by itself: how many calls wait in it, and when it is replaced."""

import contextlib
import time
from concurrent.futures import Future

from actor.async_rewards import MAX_CALLS, AsyncRewards
from actor.reward_functions import Call
from common.types import Prompt

PROMPT = Prompt(messages=({"role": "user", "content": "?"},), answer="42")


class Alone:
    """The reward pool, which answers each call that is handed to it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, call: Call) -> Future:
        self.calls.append(call)
        answer: Future = Future()
        answer.set_result([-1.0])
        return answer


def answers(waiting: AsyncRewards, path: str, completions: list[str]) -> list[list[float] | str]:
    calls = [waiting.call(Call(path, (text,), (PROMPT,))) for text in completions]
    return [call.result(timeout=60) for call in calls]


def test_a_hung_judge_is_cancelled_in_a_process_that_stays() -> None:
    """No call is handed to a worker of the pool: the event loop has gone on."""
    alone = Alone()
    with contextlib.closing(AsyncRewards(["judges.odd"], timeout_seconds=1.0, alone=alone)) as waiting:
        failure = "time-out: no reward within 1 s"
        assert answers(waiting, "judges.odd", ["hang", "1", "hang", "2"]) == [failure, [1.0], failure, [2.0]]
    assert alone.calls == []


def test_calls_beyond_the_most_at_one_time_take_turns() -> None:
    """Four turns of 1.3 s: the last calls were asked longer ago than the time-out, and than the grace after it."""
    alone = Alone()
    with contextlib.closing(AsyncRewards(["judges.crowd"], timeout_seconds=2.5, alone=alone)) as waiting:
        inside = answers(waiting, "judges.crowd", ["1.2"] * (4 * MAX_CALLS))
    assert not [each for each in inside if isinstance(each, str)]
    assert max(inside) == [MAX_CALLS]
    assert alone.calls == []


def test_a_loop_that_is_blocked_between_two_calls_is_replaced() -> None:
    """By what a call has left behind: the next one never starts, and its own time-out never begins."""
    alone = Alone()
    with contextlib.closing(AsyncRewards(["judges.trap"], timeout_seconds=0.5, alone=alone)) as waiting:
        assert answers(waiting, "judges.trap", ["1"]) == [[1.0]]
        time.sleep(0.5)
        assert answers(waiting, "judges.trap", ["2"]) == [[-1.0]]
    assert [call.completions for call in alone.calls] == [("2",)]
