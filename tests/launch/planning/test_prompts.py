"""The order of prompts, and their lengths: as counted one by one, of all that a run can draw, and only once."""

import hashlib
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from transformers import AutoTokenizer

from actor.rollout import prompt_tokens
from actor.tasks import task_module
from common.command_line import load
from common.types import Prompt, UserError
from launch.planning import model_folder, plan, prompt_lengths, prompts
from launch.planning.prompts import PromptStream
from launch.runtime import cluster

NUM_ROWS = 400
PROMPTS = [Prompt(messages=({"role": "user", "content": str(i)},), answer=str(i)) for i in range(7)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_folder.resolve("smollm2-135m-instruct"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def counted(monkeypatch):
    """The numbers of prompts that were tokenised."""
    found = []
    real = prompt_lengths.num_tokens

    def counts(tokenizer, prompts):
        found.append(len(prompts))
        return real(tokenizer, prompts)

    monkeypatch.setattr(prompt_lengths, "num_tokens", counts)
    return found


@pytest.fixture
def data(tmp_path):
    """Row i has about i // 4 tokens in its question."""
    for name, num in (("train", NUM_ROWS), ("test", 40)):
        rows = [{"question": f"What is {i}?" + " and" * (i // 4), "answer": f"#### {i}"} for i in range(num)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def configured(data, *options):
    few = ["--task.num_train", str(NUM_ROWS), "--task.num_eval", "40", "--evaluation.num_problems", "40"]
    return load(["--task.name", "gsm8k", "--task.data", str(data), *few, *options], cluster.DEFAULT_CONFIG)


def checked(config, tokenizer):
    return prompts.check(*prompts.load(config), config, tokenizer)


def test_the_text_before_an_opener_leaves_a_token_to_sample(tokenizer):
    """The tag has 8 tokens, by hand in tests/actor/test_opening.py; an opener is the ninth."""

    def opened(max_tokens):
        options = ["--method.name", "reft", "--method.opening_after", "<start_working_out>\n"]
        return load([*options, "--actor.max_tokens", str(max_tokens)], cluster.DEFAULT_CONFIG)

    prompts.check_opening(opened(10), tokenizer)
    with pytest.raises(UserError, match=r"has 8 tokens, .* nothing of actor\.max_tokens=9 to sample"):
        prompts.check_opening(opened(9), tokenizer)


def test_special_tokens_before_an_opener_would_not_reach_the_reward(tokenizer):
    config = load(["--method.name", "reft", "--method.opening_after", "<|im_start|>Well,"], cluster.DEFAULT_CONFIG)
    with pytest.raises(UserError, match="reaches the reward as 'Well,' with this model's tokenizer"):
        prompts.check_opening(config, tokenizer)


def test_the_stream_has_the_order_of_earlier_versions():
    """They made the permutation of a pass again for each of its prompts."""
    for seed in (0, 123):
        for index, prompt in enumerate(PromptStream(PROMPTS, seed=seed).draw(40)):
            number, position = divmod(index, len(PROMPTS))
            order = np.random.default_rng([seed, number]).permutation(len(PROMPTS))
            assert prompt == replace(PROMPTS[order[position]], index=index)


@pytest.mark.parametrize("left_out", [frozenset(), frozenset({0, 3, 4})])
def test_a_stream_goes_on_at_any_cursor(left_out):
    whole = PromptStream(PROMPTS, seed=3, left_out=left_out).draw(30)
    assert {prompt.answer for prompt in whole} == {str(i) for i in range(7) if i not in left_out}
    assert all(before.index < after.index for before, after in pairwise(whole))
    for drawn in range(20):
        stream = PromptStream(PROMPTS, seed=3, left_out=left_out)
        stream.draw(drawn)
        assert PromptStream(PROMPTS, seed=3, cursor=stream.cursor, left_out=left_out).draw(10) == whole[drawn:][:10]


def test_a_pass_is_shuffled_once(monkeypatch):
    shuffled = []
    real = prompts.order_of_pass
    monkeypatch.setattr(prompts, "order_of_pass", lambda *of: shuffled.append(of[-1]) or real(*of))
    stream = PromptStream(PROMPTS, seed=3, cursor=7000)
    for _ in range(10):
        stream.draw(2)
    assert shuffled == [1000, 1001, 1002]


def test_lengths_are_those_of_single_prompts(data, tokenizer):
    train, _ = prompts.load(configured(data))
    lengths = prompt_lengths.Lengths(train, configured(data).task, tokenizer)
    positions = np.array([5, 399, 0, 77])
    assert lengths.of(positions).tolist() == [len(prompt_tokens(tokenizer, train[i])) for i in positions]
    assert prompt_lengths.Lengths(list(train), configured(data).task, tokenizer).of(positions).tolist() == (
        lengths.of(positions).tolist()
    )


def test_long_prompts_are_left_out_and_counted(data, tokenizer):
    whole = checked(configured(data), tokenizer)
    assert (whole.left_out, whole.remarks(), whole.num_checked) == (frozenset(), [], NUM_ROWS)
    lengths = [len(prompt_tokens(tokenizer, prompt)) for prompt in whole.train]
    assert whole.longest_tokens == max(lengths)
    limit = sorted(lengths)[NUM_ROWS // 2]
    found = checked(configured(data, "--task.max_prompt_tokens", str(limit)), tokenizer)
    assert found.longest_tokens == limit
    assert found.left_out == {i for i, length in enumerate(lengths) if length > limit}
    assert found.num_evaluation_left_out == 0
    remark = f"task.max_prompt_tokens leaves out {len(found.left_out)} of 400 training prompts and 0 of 40 evaluation"
    assert found.remarks() == [f"{remark} prompts"]
    few = checked(configured(data, "--task.max_prompt_tokens", str(min(lengths) + 3)), tokenizer)
    evaluated = few.evaluation["task"]
    assert {len(prompt_tokens(tokenizer, prompt)) <= min(lengths) + 3 for prompt in evaluated} == {True}
    assert few.num_evaluation_left_out == 40 - len(evaluated) > 0
    with pytest.raises(UserError, match=r"task.max_prompt_tokens=1 leaves out all 400 training prompts; raise it"):
        checked(configured(data, "--task.max_prompt_tokens", "1"), tokenizer)


def test_lengths_are_kept_for_the_next_plan(data, tokenizer, counted):
    first = checked(configured(data, "--task.num_train", "300"), tokenizer)
    assert sum(counted) == 340
    counted.clear()
    assert checked(configured(data, "--task.num_train", "300"), tokenizer).longest_tokens == first.longest_tokens
    assert counted == [prompt_lengths.NUM_COMPARED] * 2  # of train and eval
    counted.clear()
    checked(configured(data, "--task.seed", "7", "--task.max_prompt_tokens", "300"), tokenizer)  # all 400
    assert counted == [32, 100, 32], "a larger draw counts what is new"
    counted.clear()
    checked(configured(data, "--task.example", "false"), tokenizer)
    assert sum(counted) == 440, "other prompts"


def test_kept_lengths_of_other_prompts_are_not_used(data, tokenizer, counted, monkeypatch, cache):
    """A change of the task's code, or of the tokenizer's files, has no trace in the names of the files."""
    first = checked(configured(data), tokenizer)
    counted.clear()
    monkeypatch.setattr("actor.tasks.composite_reward.SYSTEM", "Be brief.")
    assert checked(configured(data), tokenizer).longest_tokens < first.longest_tokens
    assert counted == [32, 400, 32, 40]
    for file in (cache / "prompt_lengths").iterdir():
        file.write_bytes(b"\x93NUMPY damaged")
    counted.clear()
    checked(configured(data), tokenizer)
    assert counted == [400, 40]


def test_a_cache_that_cannot_be_written_is_no_error(data, tokenizer, cache):
    (cache / "prompt_lengths").touch()
    assert checked(configured(data), tokenizer).num_checked == NUM_ROWS


def test_of_many_rows_those_that_a_run_draws_are_checked(data, tokenizer, counted, monkeypatch):
    """With refills, and with further ones in the place of those that are too long; the others are not even read."""
    monkeypatch.setattr(prompts, "ALWAYS_CHECKED", 16)
    monkeypatch.setattr(prompts, "BATCH_PROMPTS", 10)
    options = ["--run.steps", "6", "--run.prompts_per_step", "5", "--task.max_prompt_tokens", "250"]
    refills = ["--method.name", "dapo", "--method.refill_rounds", "1"]
    for more, num in (([], 30), (refills, 60)):
        config = configured(data, *options, *more)
        found = checked(config, tokenizer)
        assert found.left_out
        assert num <= found.num_checked - len(found.left_out) < num + 10
        assert f"(of the {found.num_checked} that the run may draw)" in found.describe()
        stream = PromptStream(found.train, seed=config.run.seed, left_out=found.left_out)
        lengths = [len(prompt_tokens(tokenizer, prompt)) for prompt in stream.draw(num)]
        assert max(lengths) <= found.longest_tokens <= 250
    order = prompts.order_of_pass(NUM_ROWS, config.run.seed, 0)
    rows = found.train.rows
    lines = (data / "train.jsonl").read_text().splitlines()
    for position, words in ((num - 1, r"train.jsonl row \d+ has no answer"), (NUM_ROWS - 1, None)):
        changed = [*lines]
        changed[rows[order[position]]] = '{"question": "broken"}'
        (data / "train.jsonl").write_text("\n".join(changed))
        if words is None:
            checked(config, tokenizer)
        else:
            with pytest.raises(UserError, match=words):
                checked(config, tokenizer)


def test_the_plan_says_what_is_left_out(data, tmp_path):
    config = configured(data, "--task.max_prompt_tokens", "250", "--run.dir", str(tmp_path / "run"))
    made = plan.make(config)
    assert made.prompts.left_out
    assert "# 400 training and 40 evaluation prompts, longest 250 tokens;" in made.describe()
    assert f"# warning: task.max_prompt_tokens leaves out {len(made.prompts.left_out)} of 400" in made.describe()
    stream = made.stream(cursor=100)
    assert (stream.cursor, stream.seed, stream.left_out) == (100, config.run.seed, made.prompts.left_out)
    config = configured(data, "--actor.max_tokens", "500", "--run.dir", str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"or leave out long prompts with task.max_prompt_tokens$"):
        plan.make(config)


def test_gym_has_the_problems_of_earlier_versions():
    """A change here changes the draw of runs that were begun before."""
    task = load([], cluster.DEFAULT_CONFIG).task.model_copy(update={"num_train": 40, "num_eval": 40})
    digests = []
    for split in ("train", "eval"):
        loaded = task_module("gym").load(task, split)
        text = json.dumps([[list(map(dict, prompt.messages)), prompt.answer, prompt.index] for prompt in loaded])
        digests.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    assert digests == ["3121380f1bedc9cc", "7ce9485e385e25ec"]
