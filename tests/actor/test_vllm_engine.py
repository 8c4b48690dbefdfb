"""vLLM on SmolLM2, in both dtypes, compared with transformers and PEFT in float32."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from engine_oracle import ALPHA, RANK, make_adapter, peft_score, score
from transformers import AutoModelForCausalLM, AutoTokenizer

from actor.engine import Sample
from actor.opening import Opening, sample_with_openers
from common.config import ActorConfig, ModelConfig
from launch.planning import model_folder

pytestmark = pytest.mark.slow

MEAN_NOISE_NATS = {"bfloat16": 0.07, "float32": 0.0005}  # from float32; the adapters below change the mean by 0.25
TEXT = "Question: Tom has 12 apples and buys 3 bags of 7 apples each. How many apples does he have?\nAnswer: 12 + 3 * 7"

_engine: Any = None  # set in the engine's process


def _start(dtype: str, folder: str) -> None:
    from actor.vllm_engine import VLLMEngine

    global _engine
    model = ModelConfig(dtype=dtype, lora_rank=RANK, lora_alpha=ALPHA)
    _engine = VLLMEngine(folder, model, ActorConfig(), seed=1)


def _call(method: str, args: tuple, options: dict) -> Any:
    return getattr(_engine, method)(*args, **options)


def _reported(prompts: list[list[int]], options: dict) -> list[tuple[int, list[Sample]]]:
    reported: list[tuple[int, list[Sample]]] = []
    _engine.sample(prompts, **options, finished=lambda index, samples: reported.append((index, samples)))
    return reported


class Remote:
    """The engine in its own process, as in an actor, since vLLM changes global state of torch."""

    def __init__(self, dtype: str, folder: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.dtype = dtype
        self.noise = MEAN_NOISE_NATS[dtype]
        self.pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_start, initargs=(dtype, folder))
        self.pid = self.pool.submit(os.getpid).result()

    def __getattr__(self, method: str) -> Any:
        return lambda *args, **options: self.pool.submit(_call, method, args, options).result()


@pytest.fixture(scope="module")
def folder() -> str:
    return str(model_folder.smollm2())


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def engine(request: pytest.FixtureRequest, folder: str) -> Iterator[Remote]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        remote = Remote(request.param, folder)
        yield remote
        remote.pool.shutdown()


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def distance(a: Any, b: Any) -> float:
    return float(np.abs(np.subtract(a, b)).mean())


def same(a: list[list[Sample]], b: list[list[Sample]]) -> bool:
    return all(
        np.array_equal(x.token_ids, y.token_ids) and np.array_equal(x.logprobs, y.logprobs) and x.text == y.text
        for x, y in zip(chain(*a), chain(*b), strict=True)
    )


def greedy(engine: Remote, prompt: list[int], **options: Any) -> Sample:
    arguments = {"num_samples": 1, "temperature": 0.0, "max_tokens": 16, "stop": (), "seeds": [0]} | options
    [[sample]] = engine.sample([prompt], **arguments)
    return sample


def test_equal_calls_give_equal_samples_with_tempered_logprobs(engine: Remote, reference: Any, tokenizer: Any) -> None:
    prompt = tokenizer(TEXT).input_ids
    options = {"num_samples": 3, "temperature": 0.6, "max_tokens": 24, "stop": (), "seeds": [5, 6]}
    groups = engine.sample([prompt, prompt], **options)
    reported = engine.pool.submit(_reported, [prompt, prompt], options).result()
    assert sorted(index for index, _ in reported) == [0, 1]
    assert same([group for _, group in sorted(reported, key=lambda pair: pair[0])], groups)
    assert same(groups, engine.sample([prompt, prompt], **options))
    samples = list(chain(*groups))
    assert len({sample.token_ids.tobytes() for sample in samples}) == 6  # neighbouring seeds do not overlap
    scored = [score(reference, np.append(prompt, sample.token_ids), 0.6, 1.0) for sample in samples]
    tempered, untempered = (
        np.concatenate([s[len(prompt) - 1 :] for s in column]) for column in zip(*scored, strict=True)
    )
    logprobs = np.concatenate([sample.logprobs for sample in samples])
    assert logprobs.dtype == samples[0].logprobs.dtype == np.float32
    assert samples[0].token_ids.dtype == np.int32
    assert distance(logprobs, tempered) < engine.noise < distance(logprobs, untempered)


def test_an_adapter_is_computed_as_peft_computes_it(engine: Remote, reference: Any, tokenizer: Any) -> None:
    token_ids = tokenizer(TEXT).input_ids
    base = engine.logprobs(token_ids)
    assert base.dtype == np.float32
    assert distance(base, *score(reference, token_ids, 1.0)) < engine.noise
    whole = make_adapter(reference, 1, scale=0.02, dtype=engine.dtype)
    # It has the same version number, as after resuming; the modules without a factor must be reset to the base.
    part = make_adapter(reference, 1, scale=0.06, dtype=engine.dtype, targets=("q_proj", "v_proj"))
    for adapter in (whole, part):
        assert engine.load(adapter) == adapter.checksum
        expected = peft_score(reference, adapter, token_ids)
        logprobs = engine.logprobs(token_ids)
        assert distance(logprobs, expected) < engine.noise
        assert distance(base, expected) > 3 * engine.noise


def test_version_zero_is_the_base_bit_for_bit(engine: Remote, reference: Any, tokenizer: Any) -> None:
    token_ids = tokenizer(TEXT).input_ids
    engine.load(make_adapter(reference, 0, scale=0.0, dtype=engine.dtype))
    base = engine.logprobs(token_ids)
    engine.load(make_adapter(reference, 1, scale=0.02, dtype=engine.dtype))
    assert not np.array_equal(engine.logprobs(token_ids), base)
    engine.load(make_adapter(reference, 0, scale=0.0, dtype=engine.dtype))
    assert np.array_equal(engine.logprobs(token_ids), base)


def test_old_versions_are_freed(engine: Remote, reference: Any) -> None:
    process = psutil.Process(engine.pid)
    adapters = [make_adapter(reference, version, scale=0.02, dtype=engine.dtype) for version in (3, 4)]
    for adapter in adapters:
        engine.load(adapter)
    before = process.memory_info().rss
    for _ in range(10):
        for adapter in adapters:
            assert engine.load(adapter) == adapter.checksum
    assert process.memory_info().rss < before + 30 * 2**20  # an adapter is 10 or 20 MB


def test_a_new_version_reads_no_prefix_of_the_old_one(engine: Remote, reference: Any) -> None:
    prompt = list(range(1000, 1300))  # more than two of vLLM's cache blocks, of 128 tokens on a CPU
    old, new = (make_adapter(reference, version, scale=0.02, dtype=engine.dtype) for version in (1, 2))
    engine.load(old)
    greedy(engine, prompt)
    engine.load(new)
    sample = greedy(engine, prompt)
    scored, stale = [], []
    for adapter, logprobs in ((new, scored), (old, stale)):
        engine.load(adapter)
        logprobs.extend(engine.logprobs([*prompt, *map(int, sample.token_ids)])[len(prompt) - 1 :])  # reads no cache
    assert distance(sample.logprobs, scored) < engine.noise < distance(sample.logprobs, stale) / 3


def test_more_prompts_than_vllm_batches_in_one_step(engine: Remote) -> None:
    """60 prompts of 90 tokens: vLLM takes 4,096 tokens per step on a CPU, and must not split the 46th prompt."""
    if engine.dtype != "float32":
        pytest.skip("one engine is enough")
    prompts = [[first + i for i in range(90)] for first in range(1000, 1060)]
    options = {"num_samples": 1, "temperature": 1.0, "max_tokens": 2, "stop": (), "seeds": list(range(60))}
    samples = engine.sample(prompts, **options)
    assert [len(group) for group in samples] == [1] * 60


def test_a_completion_ends_at_a_stop_string_or_its_length(engine: Remote, tokenizer: Any) -> None:
    prompt = tokenizer(TEXT).input_ids
    whole = greedy(engine, prompt)
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == 16
    stop = whole.text[5:9]
    stopped = greedy(engine, prompt, stop=(stop,))
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[:9]
    assert tokenizer.decode(stopped.token_ids).startswith(stopped.text)
    assert len(greedy(engine, prompt, stop=(stop,), fixed_length=True).token_ids) == 16


def test_the_end_token_ends_a_completion_and_is_part_of_it(engine: Remote, reference: Any, tokenizer: Any) -> None:
    engine.load(make_adapter(reference, 0, scale=0.0, dtype=engine.dtype))
    messages = [{"role": "user", "content": "Say only the word yes."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    sample = greedy(engine, prompt, max_tokens=128)
    assert sample.finish_reason == "stop"
    assert sample.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token not in sample.text
    longer = greedy(engine, prompt, max_tokens=len(sample.token_ids) + 3, fixed_length=True)
    assert len(longer.token_ids) == len(sample.token_ids) + 3


def test_an_adapter_that_does_not_fit_is_rejected(engine: Remote, reference: Any) -> None:
    adapter = make_adapter(reference, 5, scale=0.02, dtype=engine.dtype)
    shapes = {name.replace("layers.0.", "layers.99."): shape for name, shape in adapter.shapes.items()}
    with pytest.raises(ValueError, match=r"model\.layers\.99\.self_attn\.q_proj\S* belongs to no linear module"):
        engine.load(replace(adapter, shapes=shapes))
    for change in ({"alpha": 8.0}, {"variant": "rslora"}, {"rank": 4}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match=r"the adapter has \(rank, scale, dtype\)"):
            engine.load(replace(adapter, **change))


def test_first_tokens_are_the_most_likely(engine: Remote, reference: Any, tokenizer: Any) -> None:
    prompts = [tokenizer(text).input_ids for text in (TEXT, "The capital of France is")]
    without = [tokenizer.eos_token_id, tokenizer(" the").input_ids[0], tokenizer("\n").input_ids[0]]
    found = engine.first_tokens(prompts, count=20, temperature=0.7, without=without)
    for prompt, (ids, logprobs) in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = (reference(torch.tensor([prompt])).logits[0, -1].float() / 0.7).log_softmax(0)
        assert len(set(ids.tolist())) == len(ids) == 20
        assert not set(ids.tolist()) & set(without)
        assert (np.diff(logprobs) <= 0).all()
        assert distance(logprobs, expected[torch.tensor(ids).long()]) < 3 * engine.noise
        expected[without] = -torch.inf
        assert expected.topk(10).values[-1] - expected[torch.tensor(ids[:10]).long()].min() < 12 * engine.noise


@pytest.mark.parametrize("after", ["", "Let me see:"])
def test_openers_begin_equal_shares_of_a_group(engine: Remote, reference: Any, tokenizer: Any, after: str) -> None:
    prompts = [tokenizer(text).input_ids for text in (TEXT, "The capital of France is", "The capital of France is")]
    opening = Opening(num_candidates=20, num_distinct=3, learned=True, after=after)
    forced = tokenizer(after, add_special_tokens=False).input_ids
    options = {"num_samples": 6, "temperature": 0.7, "max_tokens": 12, "stop": ("\n",), "seeds": [5, 6, 7]}
    groups = sample_with_openers(engine, tokenizer, prompts, opening, **options)
    assert same(groups, sample_with_openers(engine, tokenizer, prompts, opening, **options))
    openers = [[int(sample.token_ids[len(forced)]) for sample in group] for group in groups]
    assert [[group.count(opener) for opener in group] for group in openers] == [[2] * 6] * 3
    assert openers[1] != openers[2], "the seed picks them"
    assert len({sample.token_ids.tobytes() for sample in groups[0]}) > 3, "samples of one opener differ"
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            assert len(sample.token_ids) <= 12
            assert sample.text.endswith("\n") or "\n" not in sample.text
            assert tokenizer.decode(sample.token_ids, skip_special_tokens=True).startswith(sample.text)
            assert sample.token_ids[: len(forced)].tolist() == forced
            assert sample.text.startswith(after)
            assert not sample.logprobs[: len(forced)].any()
            [scored] = score(reference, np.append(prompt, sample.token_ids), 0.7)
            own = scored[len(prompt) + len(forced) - 1 :]
            assert distance(sample.logprobs[len(forced) :], own) < 6 * engine.noise, "including the opener"


def test_the_engine_is_one_process_and_frees_its_memory(engine: Remote) -> None:
    owner = psutil.Process(engine.pid)
    assert owner.children(recursive=True) == []  # so no process remains, however the owner dies
    held = owner.memory_info().rss
    engine.close()
    assert owner.memory_info().rss < held - 2**30  # the KV cache alone has one GiB
