"""The task math: columns and templates, prompts, rewards, and problems that cannot be graded."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from actor.reward_pool import RewardPool, describe
from actor.tasks import math, math_answer, task_module
from actor.tasks.composite_reward import SOLUTION, SYSTEM, completion_of
from actor.tasks.math import BOXED_SYSTEM, load, reward, verify
from common.config import TaskConfig
from common.types import Prompt, Score, UserError

REAL = Path(__file__).parents[4] / "shared/data"
S, S_ = SOLUTION
HANGS = "9^{9^{9^{9^{9}}}}"  # math-verify computes it


def task(data: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> TaskConfig:
    if rows is not None:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskConfig(**{"name": "math", "data": str(data), "num_train": 1, "num_eval": 1, **changes})


def one(data: Path, row: dict[str, Any], **changes: Any) -> Prompt:
    """The prompt of a row of a table that has it twice."""
    return load(task(data, [row, row], **changes), "train")[0]


def test_columns_templates_and_patterns(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    row = {"question": "2+3?", "answer": "1=1, 2+3=5 #### 5", "Body": "I {eat}.", "number": 145.0, "in": {"truth": "7"}}
    plain = one(data, row, answer_pattern="####")
    assert (plain.messages[-1]["content"], plain.answer) == ("2+3?", "5")
    assert one(data, row, answer_pattern=r"=(\d)").answer == "5"
    assert one(data, row, answer="number", question="{Body} {question}").messages[-1]["content"] == "I {eat}. 2+3?"
    assert one(data, row, answer="number").answer == "145"
    assert one(data, row, answer="{in[truth]}").answer == "7"
    solved = {"question": "q", "answer": r"As \boxed{1} is wrong, it is \boxed{\frac{1}{2}}."}
    assert one(data, solved).answer == r"\frac{1}{2}"


def test_the_messages_ask_for_what_the_reward_reads(tmp_path: Path) -> None:
    data, row = tmp_path / "rows.jsonl", {"question": "q?", "answer": "7"}
    plain, tagged = one(data, row).messages, one(data, row, reward="composite", example=True).messages
    assert [(m["role"], m["content"]) for m in plain] == [("system", BOXED_SYSTEM), ("user", "q?")]
    assert [m["role"] for m in tagged] == ["system", "user", "assistant", "user"]
    assert tagged[0]["content"] == SYSTEM
    assert verify(tagged[2]["content"], "6")
    assert verify(one(data, row, example=True).messages[2]["content"], "6")
    assert one(data, row, system="Be brief.").messages[0] == {"role": "system", "content": "Be brief."}
    assert [m["role"] for m in one(data, row, system="").messages] == ["user"]


def test_rewards(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    fraction = {"question": "q", "answer": r"\frac{3}{4}"}
    boxed, tagged = one(data, fraction), one(data, fraction, reward="composite")
    for completion, total in ((r"\boxed{0.75}", 1.0), (r"\boxed{0.7}", 0.0), ("", 0.0)):
        score = reward(completion, boxed)
        assert (score.total, score.correct, score.parts) == (total, total == 1.0, {"correct": total})
    full = reward(completion_of("a = 1\nb = 2\nc = 3\nd = 4\ne = 5", "0.75"), tagged)
    assert (full.total, full.correct) == (7.5, True)
    number = one(data, {"question": "q", "answer": "100"}, reward="composite")
    for prompt, answer, correct in (
        (number, "100 apples", 4.0), (number, "110", 1.5), (number, "111", 0.0), (number, "100, 101", 0.0),
        (number, "x", 0.0), (number, "", -0.5), (tagged, "0.7", 0.0), (tagged, "", -0.5),
    ):  # fmt: skip
        assert reward(f"{S}{answer}{S_}", prompt).parts["correct"] == correct


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": "Question"}, "rows.jsonl has no column Question; did you mean question?"),
        ({"answer": "{question} {solution}"}, "task.answer: "),
        ({"question": "{question"}, "task.question={question is no template"),
        ({"question": "{question.__class__}"}, "names no column"),
        ({"question": "{question!r:>9}"}, "names no column"),
        ({"question": "{}"}, "names no column"),
        ({"question": "{{x}}"}, "names no column"),
        ({"answer_pattern": "("}, "task.answer_pattern=( is no regular expression"),
        ({"answer_pattern": "####"}, "no answer of the train problems can be graded"),
        ({"answer": "{in[falsehood]}"}, "does not fit"),
        ({"answer": "{answer[key]}"}, "does not fit"),
    ],
)
def test_bad_options_are_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    row = {"question": "q", "answer": "7", "in": {"truth": "7"}}
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        list(load(task(tmp_path / "rows.jsonl", [row, row], **changes), "train"))
    assert words in str(error.value)


def test_a_row_without_a_question_is_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": None, "answer": "7"}] * 2
    with pytest.raises(UserError, match=r"rows.jsonl row [12] has no question"):
        load(task(tmp_path / "rows.jsonl", rows), "train")


def test_problems_whose_answer_cannot_be_read_are_left_out_and_those_that_hang_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(math, "CHECK_SECONDS", 3.0)
    answers = [r"\frac{1}{2}", "12:00", None, "5", HANGS, "x+1"]
    rows = [{"question": f"q{number}", "answer": answer} for number, answer in enumerate(answers)]
    for split in ("train", "eval"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = load(task(tmp_path, num_train=6, num_eval=2, eval_split="eval"), "train")
    assert sorted(prompt.answer for prompt in kept) == ["5", HANGS, r"\frac{1}{2}", "x+1"]
    assert [prompt.index for prompt in kept] == [0, 1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert lines.pop(0) == "2 of 6 train problems are left out, since their answer cannot be read:"
    assert lines.pop(2) == "1 of 6 train problems fail to be graded:"
    assert dict(line.strip().partition(": ")[::2] for line in lines) == {
        f"{tmp_path}/train.jsonl row 2": "ValueError: math-verify cannot read the true answer 12:00",
        f"{tmp_path}/train.jsonl row 3": "ValueError: the true answer is empty",
        f"{tmp_path}/train.jsonl row 5": "time-out: no reward within 3 s",
    }


class Pool:
    """Grades here what the worker processes would, but the calls up to `troubled` fail with `trouble`."""

    trouble, troubled = "", 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls = 0

    def start(self, pairs: list[tuple[str, Prompt]]) -> list[tuple[str, Prompt]]:
        return pairs

    def finish(self, pairs: list[tuple[str, Prompt]]) -> list[Score | str]:
        return [self.graded(*pair) for pair in pairs]

    def graded(self, completion: str, prompt: Prompt) -> Score | str:
        self.calls += 1
        try:
            return self.trouble if self.calls <= self.troubled else reward(completion, prompt)
        except ValueError as error:
            return describe(error)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("trouble", ["time-out: no reward within 3 s", "the reward ended its process (exit code -9)"])
def test_what_the_machine_does_leaves_the_same_problems_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    """Else a run that is resumed on a busy machine would train in another order than it counts in."""
    monkeypatch.setattr("actor.reward_pool.RewardPool", Pool)
    monkeypatch.setattr(Pool, "trouble", trouble)
    rows = [{"question": str(n), "answer": r"\frac{1}{2}" if n % 3 else "12:00"} for n in range(12)]
    config = task(tmp_path / "rows.jsonl", rows, num_train=11)
    calm, said = list(load(config, "train")), capsys.readouterr()
    assert "3 of 11 train problems are left out" in said.err
    for troubled in (1, 5, 11):  # of the first calls; those are tried again
        monkeypatch.setattr(Pool, "troubled", troubled)
        assert list(load(config, "train")) == calm
        assert capsys.readouterr().err.splitlines()[0] == said.err.splitlines()[0]


def test_a_wrong_column_is_an_error_though_more_problems_than_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actor.reward_pool.RewardPool", Pool)
    monkeypatch.setattr(math, "CHECKED", 2)
    with pytest.raises(UserError, match=r"^no answer of the train problems can be graded [^\n]*$"):
        load(task(tmp_path / "rows.jsonl", [{"question": "q", "answer": " "}] * 5, num_train=4), "train")


def test_workers_that_do_not_start_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a reward worker did not start; see its output above")

    monkeypatch.setattr("actor.reward_pool.RewardPool", broken)
    with pytest.raises(UserError, match=r"^the answers of the train problems cannot be checked \(a reward worker did"):
        load(task(tmp_path / "rows.jsonl", [{"question": "q", "answer": "x+1"}] * 2), "train")


def test_what_hangs_or_raises_fails_in_the_pool_and_the_others_are_scored() -> None:
    assert task_module("math") is math
    good, unreadable = (Prompt(messages=(), answer=a, metadata={"reward": "correct"}) for a in (r"\sqrt{12}", "12:00"))
    pool = RewardPool("math", workers=2, timeout_seconds=3.0)
    try:
        calls = [(r"\boxed{2\sqrt{3}}", good), (rf"\boxed{{{HANGS}}}", good), (r"\boxed{1:00}", unreadable)]
        scores = pool.finish(pool.start([*calls, (r"\boxed{3}", good)]))
    finally:
        pool.close()
    assert [score if isinstance(score, str) else score.total for score in scores] == [
        1.0, "time-out: no reward within 3 s", "ValueError: math-verify cannot read the true answer 12:00", 0.0
    ]  # fmt: skip


def real(name: str) -> Path:
    path = REAL / name
    return path if path.exists() else pytest.skip(f"no {path}")


def test_math_500() -> None:
    """Each problem's own solution is correct, and those of its neighbours are not. (All pairs: RESULTS.md.)"""
    path = real("math500/test.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["unique_id"] for row in rows if not verify(row["solution"], row["answer"])] == []
    others = [(rows[n - 1], rows[n]) for n in range(0, 500, 5)]
    assert [b["answer"] for a, b in others if a["answer"] != b["answer"] and verify(a["solution"], b["answer"])] == []


@pytest.mark.long
def test_math_500_with_the_solutions_of_other_problems() -> None:
    """Each answer against 40 solutions of others, in the pool; prints what RESULTS.md has. Use -s."""
    rows = [json.loads(line) for line in real("math500/test.jsonl").read_text().splitlines()]
    draw = random.Random(0)
    pairs = [(other, n) for n in range(500) for other in draw.sample([other for other in range(500) if other != n], 40)]
    prompts = [Prompt(messages=(), answer=row["answer"], metadata={"reward": "correct"}) for row in rows]
    pool = RewardPool("math", workers=2, timeout_seconds=10.0)
    try:
        scores = pool.finish(pool.start([(rows[other]["solution"], prompts[n]) for other, n in pairs]))
    finally:
        pool.close()
    failed = [(pair, score) for pair, score in zip(pairs, scores, strict=True) if isinstance(score, str)]
    correct = [pair for pair, score in zip(pairs, scores, strict=True) if not isinstance(score, str) and score.correct]
    parsed = [math_answer._parsed(row["answer"]) for row in rows]
    assert all(math_answer.verify_by_math_verify(each, each, timeout_seconds=None) for each in parsed)
    named = {(rows[other]["answer"], rows[n]["answer"]) for other, n in correct}
    different = [each for each in sorted(named) if each[0] != each[1]]
    print(f"{len(pairs)} pairs, {len(correct)} correct, {len(failed)} failed: {failed[:10]}; not literally the same:")
    print(*different, sep="\n")
    assert len(correct) <= 0.01 * len(pairs)
    assert len(failed) <= 0.001 * len(pairs)


def test_svamp_and_gsm8k_by_options_alone() -> None:
    svamp = task(real("svamp/test.jsonl"), question="{Body} {Question}", answer="Answer", num_train=800, num_eval=200)
    questions = [{prompt.messages[-1]["content"] for prompt in load(svamp, split)} for split in ("train", "eval")]
    row = json.loads(Path(str(svamp.data)).read_text().splitlines()[0])
    assert len(questions[0]) + len(questions[1]) == 1000
    assert f"{row['Body']} {row['Question']}" in questions[0] | questions[1]
    gsm8k = load(task(real("gsm8k"), answer_pattern="####", num_train=7473, num_eval=1319), "eval")
    lines = (REAL / "gsm8k/test.jsonl").read_text().splitlines()
    truths = {row["question"]: row["answer"] for row in map(json.loads, lines)}
    assert len(gsm8k) == 1319
    assert all(verify(truths[prompt.messages[-1]["content"]], prompt.answer) for prompt in gsm8k)
