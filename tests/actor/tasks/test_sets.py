"""Evaluation sets: which task reads and grades them, from which columns; on the real files where they are."""

import json
from pathlib import Path

import pytest

from actor.tasks import task_module
from actor.tasks.sets import load_sets, task_of
from common.config import Config, EvaluationConfig, TaskConfig
from common.types import UserError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not in ../shared/data")


def config(*sets: str, most: int | None = None, **task) -> Config:
    return Config(task=TaskConfig(**task), evaluation=EvaluationConfig(sets=sets, num_problems=most))


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gsm8k_has_its_own_task_and_all_others_math():
    assert [task_of(each) for each in ("gsm8k:x", "math500:gsm8k", "aime24:a:b")] == ["gsm8k", "math", "math"]


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"Body": "A had 2.", "Question": "How many?", "Answer": 2.0, "Type": "x"}, "A had 2. How many?", "2"),
        ({"problem": "1 + 1?", "solution": "x", "answer": "2"}, "1 + 1?", "2"),
        ({"question": "1 + 1?", "answer": 2}, "1 + 1?", "2"),
        ({"question": "1 + 1?", "final_answer": "2", "answers": "x"}, "1 + 1?", "2"),
    ],
    ids=["svamp", "math", "question", "final_answer"],
)
def test_the_columns_follow_from_the_table(tmp_path, row, question, answer):
    path = write(tmp_path / "set.jsonl", row)
    [prompt] = load_sets(config(f"some-set:{path}"))["some-set"]
    assert (prompt.messages[-1]["content"], prompt.answer, prompt.task) == (question, answer, "math")


def test_columns_that_are_not_known_are_one_line(tmp_path):
    path = write(tmp_path / "set.jsonl", {"text": "1 + 1?", "answer": "2"})
    with pytest.raises(UserError, match=r"^evaluation.sets, mine: .*none of the columns .*problem.*rename .*text$"):
        load_sets(config(f"mine:{path}"))


def test_data_that_is_not_there_names_the_set(tmp_path):
    with pytest.raises(UserError, match=rf"^evaluation.sets, aime24: .*{tmp_path}"):
        load_sets(config(f"aime24:{tmp_path}/none.jsonl"))


def test_all_problems_of_a_file_or_a_draw(tmp_path):
    """A file is a whole set: nothing of it is put aside for training, whatever the run's task trains on."""
    path = write(tmp_path / "set.jsonl", *({"problem": f"{i}?", "answer": str(i)} for i in range(10)))
    chosen = {"num_train": 800, "num_eval": 500}
    prompts = load_sets(config(f"all:{path}", **chosen))["all"]
    assert sorted(prompt.answer for prompt in prompts) == sorted(map(str, range(10)))
    drawn = load_sets(config(f"all:{path}", most=4, **chosen))["all"]
    assert len({prompt.answer for prompt in drawn}) == 4
    assert drawn == load_sets(config(f"all:{path}", most=4, **chosen))["all"]
    assert len(load_sets(config(f"all:{path}", most=40, **chosen))["all"]) == 10


def test_the_runs_own_task_does_not_change_how_a_set_is_read(tmp_path):
    """Options that name the columns and the answer of the run's task are not the set's."""
    path = write(tmp_path / "set.jsonl", {"problem": "1 + 1?", "answer": "2 + 7"})
    own = {"name": "math", "data": "elsewhere", "question": "q", "answer": "a", "answer_pattern": "[+]"}
    [prompt] = load_sets(config(f"mine:{path}", **own, system="Be brief."))["mine"]
    assert (prompt.answer, prompt.messages[0]["content"]) == ("2 + 7", "Be brief.")


@real
@pytest.mark.slow
def test_the_real_sets():
    sets = load_sets(
        config(f"gsm8k:{DATA / 'gsm8k'}", f"math500:{DATA / 'math500'}", f"svamp:{DATA / 'svamp'}", most=3)
    )
    assert {name: (len(prompts), prompts[0].task) for name, prompts in sets.items()} == {
        "gsm8k": (3, "gsm8k"),
        "math500": (3, "math"),
        "svamp": (3, "math"),
    }
    for prompts in sets.values():
        for prompt in prompts:
            reward = task_module(prompt.task).reward
            assert reward(f"<SOLUTION>{prompt.answer}</SOLUTION>", prompt).correct
            assert not reward("<SOLUTION>-123456</SOLUTION>", prompt).correct
