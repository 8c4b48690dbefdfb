"""GSM8K: valid and invalid data, and the reward."""

import json
import random
from pathlib import Path
from typing import Any, Literal

import pytest

from actor.tasks import gsm8k, task_module
from actor.tasks.composite_reward import EXAMPLE, SOLUTION, TAGS, completion_of
from actor.tasks.gsm8k import load, reward, score
from common.config import TaskConfig
from common.types import UserError

REAL = Path(__file__).parents[4] / "shared/data/gsm8k"
S, S_ = SOLUTION


def write(folder: Path, train: list[str], test: list[str]) -> str:
    (folder / "train.jsonl").write_text("\n".join(train) + "\n")
    (folder / "test.jsonl").write_text("\n".join(test) + "\n")
    return str(folder)


def row(n: int) -> str:
    return json.dumps({"question": f"What is {n}?", "answer": f"It is {n}.\n#### {n:,}"})


def task(data: str | None, num_train: int = 5, num_eval: int = 3, **changes: Any) -> TaskConfig:
    return TaskConfig(name="gsm8k", data=data, num_train=num_train, num_eval=num_eval, **changes)


def test_a_draw_is_repeatable_without_replacement_and_extends(tmp_path: Path) -> None:
    data = write(tmp_path, [row(n) for n in range(3000, 3400)], [row(n) for n in range(10)])
    train, evaluation = load(task(data, num_train=40), "train"), load(task(data), "eval")
    every = load(task(data, num_train=400), "train")
    assert list(load(task(data, num_train=40), "train")) == list(train) == list(every[:40])
    assert list(load(task(data, num_train=400), "eval")) == list(evaluation)
    assert sorted(p.answer for p in every) == [f"{n:,}" for n in range(3000, 3400)]
    assert list(load(task(data, num_train=40, seed=7), "train")) != list(train)
    assert [p.index for p in train] == list(range(40))
    assert train[0].messages[-1]["content"] == f"What is {train[0].answer.replace(',', '')}?"


def test_the_prompt_names_the_tags_and_its_example_earns_everything(tmp_path: Path) -> None:
    data = write(tmp_path, [row(n) for n in range(9)], [row(n) for n in range(9)])
    plain, shown = load(task(data), "train")[0], load(task(data, example=True), "train")[0]
    assert [m["role"] for m in plain.messages] == ["system", "user"]
    assert [m["role"] for m in shown.messages] == ["system", "user", "assistant", "user"]
    assert all(tag in plain.messages[0]["content"] for tag in TAGS)
    assert score(shown.messages[2]["content"], EXAMPLE[2])["total"] == 7.5


def test_reward_is_the_score_and_correct_means_exact(tmp_path: Path) -> None:
    prompt = load(task(write(tmp_path, [row(42)] * 5, [])), "train")[0]
    exact, near = reward(f"{S}42{S_}", prompt), reward(f"{S}41{S_}", prompt)
    assert (exact.total, exact.correct, near.total, near.correct) == (5.6, True, 3.1, False)
    assert exact.parts == {"correct": 4.0, "format": 0.5, "present": 1.0, "steps": 0.1}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "train.jsonl:2 is not JSON"),
        ("[" * 100_000, "train.jsonl:2 is not JSON"),
        ("[1, 2]", "train.jsonl:2 is a list"),
        ('{"answer": "#### 1"}', "train.jsonl row 2 has no question"),
        ('{"question": "q"}', "train.jsonl row 2 has no answer"),
        ('{"question": "q", "answer": 7}', "train.jsonl row 2 has no answer"),
        ('{"question": "q", "answer": "it is 7"}', "train.jsonl row 2: the answer has no number after '####'"),
        ('{"question": "7", "answer": "7 #### seven"}', "train.jsonl row 2: the answer has no number after '####'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        list(load(task(write(tmp_path, [row(1), line, row(3)], []), num_train=3), "train"))
    assert words in str(error.value)


def test_bad_data_is_one_line(tmp_path: Path) -> None:
    data = write(tmp_path, [row(1)], [])

    def message(config: TaskConfig, split: Literal["train", "eval"]) -> str:
        with pytest.raises(UserError, match=r"^[^\n]*$") as error:
            load(config, split)
        return str(error.value)

    assert "task.num_train=5 exceeds the 1 rows of" in message(task(data), "train")
    assert "test.jsonl is empty" in message(task(data), "eval")
    (tmp_path / "test.jsonl").unlink()
    assert "has no test.jsonl, .parquet or .csv; set task.eval_split" in message(task(data), "eval")
    assert "task.data is not set" in message(task(None), "train")


def test_the_hubs_configuration_is_main(tmp_path: Path) -> None:
    """Also in a folder that was downloaded from there."""
    (tmp_path / "main").mkdir()
    write(tmp_path / "main", [row(1)], [row(2)])
    assert load(task(str(tmp_path), num_eval=1), "eval")[0].answer == "2"


@pytest.mark.parametrize("seed", [123, 7])
def test_the_draw_is_that_of_earlier_versions(tmp_path: Path, seed: int) -> None:
    """They shuffled the list of all rows, empty lines apart: runs that were begun with them resume."""
    train, test = [row(n) for n in range(300)], [row(n) for n in range(1000, 1060)]
    data = write(tmp_path, [*train[:5], "", *train[5:]], test)
    for split, lines, num in (("train", train, 250), ("eval", test, 60)):
        random.Random(seed).shuffle(lines)
        drawn = load(task(data, num_train=250, num_eval=60, seed=seed), split)
        assert [p.messages[-1]["content"] for p in drawn] == [json.loads(line)["question"] for line in lines[:num]]
        assert [p.index for p in drawn] == list(range(num))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no GSM8K in {REAL}")
def test_the_real_data() -> None:
    train = load(task(str(REAL), num_train=7473, example=True), "train")
    evaluation = load(task(str(REAL), num_eval=1319, example=True), "eval")
    questions = {p.messages[-1]["content"] for p in evaluation}
    assert len(train) == 7473
    assert len(questions) == 1319
    assert not questions & {p.messages[-1]["content"] for p in train}
    for line in (REAL / "test.jsonl").read_text().splitlines():
        working, _, answer = json.loads(line)["answer"].rpartition("\n#### ")
        assert score(completion_of(working, answer), answer)["correct"] == 4.0
        assert score(f"{working}\n#### {answer}", answer)["correct"] == 4.0  # read without tags


def test_task_modules() -> None:
    assert task_module("gsm8k") is gsm8k
    assert task_module("actor.tasks.gsm8k") is gsm8k
    for name, words in (("gsm9k", "gsm9k"), ("", "task.name="), (".x", "task.name=.x"), ("json", "no function reward")):
        with pytest.raises(UserError, match=r"^[^\n]*$") as error:
            task_module(name)
        assert words in str(error.value)
