"""The reward pool: one failing reward does not affect the others or their order; no worker outlives its owner."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actor.reward_pool import RewardPool
from common.types import Prompt, Score, UserError

ROOT = Path(__file__).parents[2]
PROMPT = Prompt(messages=({"role": "user", "content": "?"},), answer="42")
TASK = """
    import ctypes, os, re, signal, sys, time
    from common.types import Score

    def load(task, split):
        return []

    def reward(completion, prompt):
        word, _, number = completion.partition(" ")
        if word == "raise":
            raise KeyError("no such\\nkey")
        if word == "regex":  # holds the interpreter lock and ignores SIGTERM: only SIGKILL ends it
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            re.match("(a+)+$", "a" * 60 + "b")
        if word == "sleep":
            time.sleep(float(number))
        if word == "exit":
            os._exit(3)
        if word == "first" and not os.path.exists(__file__ + ".first"):
            open(__file__ + ".first", "w").close()
            os._exit(3)
        if word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "segfault":
            ctypes.string_at(0)
        if word == "leave":
            sys.exit(5)
        if word == "nan":
            return Score(total=float("nan"), correct=False, parts={})
        if word == "huge":
            return Score(total=10**400, correct=False, parts={})
        if word == "none":
            return None
        if word == "lambda":
            return Score(total=1.0, correct=True, parts={"f": lambda: 1})
        if word == "modules":
            return Score(total=0.0, correct=True, parts={m: 1.0 for m in ("ray", "torch", "vllm") if m in sys.modules})
        return Score(total=float(number or 1), correct=True, parts={"process": os.getpid()})
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("task")
    (folder / "rough_task.py").write_text(textwrap.dedent(TASK))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pool(path: Path) -> Iterator[RewardPool]:
    pool = RewardPool("rough_task", workers=2, timeout_seconds=1.5)
    yield pool
    pool.close()


def score_all(pool: RewardPool, completions: list[tuple[str, Prompt]]) -> list[Score | str]:
    return pool.finish(pool.start(completions))


def words(pool: RewardPool, *completions: str) -> list[str]:
    """The failure of each completion, or "ok"."""
    return ["ok" if isinstance(r, Score) else r for r in score_all(pool, [(c, PROMPT) for c in completions])]


@pytest.mark.parametrize(
    ("completion", "failure"),
    [
        ("raise", "KeyError: 'no such\\nkey'"),
        ("leave", "SystemExit: 5"),
        ("nan", "the reward returned total=nan, which is not finite"),
        ("huge", "OverflowError: int too large to convert to float"),
        ("none", "the reward returned NoneType, not a Score"),
        ("lambda", "TypeError: float() argument must be a string or a real number, not 'function'"),
        ("exit", "the reward ended its process (exit code 3)"),
        ("segfault", f"the reward ended its process (exit code -{int(signal.SIGSEGV)})"),
        ("sleep 60", "time-out: no reward within 1.5 s"),
        ("regex", "time-out: no reward within 1.5 s"),
    ],
)
def test_a_failure_costs_its_own_rollout_only(pool: RewardPool, completion: str, failure: str) -> None:
    assert words(pool, "ok", completion, "ok", "ok") == ["ok", failure, "ok", "ok"]
    assert words(pool, "ok", "ok") == ["ok", "ok"]


def test_rewards_are_computed_while_the_caller_does_something_else(pool: RewardPool) -> None:
    started = [pool.start([("ok 2", PROMPT), ("ok 3", PROMPT)]), pool.start([("raise", PROMPT), ("ok 5", PROMPT)])]
    for future in [*started[0], *started[1]]:
        future.result(timeout=60)  # ends without a call of finish
    (two, three), (failed, five) = map(pool.finish, started)
    assert [s.total for s in (two, three, five)] == [2.0, 3.0, 5.0]
    assert failed == "KeyError: 'no such\\nkey'"


def test_order_is_kept(pool: RewardPool) -> None:
    scores = score_all(pool, [(f"value {n}", PROMPT) for n in range(200)])
    assert [s.total for s in scores if isinstance(s, Score)] == list(range(200))
    assert score_all(pool, []) == []


def test_time_in_the_queue_does_not_count(pool: RewardPool) -> None:
    assert words(pool, *["sleep 0.8"] * 8) == ["ok"] * 8  # 3.2 s in total for two workers; the limit is 1.5 s per call


def test_every_worker_dies_and_the_rest_is_scored(pool: RewardPool) -> None:
    failure = "the reward ended its process (exit code 3)"
    assert words(pool, *["exit"] * 3, "ok", "exit", "ok") == [failure] * 3 + ["ok", failure, "ok"]


def test_workers_killed_while_idle_are_replaced_without_a_failed_rollout(pool: RewardPool) -> None:
    scores = score_all(pool, [("sleep 0.2", PROMPT)] * 2)
    for process in {int(s.parts["process"]) for s in scores if isinstance(s, Score)}:
        os.kill(process, signal.SIGKILL)
    time.sleep(0.5)
    assert words(pool, "ok", "ok", "leave", "ok") == ["ok", "ok", "SystemExit: 5", "ok"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_call_whose_process_is_killed_or_stopped_is_repeated(pool: RewardPool, number: signal.Signals) -> None:
    scores = score_all(pool, [("sleep 0.2", PROMPT)] * 2)
    processes = {int(s.parts["process"]) for s in scores if isinstance(s, Score)}
    scoring = pool.start([("sleep 0.7", PROMPT)] * 3)
    time.sleep(0.3)
    for process in processes:
        os.kill(process, number)
    assert all(isinstance(score, Score) for score in pool.finish(scoring))


def test_a_reward_that_ends_its_process_is_not_tried_again(pool: RewardPool) -> None:
    assert words(pool, "first", "ok") == ["the reward ended its process (exit code 3)", "ok"]
    assert words(pool, "first") == ["ok"], "a second call would have succeeded"


def test_a_reward_that_always_has_its_process_killed_is_given_up(pool: RewardPool) -> None:
    assert words(pool, "kill", "ok") == ["the reward ended its process (exit code -9)", "ok"]


def test_a_pool_outlives_the_thread_that_made_it(path: Path) -> None:
    pools: list[RewardPool] = []
    scores: list[Score | str] = []

    def make() -> None:
        pools.append(RewardPool("rough_task", workers=1, timeout_seconds=5))
        scores.extend(score_all(pools[0], [("ok", PROMPT)]))

    maker = threading.Thread(target=make)
    maker.start()
    maker.join()
    time.sleep(0.5)
    assert score_all(pools[0], [("ok", PROMPT)]) == scores  # by the same process
    pools[0].close()
    with pytest.raises(RuntimeError, match="shutdown"):
        score_all(pools[0], [("ok", PROMPT)])


def test_close_ends_all_processes_and_all_waits(path: Path) -> None:
    pool = RewardPool("rough_task", workers=1, timeout_seconds=100)
    (score,) = score_all(pool, [("ok", PROMPT)])
    assert isinstance(score, Score)
    hung, queued = pool.start([("regex", PROMPT), ("ok", PROMPT)])
    time.sleep(0.3)
    pool.close()
    pool.close()
    assert not Path(f"/proc/{int(score.parts['process'])}").exists()
    assert hung.result(timeout=0) == "the reward ended its process (exit code -9)"
    assert queued.cancelled()


def test_a_worker_that_cannot_start_ends_the_construction(path: Path) -> None:
    (path / "no_worker_task.py").write_text(textwrap.dedent(TASK) + "if '-P' in sys.orig_argv: sys.exit(7)\n")
    with pytest.raises(RuntimeError, match="did not start; see its output above"):
        RewardPool("no_worker_task", workers=2, timeout_seconds=1)


def test_a_prompt_that_cannot_be_pickled_costs_its_own_rollout_only(pool: RewardPool) -> None:
    odd = Prompt(messages=(), answer=lambda: 42)  # type: ignore[arg-type]
    failure, score = score_all(pool, [("ok", odd), ("ok", PROMPT)])
    assert "pickle" in str(failure) and isinstance(score, Score)


def test_a_prompt_is_graded_by_the_task_that_it_names(path: Path) -> None:
    """Its module, which takes longer than a reward may, is imported before the first call, by every worker."""
    slow = "import sys, time\nif '-P' in sys.orig_argv: time.sleep(1.5)\n" + textwrap.dedent(TASK)
    (path / "slow_task.py").write_text(slow.replace("float(number or 1)", "float(number or 1) + 100"))
    named = Prompt(messages=(), answer="42", task="slow_task")
    with contextlib.closing(RewardPool("rough_task", workers=2, timeout_seconds=1, graders=["slow_task"])) as pool:
        first = score_all(pool, [("ok 1", named), ("ok 2", PROMPT), ("ok 3", named), ("exit", named), ("ok 4", named)])
        assert [s.total if isinstance(s, Score) else s for s in first] == [
            *(101, 2, 103, "the reward ended its process (exit code 3)", 104),
        ]


def test_an_unknown_task_is_rejected_before_a_process_starts() -> None:
    with pytest.raises(UserError, match=r"task\.name=gsm9k"):
        RewardPool("gsm9k", workers=1, timeout_seconds=1)


OWNER = """
    import sys, threading, types
    open("imports", "a").write(__name__ + "\\n")
    sys.modules["torch"] = types.ModuleType("torch")  # the workers must not import what the owner imports
    from actor.reward_pool import RewardPool
    from common.types import Prompt

    if __name__ == "__main__":
        prompt = Prompt(messages=(), answer="42")
        pool = RewardPool("rough_task", workers=2, timeout_seconds=100)
        print(*[dict(s.parts) for s in pool.finish(pool.start([("modules", prompt)]))])
        print(*{int(s.parts["process"]) for s in pool.finish(pool.start([("ok", prompt)] * 50))}, flush=True)
        pool.finish(pool.start([("regex", prompt)] * 2))
"""


def test_workers_import_nothing_of_their_owner_and_die_with_it(path: Path) -> None:
    (path / "owner.py").write_text(textwrap.dedent(OWNER))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{path}"}
    owner = subprocess.Popen([sys.executable, "owner.py"], cwd=path, env=environment, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline().strip() == "{}"
    workers = owner.stdout.readline().split()
    assert workers
    assert (path / "imports").read_text() == "__main__\n"
    time.sleep(1)  # both workers are inside a regular expression
    assert all(Path(f"/proc/{worker}").exists() for worker in workers)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 60
    while any(_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupt_leaves_the_workers_alone(pool: RewardPool) -> None:
    (before,) = score_all(pool, [("ok", PROMPT)])
    assert isinstance(before, Score)
    os.kill(int(before.parts["process"]), signal.SIGINT)
    time.sleep(0.3)
    assert _running(str(int(before.parts["process"])))
