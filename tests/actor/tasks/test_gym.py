"""Generated problems: train, eval and the worked example are disjoint; rewards scored by hand."""

import json
import subprocess
import sys
from typing import Any

import pytest

from actor.tasks.composite_reward import SOLUTION, completion_of, inside, score
from actor.tasks.gym import load, reward
from common.config import TaskConfig
from common.types import Prompt, Score, UserError

FIVE_STEPS = "1 + 1 = 2\n2 + 1 = 3\n3 + 1 = 4\n4 + 1 = 5\n5 + 1 = 6"
SMALL = {"min_terms": 2, "max_terms": 2, "max_digits": 1}  # 200 problems in all


def task(**changes: Any) -> TaskConfig:
    return TaskConfig(**{"num_train": 100, "num_eval": 50, **changes})


def questions(prompts: list[Prompt]) -> list[str]:
    return [p.messages[-1]["content"] for p in prompts]


@pytest.mark.parametrize("options", [{}, SMALL])
def test_train_and_eval_share_nothing_for_any_seed_and_number(options: dict[str, Any]) -> None:
    train, evaluation = set(), set()
    for seed in (122, 123, 124):  # neighbours: reasoning-gym's problem i depends on seed + i
        config = task(gym_options=options, seed=seed, num_train=400, example=True)
        shown = load(config, "train")[0].messages[1]["content"]
        train.update(questions(load(config, "train")))
        once = questions(load(config, "eval"))
        assert len(set(once)) == len(once) == 50
        assert shown not in once
        assert shown not in questions(load(config, "train"))
        evaluation.update(once)
    assert not train & evaluation
    if not options:
        assert len(evaluation) > 140  # three seeds, three sets of problems


def test_the_same_section_gives_the_same_problems_in_any_process() -> None:
    config = task(num_train=3, example=True)
    train = load(config, "train")
    assert load(config, "train") == train
    assert load(task(num_train=9, example=True), "train")[:3] == train
    assert load(task(num_train=9, example=True), "eval") == load(config, "eval")
    assert [p.index for p in train] == [0, 1, 2]
    code = (
        "from actor.tasks.gym import load; from common.config import TaskConfig; "
        "print(*(p.messages[-1]['content'] for p in load(TaskConfig(num_train=3, example=True), 'train')), sep='|')"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert elsewhere.strip() == "|".join(questions(train))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ["chain_sum", "decimal_chain_sum"])
def test_the_example_of_a_sum_earns_everything_and_is_short(name: str, seed: int) -> None:
    options = SMALL if name == "chain_sum" else {}
    prompt = load(task(gym=name, gym_options=options, seed=seed, num_train=1, example=True), "train")[0]
    _, asked, shown, _ = prompt.messages
    answer = inside(shown["content"], *SOLUTION)
    assert answer is not None
    assert score(shown["content"], answer)["total"] == 7.5
    terms = asked["content"].partition(": ")[2].removesuffix("=").strip()
    assert eval(terms) == pytest.approx(float(answer))
    for line in shown["content"].splitlines()[1:-2]:  # every line of the working is true
        left, right = line.split(" = ")
        assert left.isalpha() or eval(left) == pytest.approx(float(right))
    assert len(shown["content"]) < 170


def test_the_example_is_the_shortest_that_earns_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(task: TaskConfig, purpose: str, size: int) -> list[dict[str, Any]]:
        sums = ("0 + 0", "100 + 200", "10 + 20") if purpose == "example" else ("1 + 1",) * size
        return [{"question": s, "answer": str(eval(s)), "metadata": {"expression": s}} for s in sums]

    monkeypatch.setattr("actor.tasks.gym._entries", entries)
    monkeypatch.setattr("actor.tasks.gym._split", lambda question: "train")
    prompt = load(task(num_train=1, example=True), "train")[0]
    assert prompt.messages[1]["content"] == "10 + 20"  # 0 + 0 repeats a line of its working


def test_rewards_of_numbers_by_hand() -> None:
    prompt = load(task(num_train=1), "train")[0]
    truth = int(prompt.answer)
    exact = reward(completion_of(FIVE_STEPS, prompt.answer), prompt)
    assert (exact.total, exact.correct) == (7.5, True)
    assert exact.parts == {"correct": 4.0, "format": 1.5, "present": 1.0, "steps": 1.0}
    incorrect = reward(completion_of(FIVE_STEPS, str(2 * truth + 1)), prompt)
    assert (incorrect.total, incorrect.correct) == (3.5, False)
    assert reward(f"It is {truth}", prompt).total == 4.1
    assert reward("", prompt).total == -0.5


def test_rewards_of_words_by_hand() -> None:
    prompt = load(task(gym="word_sorting", num_train=1), "train")[0]
    words = prompt.answer
    assert reward(completion_of(FIVE_STEPS, f"\n{words} "), prompt).total == 7.5
    assert reward(f"The words are\n{words}", prompt).total == 4.1
    assert reward(completion_of(FIVE_STEPS, " "), prompt).total == 3.0
    assert reward(completion_of(FIVE_STEPS, "banana"), prompt).total == 3.5
    assert reward("", prompt).total == -0.5


@pytest.mark.parametrize(("value", "correct"), [(1.0, 4.0), (0.5, 1.5), (0.49, 0.0), (0.01, 0.0)])
def test_the_data_sets_own_scorer(monkeypatch: pytest.MonkeyPatch, value: float, correct: float) -> None:
    class Scorer:
        def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
            assert (answer, len(entry["answer"]) > 0) == ("20", True)
            return value

    monkeypatch.setattr("actor.tasks.gym._scorer", lambda name, options: Scorer())

    def scored(answer: str) -> Score:
        meta = {"gym": "any", "options": {}, "entry": {"answer": answer}}
        return reward(f"{SOLUTION[0]}20{SOLUTION[1]}", Prompt(messages=(), answer=answer, metadata=meta))

    assert scored("words").parts["correct"] == correct
    assert scored("words").correct == (correct == 4.0)
    assert scored("10").parts["correct"] == (4.0 if value == 1.0 else 0.0)  # for a number, only its 1.0 counts


def test_a_scorer_that_tolerates_rounding_counts() -> None:
    prompt = load(task(gym="number_format", num_train=1), "train")[0]
    assert prompt.answer == "255258179.051"
    assert score("255258179.0511", prompt.answer)["correct"] == 1.5
    assert reward("255258179.0511", prompt).parts["correct"] == 4.0
    assert reward("255258179.5", prompt).parts["correct"] == 1.5


def test_an_answer_on_which_the_scorer_raises_is_unparseable() -> None:
    prompt = load(task(gym="prime_factorization", num_train=1), "train")[0]
    assert reward(f"{SOLUTION[0]}banana{SOLUTION[1]}", prompt).parts["correct"] == -0.5


def test_a_scorer_that_is_broken_fails_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer does not silently get -0.5: the reward pool counts and reports the exception."""

    class Broken:
        def score_answer(self, answer: str, entry: dict) -> float:
            raise AttributeError("no such thing")

    prompt = load(task(gym="prime_factorization", num_train=1), "train")[0]
    monkeypatch.setattr("actor.tasks.gym._scorer", lambda name, options: Broken())
    with pytest.raises(AttributeError):
        reward(f"{SOLUTION[0]}2 x 3{SOLUTION[1]}", prompt)


def test_metadata_is_plain_json_and_enough_for_the_scorer() -> None:
    for name in ("chain_sum", "word_sorting", "countdown", "graph_color"):
        for prompt in load(task(gym=name, num_train=5), "train"):
            copy = json.loads(json.dumps(prompt.metadata))
            assert copy == prompt.metadata
            again = Prompt(messages=prompt.messages, answer=prompt.answer, metadata=copy)
            if prompt.answer:
                assert reward(completion_of(FIVE_STEPS, prompt.answer), again).correct


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gym": "chain_sums"}, "unknown reasoning-gym data set task.gym=chain_sums; did you mean chain_sum?"),
        (
            {"gym_options": {"max_term": 3}},
            "unknown option task.gym_options.max_term of task.gym=chain_sum; did you mean max_",
        ),
        ({"gym_options": {"seed": 3}}, "unknown option task.gym_options.seed"),
        ({"gym_options": {"min_terms": 9}}, "max_terms must be >= min_terms; correct it"),
        ({"gym_options": {"max_terms": "many"}}, "does not suit task.gym=chain_sum"),
        ({"gym_options": SMALL, "num_eval": 150}, "task.num_eval=150 exceeds the"),
        (
            {"gym": "rubiks_cube", "example": True},
            "task.gym=rubiks_cube has no answers to show; set task.example=false",
        ),
        ({"gym": "rearc"}, "task.gym=rearc has problems that JSON cannot represent"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        load(task(**changes), "eval")
    assert words in str(error.value)


def test_numbers_that_json_lacks_become_text():
    """Some problems of gsm_symbolic contain fractions."""
    prompts = load(TaskConfig(gym="gsm_symbolic", num_train=64, example=False), "train")
    assert json.dumps([dict(prompt.metadata) for prompt in prompts])
    assert all(reward(completion_of("1 = 1", prompt.answer), prompt).correct for prompt in prompts)
