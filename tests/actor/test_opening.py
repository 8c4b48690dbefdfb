"""REFT's completions, with the real tokenizer and an engine that records its calls: forced, opener, sampled."""

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from actor.engine import Sample
from actor.opening import Opening, forced_tokens
from actor.rollout import Sampling, prompt_tokens, roll_out
from common.command_line import load
from common.types import Prompt, Score
from launch.planning import model_folder

TAG = "<start_working_out>\n"
PIECES = ["<", "start", "_", "working", "_", "out", ">", "\n"]  # the tag's tokens, as SmolLM2 cuts it
OPENERS = ["First", "We", "Let"]
REST = [" two", " plus", " two", " is", " four", "</", "S", "OL", "UTION", ">"]
PROMPTS = [Prompt(messages=({"role": "user", "content": f"{n}?"},), answer="4", index=n) for n in range(2)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_folder.resolve("smollm2-135m-instruct"))


class Engine:
    """The openers OPENERS behind any prompt, with log-probabilities -1, -2, -3; then REST, with -0.5 each."""

    def __init__(self, tokenizer, rest=REST):
        self.openers, self.rest = ([only(tokenizer, piece) for piece in pieces] for pieces in (OPENERS, rest))
        self.asked = []
        self.begun = []

    def first_tokens(self, prompts, *, count, temperature, without):
        self.asked += prompts
        return [(np.array(self.openers, np.int32), np.array([-1.0, -2.0, -3.0], np.float32)) for _ in prompts]

    def sample(self, prompts, *, num_samples, max_tokens, **_):
        self.begun += prompts
        self.max_tokens = max_tokens
        ids = np.array(self.rest[:max_tokens], np.int32)
        sample = Sample(
            token_ids=ids,
            logprobs=np.full(len(ids), -0.5, np.float32),
            text="is not used",
            finish_reason="length" if len(ids) == max_tokens else "stop",
        )
        return [[sample] * num_samples for _ in prompts]


class Rewards:
    """Keeps the texts that it is to score."""

    def __init__(self):
        self.texts = []

    def start(self, completions):
        self.texts.append([text for text, _ in completions])
        return len(completions)

    def finish(self, number):
        return [Score(total=0.0, correct=False, parts={})] * number


def only(tokenizer, piece):
    [token_id] = tokenizer(piece, add_special_tokens=False).input_ids
    return token_id


def rolled(tokenizer, engine, *, after=TAG, learned=True, max_tokens=32, stop=("</SOLUTION>",)):
    opening = Opening(num_candidates=3, num_distinct=3, learned=learned, after=after)
    sampling = Sampling(group_size=6, temperature=1.0, max_tokens=max_tokens, stop=stop, seed=0, opening=opening)
    rewards = Rewards()
    groups = roll_out(engine, tokenizer, rewards, PROMPTS, sampling, version=1)
    assert rewards.texts == [[rollout.text for rollout in group.rollouts] for group in groups]
    return groups


def pieces(tokenizer, ids):
    return [tokenizer.decode([int(token_id)]) for token_id in ids]


def test_the_opener_is_picked_behind_the_forced_text(tokenizer):
    engine = Engine(tokenizer)
    rolled(tokenizer, engine)
    before = [prompt_tokens(tokenizer, prompt) for prompt in PROMPTS]
    tag = [only(tokenizer, piece) for piece in PIECES]
    assert engine.asked == [ids + tag for ids in before]
    assert [ids[:-1] for ids in engine.begun] == [ids + tag for ids in before for _ in OPENERS]
    assert [{ids[-1] for ids in engine.begun[start : start + 3]} for start in (0, 3)] == [set(engine.openers)] * 2


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("after", "forced"), [(TAG, PIECES), ("", [])])
def test_tokens_mask_text_and_logprobs_line_up(tokenizer, after, forced, learned):
    engine = Engine(tokenizer)
    for prompt, group in zip(PROMPTS, rolled(tokenizer, engine, after=after, learned=learned), strict=True):
        openers = []
        for rollout in group.rollouts:
            number = len(prompt_tokens(tokenizer, prompt))
            assert rollout.num_prompt_tokens == number
            assert rollout.token_ids[:number].tolist() == prompt_tokens(tokenizer, prompt)
            cut = pieces(tokenizer, rollout.token_ids[number:])
            opener = cut[len(forced)]
            assert cut == [*forced, opener, *REST]
            assert rollout.text == f"{after}{opener} two plus two is four</SOLUTION>"
            assert rollout.num_forced_tokens == len(forced)
            assert rollout.num_completion_tokens == len(forced) + 1 + len(REST)
            masked = number + len(forced) + (not learned)
            assert rollout.mask.tolist() == [False] * masked + [True] * (len(cut) + number - masked)
            own = [-1.0 - OPENERS.index(opener)] if learned else [0.0]
            assert rollout.actor_logprobs.tolist() == [0.0] * (number + len(forced)) + own + [-0.5] * len(REST)
            assert (rollout.actor_logprobs.dtype, rollout.token_ids.dtype) == (np.float32, np.int32)
            openers.append(opener)
        assert [openers.count(opener) for opener in OPENERS] == [2, 2, 2]


def test_no_special_token_is_put_before_the_forced_text():
    """As Llama's tokenizer puts one before any text."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder.resolve("smollm2-135m-instruct"))
    begin = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    assert tokenizer(TAG).input_ids[0] == begin[1]
    assert pieces(tokenizer, forced_tokens(tokenizer, TAG)) == PIECES


def test_forced_text_and_opener_count_for_the_longest_completion(tokenizer):
    engine = Engine(tokenizer)
    groups = rolled(tokenizer, engine, max_tokens=12)
    assert engine.max_tokens == 12 - 8 - 1
    for rollout in groups[0].rollouts:
        assert (rollout.num_completion_tokens, rollout.finish_reason) == (12, "length")
        assert rollout.text.endswith(" two plus two")


def test_a_stop_string_that_begins_in_the_forced_text_ends_the_text(tokenizer):
    """The engine cannot see it, and samples on."""
    [first, _] = rolled(tokenizer, Engine(tokenizer, rest=REST[:4]), max_tokens=13, stop=(">\nWe two",))
    found = {rollout.text: rollout.finish_reason for rollout in first.rollouts}
    assert found == {
        f"{TAG}First two plus two is": "length",
        f"{TAG}We two": "stop",
        f"{TAG}Let two plus two is": "length",
    }


def test_a_runs_sampling_has_the_methods_text(tmp_path):
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    options = ["--method.name", "reft", "--method.opening_after", TAG, "--method.opening_learned", "false"]
    opening = Sampling.of(load(options, empty)).opening
    assert opening == Opening(num_candidates=20, num_distinct=4, learned=False, after=TAG)
    assert Sampling.of(load(options[:2], empty)).opening.after == ""
