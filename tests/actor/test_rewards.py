"""Composed rewards: sums by hand, batches of a whole group, asynchronous judges, and failures that stay alone."""

import contextlib
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import judges
import psutil
import pytest

from actor import rewards
from actor.reward_pool import RewardPool
from actor.rewards import ComposedRewards, composed
from actor.tasks import gsm8k
from common.config import Config, with_values
from common.types import Prompt, Score

PROMPT = Prompt(messages=({"role": "user", "content": "?"},), answer="42")
TIMEOUT = "time-out: no reward within 1.5 s"
COMPLETIONS = ["42", "4 2 x", "seven words", ""]


def config(weights: dict[str, float], **values: Any) -> Config:
    options = {"task.name": "judges", "task.rewards": weights}
    options |= {"actor.reward_workers": 1, "actor.reward_timeout_seconds": 1.5}
    return with_values(Config(), options | {name.replace("__", "."): value for name, value in values.items()})


@contextlib.contextmanager
def scoring(weights: dict[str, float], **values: Any) -> Iterator[rewards.Rewards]:
    with contextlib.closing(rewards.start(config(weights, **values))) as started:
        yield started


def score(scored: rewards.Rewards, completions: list[str], prompt: Prompt = PROMPT) -> list[Score | str]:
    return scored.finish(scored.start([(completion, prompt) for completion in completions]))


def totals(scores: list[Score | str]) -> list[float | str]:
    return [each.total if isinstance(each, Score) else each for each in scores]


def test_weighted_sum_by_hand() -> None:
    own = Score(total=9.0, correct=True, parts={"format": 1.5, "steps": 0.7})
    got = composed(own, {"a.b": 10.0}, {"a.b": 0.2, "format": -2.0, "correct": 4.0, "steps": 0.0})
    assert got == Score(
        total=0.2 * 10.0 - 2.0 * 1.5 + 4.0,
        correct=True,
        parts={"a.b": 10.0, "format": 1.5} | {"correct": 1.0, "steps": 0.7},
    )
    assert isinstance(got, Score) and list(got.parts) == ["a.b", "format", "correct", "steps"], (
        "the order of task.rewards"
    )
    partly = Score(total=1.5, correct=False, parts={"correct": 1.5})
    assert composed(partly, {}, {"correct": 2.0}) == Score(total=3.0, correct=False, parts={"correct": 1.5})


def test_a_reward_that_fails_is_named_and_never_a_zero() -> None:
    own = Score(total=1.0, correct=True, parts={})
    assert composed(own, {"a.b": "it broke", "a.c": "too"}, {"correct": 1.0, "a.c": -2.0, "a.b": 1.0}) == "a.c: too"
    assert composed(own, {}, {"format": 1.0}) == "format: the task's reward has no such part"
    nan = Score(total=1.0, correct=True, parts={"format": math.nan})
    assert composed(nan, {}, {"format": 1.0}) == "format: it is nan, which is not finite"


@pytest.mark.parametrize("weights", [{"a.b": 1e308}, {"a.b": 1.0, "a.c": 1.0}, {"a.b": 1e308, "a.c": -1e308}])
def test_a_sum_that_is_not_finite_is_a_failure(weights: dict[str, float]) -> None:
    own = Score(total=1.0, correct=True, parts={})
    assert "not finite" in str(composed(own, {"a.b": 1e308, "a.c": 1e308}, weights))


def test_a_reward_of_weight_0_that_fails_changes_nothing_that_is_trained_on() -> None:
    """It is left out of the parts; the others count as without it."""
    own = Score(total=1.0, correct=True, parts={"format": math.nan})
    weights = {"a.b": 0.0, "correct": 2.0, "format": 0.0, "steps": 0.0, "a.c": 1.0, "a.d": 0.0}
    got = composed(own, {"a.b": "it broke", "a.c": 3.0, "a.d": 4.0}, weights)
    assert got == Score(total=5.0, correct=True, parts={"correct": 1.0, "a.c": 3.0, "a.d": 4.0})


def test_the_parts_of_gsm8k_with_weight_1_are_its_reward() -> None:
    """All completions of up to four pieces, of which some repeat a tag and some have a wrong number."""
    pieces = [
        "<start_working_out>",
        "1 + 1 = 2\n2 + 2 = 4",
        "</start_working_out>",
        "<SOLUTION>",
        "42",
        "</SOLUTION>",
        "41",
    ]
    texts = {
        "".join(pieces[i] for i in (a, b, c, d) if i < 7)
        for a in range(8)
        for b in range(8)
        for c in range(8)
        for d in range(8)
    }
    weights = dict.fromkeys(("correct", "format", "present", "steps"), 1.0)
    seen = set()
    for text in texts:
        own = gsm8k.reward(text, PROMPT)
        got = composed(own, {}, weights)
        assert isinstance(got, Score) and (got.correct, got.parts) == (own.correct, own.parts)
        assert got.total == pytest.approx(own.total, abs=1e-12)
        seen.add(own.total)
    assert len(seen) > 20


def test_without_rewards_the_task_decides_as_before() -> None:
    with scoring({}) as scored:
        assert isinstance(scored, RewardPool)
        assert score(scored, COMPLETIONS) == [judges.reward(each, PROMPT) for each in COMPLETIONS]


@pytest.fixture(scope="module")
def mixed() -> Iterator[rewards.Rewards]:
    with scoring(
        {"judges.rank": 1.0, "words": 10.0, "judges.length": 100.0, "judges.fair": 0.0}, actor__reward_workers=2
    ) as scored:
        yield scored


def test_parts_functions_and_batches_through_processes(mixed: rewards.Rewards) -> None:
    started = [mixed.start([(text, PROMPT) for text in group]) for group in (["4", "444"], ["42", "5555555", "6"])]
    first, second = map(mixed.finish, started)
    # rank within the group + 10 words + 100 * length / 10
    assert totals(first) == [0 + 10 + 10, 1 + 10 + 30]
    assert totals(second) == [1 + 10 + 20, 2 + 10 + 70, 0 + 10 + 10]
    last = second[0]
    assert isinstance(last, Score) and last.correct
    assert last.parts == {"judges.rank": 1.0, "words": 1.0, "judges.length": 0.2, "judges.fair": 42.0}


def test_a_failure_costs_its_own_rollout_only(mixed: rewards.Rewards) -> None:
    assert totals(score(mixed, ["12", "0" * 99, "1"])) == [1 + 10 + 20, "judges.length: KeyError: 'too long'", 20]
    nan = "judges.rank: the reward returned nan, not a finite number"
    assert totals(score(mixed, ["7", "3.5"])) == [20, nan]


def test_a_batch_that_fails_costs_its_group(mixed: rewards.Rewards) -> None:
    less = "judges.rank: ValueError: 2 rewards for 3 completions"
    assert totals(score(mixed, ["1", "1111", "3"])) == [less] * 3
    assert totals(score(mixed, ["1"])) == [20]


def test_a_batch_of_weight_0_that_fails_costs_nothing(mixed: rewards.Rewards) -> None:
    first, last = score(mixed, ["1", "x"])  # judges.fair raises
    assert totals([first, last]) == [20, 20]
    assert isinstance(first, Score) and list(first.parts) == ["judges.rank", "words", "judges.length"]


def test_the_prompt_of_an_evaluation_set_is_graded_by_its_task_alone(mixed: rewards.Rewards) -> None:
    prompt = Prompt(messages=(), answer="42", task="gsm8k")
    assert score(mixed, ["42", "x"], prompt) == [gsm8k.reward(text, prompt) for text in ("42", "x")]


@pytest.mark.slow
@pytest.mark.parametrize("weights", [{}, {"format": 1.0}])
def test_a_set_is_graded_by_its_task_and_the_run_by_its_own_rewards(weights: dict[str, float]) -> None:
    sets = {"task.name": "gsm8k", "evaluation.sets": ("math500:x", "aime24:y")}
    half = Prompt(messages=(), answer="0.5", task="math", metadata={"reward": "correct"})
    with contextlib.closing(rewards.start(with_values(config(weights), sets))) as scored:
        of_set = scored.start([("so it is \\boxed{\\frac{1}{2}}", half), ("\\boxed{2}", half)])
        own = scored.start([("<SOLUTION>42</SOLUTION>", PROMPT)])
        graded = scored.finish(of_set)
        assert [isinstance(each, Score) and (each.total, each.correct) for each in graded] == [(1, True), (0, False)]
        [trained] = scored.finish(own)
        assert isinstance(trained, Score) and trained.correct
        assert set(trained.parts) == (set(weights) or {"correct", "format", "present", "steps"})


def test_what_was_started_ends_when_the_rest_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the process of the asynchronous rewards, after the workers."""
    code = (
        "import sys\nif 'actor.async_rewards' in sys.orig_argv: sys.exit(7)\nasync def f(completion, prompt): return 1"
    )
    (tmp_path / "leaves_async.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(psutil.Process().children())
    with pytest.raises(RuntimeError, match="asynchronous rewards did not start") as raised:
        rewards.start(config({"leaves_async.f": 1.0}))
    assert raised.traceback and set(psutil.Process().children()) == before, "whose frames would keep the workers"


def test_asynchronous_calls_wait_at_the_same_time() -> None:
    """Of two groups and one worker; alone, a call would wait for the others until its time-out."""
    with scoring({"judges.together": 1.0}, actor__reward_timeout_seconds=20.0) as scored:
        half = judges.TOGETHER // 2
        started = [scored.start([(str(n), PROMPT) for n in range(first, first + half)]) for first in (0, half)]
        assert [total for each in started for total in totals(scored.finish(each))] == list(range(judges.TOGETHER))


def test_the_workers_of_the_pool_await_too_and_keep_their_event_loop() -> None:
    """A client that a reward keeps belongs to the loop of its first call."""
    with scoring({"judges.late": 1.0}) as scored:
        assert totals(score(scored, ["a", "b", "c"])) == [1.0] * 3


@pytest.mark.parametrize(
    ("completion", "failure"),
    [
        ("hang", TIMEOUT),
        ("stubborn", TIMEOUT),
        ("block", TIMEOUT),
        ("exit", "the reward ended its process (exit code 3)"),
        ("leave", "SystemExit: 5"),
        ("raise", "TimeoutError: of its own"),
        ("x", "ValueError: could not convert string to float: 'x'"),
    ],
)
def test_an_asynchronous_failure_costs_its_own_rollout_only(
    odd: rewards.Rewards, completion: str, failure: str
) -> None:
    assert totals(score(odd, ["1", completion, "3", "4"])) == [1.0, f"judges.odd: {failure}", 3.0, 4.0]
    assert totals(score(odd, ["5", "6"])) == [5.0, 6.0]


@pytest.fixture(scope="module")
def odd() -> Iterator[rewards.Rewards]:
    with scoring({"judges.odd": 1.0}) as scored:
        yield scored


def test_asynchronous_calls_of_a_killed_process_are_made_again(odd: rewards.Rewards, tmp_path: Path) -> None:
    prompt = Prompt(messages=(), answer="1", metadata={"folder": str(tmp_path)})
    assert totals(score(odd, ["2", "kill once", "3"], prompt)) == [2.0, 1.0, 3.0]
    assert (tmp_path / "seen").exists()


def test_close_ends_calls_that_wait() -> None:
    scored = ComposedRewards(config({"judges.odd": 1.0}, actor__reward_timeout_seconds=500.0))
    started = scored.start([("hang", PROMPT)])
    scored.close()
    scored.close()
    assert started.others is not None
    [(_, future)] = started.others["judges.odd"]
    assert future.cancelled()


class Judge(BaseHTTPRequestHandler):
    """Scores a completion by its length, once as many requests are there as the server waits for."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["completion"] == "hang":
            self.server.hung.wait()  # type: ignore[attr-defined]
        if asked["completion"] not in ("hang", "refuse"):
            self.server.barrier.wait()  # type: ignore[attr-defined]
        body = json.dumps({"score": len(asked["completion"]) + int(asked["answer"])}).encode()
        self.send_response(503 if asked["completion"] == "refuse" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # of a call that was cancelled
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_judge_behind_http() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.barrier, server.hung = threading.Barrier(3), threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    prompt = Prompt(messages=(), answer="42", metadata={"judge": f"http://127.0.0.1:{server.server_port}"})
    weights = {"judges.judge": 0.5, "words": 1.0}
    try:
        with scoring(weights, actor__reward_timeout_seconds=3.0) as scored:
            for _ in range(2):  # the client is used again
                got = score(scored, ["a", "hang", "b b", "refuse", "ccc c"], prompt)
                assert totals([got[0], got[2], got[4]]) == [0.5 * 43 + 1, 0.5 * 45 + 2, 0.5 * 47 + 2]
                assert got[1] == "judges.judge: time-out: no reward within 3 s"
                assert "HTTPStatusError" in str(got[3]) and "503" in str(got[3])
    finally:
        server.hung.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()
