"""The memory plan: its parts against numbers by hand, its choices for the paper's models, and what a refusal names.

`pytest -k table` checks the tables of launch/planning/README.md, and prints what belongs there where they are old.
"""

from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from common.command_line import load
from common.config import ActorConfig, Config, LearnerConfig, ModelConfig, RunConfig, value_of, with_values
from common.types import UserError
from launch.planning import memory, memory_fit, plan
from launch.planning.memory import GIB, Size, Work
from learner.learner import Learner
from learner.policy import activations
from learner.policy.activations import Activations, measure

LAUNCH = Path(__file__).resolve().parents[3] / "launch"
PAPER, NOTES = LAUNCH / "configs" / "paper_qwen2.5_3b.toml", LAUNCH / "planning" / "README.md"
QWEN = {  # Qwen2.5: hidden, layers, intermediate, heads, key-value heads, vocabulary, tied
    "0.5B": (896, 24, 4864, 14, 2, 151936, True),
    "1.5B": (1536, 28, 8960, 12, 2, 151936, True),
    "3B": (2048, 36, 11008, 16, 2, 151936, True),
    "7B": (3584, 28, 18944, 28, 4, 152064, False),
    "14B": (5120, 48, 13824, 40, 8, 152064, False),
    "32B": (5120, 64, 27648, 40, 8, 152064, False),
}
LONGEST_PROMPT = 249  # of the paper's 1,300 GSM8K problems, in tokens of SmolLM2


def meta_model(name: str) -> PreTrainedModel:
    """A published shape without data."""
    hidden, layers, intermediate, heads, kv_heads, vocab, tied = QWEN[name]
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@cache
def qwen(name: str) -> Work:
    """The plan's work for a published shape, whose activations are measured once for all tests."""
    model = meta_model(name)

    @cache
    def measured(lengths: tuple[int, ...], recompute: str) -> Activations:
        return measure(model.config, ModelConfig(dtype="bfloat16"), lengths=[lengths], recompute=recompute, gpu=True)

    return Work(size=Size.of(model, ModelConfig()), longest_prompt_tokens=LONGEST_PROMPT, activations=measured)


def paper(*options: str) -> Config:
    return load(["--config", str(PAPER), *options], PAPER)


def planned(config: Config, work: Work, gib: float) -> memory.Memory:
    return memory.plan(config, work, round(gib * GIB))


@pytest.mark.parametrize(
    ("name", "parameters", "adapter", "kv_bytes"),
    [
        ("1.5B", 1_543_714_304, 18_464_768, 2 * 28 * 2 * 128 * 2),
        ("3B", 3_085_938_688, 29_933_568, 2 * 36 * 2 * 128 * 2),
        ("7B", 7_615_616_512, 40_370_176, 2 * 28 * 4 * 128 * 2),
        ("14B", 14_770_033_664, 68_812_800, 2 * 48 * 8 * 128 * 2),
    ],
)
def test_parts_that_can_be_counted_by_hand(name, parameters, adapter, kv_bytes) -> None:
    config = with_values(paper(), {"learner.recompute": "layer", "learner.micro_batch_tokens": 4096})
    made = planned(config, qwen(name), 1000)
    assert made.of("learner", "frozen weights") == made.of("actor", "frozen weights") == 2 * parameters
    assert made.of("learner", "adapter, gradient, AdamW") == 4 * 4 * adapter
    blocks = 16 * 48 + 1  # 16 rollouts of 249 + 512 tokens, in blocks of 16; and one of nulls
    assert made.of("actor", "KV cache") == blocks * 16 * kv_bytes
    hidden, layers, intermediate, heads, kv_heads, _, _ = QWEN[name]
    rank, kv = 16, kv_heads * hidden // heads
    a, b = rank * (6 * hidden + intermediate), rank * (2 * hidden + 3 * (hidden + 2 * kv) + 2 * 2 * intermediate)
    resident = 2 * layers * (a + b)  # B of q, k and v three times as high as one alone, of gate and up twice
    assert 0.7 * made.of("actor", "adapter") < resident <= made.of("actor", "adapter")
    assert made.total() == made.total("learner") + made.total("actor")


def test_each_captured_size_has_two_graphs() -> None:
    config = with_values(paper(), {"learner.recompute": "layer", "learner.micro_batch_tokens": 4096})
    for changes, mib in (
        ({}, 256 + 2 * 5 * 32),  # sizes 1, 2, 4, 8 and the step's 16
        ({"actor.num_sequences": 256}, 256 + 2 * 9 * 32),
        ({"actor.eager": True}, 0),
    ):
        made = planned(with_values(config, changes), qwen("3B"), 40)
        assert made.of("actor", "CUDA graphs") == mib * 2**20


@pytest.mark.parametrize(("options", "gpu"), [(("--run.gpu_memory_gib", "80"), True), ((), False)])
def test_attention_is_counted_as_the_device_computes_it(monkeypatch, options, gpu) -> None:
    seen = []

    def measured(*_, gpu: bool, **others) -> Activations:
        seen.append(gpu)
        return Activations(kept=1, peak=1)

    monkeypatch.setattr(memory_fit, "measure", measured)
    memory_fit.resolve(paper(*options), meta_model("0.5B"), longest_prompt_tokens=LONGEST_PROMPT)
    assert set(seen) == {gpu}


def test_a_cache_holds_at_least_one_sequence_of_the_models_length() -> None:
    config = paper("--run.prompts_per_step", "1", "--actor.group_size", "2", "--actor.max_tokens", "4")
    config = with_values(config, {"model.max_length": 2000})
    assert memory.kv_cache_bytes(config, qwen("3B")) == (125 + 1) * 16 * 36_864


def test_further_actors_share_the_rollouts_of_a_step() -> None:
    assert memory.concurrent_rollouts(paper()) == 16
    assert memory.concurrent_rollouts(paper("--actor.num_actors", "3")) == 8


@pytest.mark.parametrize("gib", [40.0, 40e9 / GIB])
@pytest.mark.parametrize("name", ["1.5B", "3B"])
def test_the_papers_models_fit_a_gpu_of_40_gb(name, gib) -> None:
    config = memory_fit.on_gpu(paper(), qwen(name), round(gib * GIB))
    made = planned(config, qwen(name), gib)
    assert made.total() <= 0.95 * gib * GIB
    chosen = (config.learner.recompute, config.actor.num_sequences)  # 1.5B: none leaves room for fewer sequences
    assert chosen == (("none", 64) if (name, gib) == ("1.5B", 40.0) else ("layer", 256))


@pytest.mark.parametrize("gib", [40.0, 40e9 / GIB])
def test_seven_billion_parameters_fit_too_with_what_is_chosen(gib) -> None:
    config = memory_fit.on_gpu(paper(), qwen("7B"), round(gib * GIB))
    assert planned(config, qwen("7B"), gib).total() <= 0.95 * gib * GIB
    assert config.learner.recompute != "none"


def test_what_was_set_by_hand_is_named_before_what_makes_it_another_run() -> None:
    with pytest.raises(UserError, match=r"set learner.recompute=layer$"):
        memory_fit.on_gpu(paper("--learner.recompute", "none"), qwen("3B"), 40 * GIB)
    with pytest.raises(UserError, match=r"leave out actor.kv_cache_gib$"):
        memory_fit.on_gpu(paper("--actor.kv_cache_gib", "30"), qwen("3B"), 40 * GIB)
    with pytest.raises(UserError, match=r"leave out actor.gpu_memory_fraction$"):
        memory_fit.on_gpu(paper("--actor.gpu_memory_fraction", "0.1"), qwen("3B"), 40 * GIB)
    with pytest.raises(UserError, match=r"set run.prompts_per_step="):
        memory_fit.on_gpu(paper("--run.prompts_per_step", "1000"), qwen("3B"), 40 * GIB)
    with pytest.raises(UserError, match=r"use a GPU of \d+ GiB"):
        memory_fit.on_gpu(paper(), qwen("7B"), 24 * GIB)


def test_a_share_set_by_hand_is_filled_with_cache() -> None:
    config = memory_fit.on_gpu(paper("--actor.gpu_memory_fraction", "0.5"), qwen("3B"), 40 * GIB)
    made = planned(config, qwen("3B"), 40)
    assert made.total("actor") == 20 * GIB
    assert config.actor.kv_cache_gib * GIB == made.of("actor", "KV cache") > 10 * GIB


def test_without_evaluations_the_actor_holds_a_step() -> None:
    assert memory_fit.on_gpu(paper("--run.evaluate_every", "0"), qwen("3B"), 40 * GIB).actor.num_sequences == 16


def work_of(size: Size, per_token: int, prompt: int) -> Work:
    """Activations as a trunk of some layers has them."""

    def measured(lengths: tuple[int, ...], recompute: str) -> Activations:
        kept = {"none": 30, "layer": 1, "micro-batch": 0}[recompute] * per_token * sum(lengths)
        work = {"none": 2, "layer": 8, "micro-batch": 32}[recompute] * per_token * sum(lengths)
        return Activations(kept=kept, peak=kept + work)

    return Work(size=size, longest_prompt_tokens=prompt, activations=measured)


sizes = st.builds(
    Size,
    num_parameters=st.integers(10**8, 2 * 10**10),
    num_adapter_parameters=st.integers(10**6, 10**8),
    kv_elements=st.integers(10**3, 10**6),
    kv_heads=st.integers(1, 16),
    hidden=st.integers(256, 8192),
    intermediate=st.integers(256, 32768),
    vocab=st.integers(1000, 300_000),
)
configs = st.builds(
    lambda run, actor, learner: Config(
        run=run, actor=actor, learner=learner, model=ModelConfig(dtype="bfloat16", max_length=8192)
    ),
    st.builds(RunConfig, prompts_per_step=st.integers(1, 64)),
    st.builds(
        ActorConfig,
        group_size=st.integers(2, 8),
        max_tokens=st.integers(8, 4096),
        eager=st.booleans(),
        gpu_memory_fraction=st.none() | st.floats(0.1, 0.9),
        kv_cache_gib=st.none() | st.floats(0.5, 64),
        num_sequences=st.none() | st.integers(1, 512),
    ),
    st.builds(
        LearnerConfig,
        recompute=st.sampled_from(["auto", "none", "layer", "micro-batch"]),
        micro_batch_tokens=st.none() | st.integers(1, 65536),
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(configs, st.builds(work_of, sizes, st.integers(10**3, 10**6), st.integers(1, 1024)), st.integers(8, 192))
def test_a_run_fits_or_is_refused_with_a_change_that_fits(config: Config, work: Work, gib: int) -> None:
    try:
        chosen = memory_fit.on_gpu(config, work, gib * GIB)
    except UserError as error:
        remedy = str(error).rsplit("; ", 1)[1]
        changed, gib = applied(config, remedy, gib)
        chosen = memory_fit.on_gpu(changed, work, gib * GIB)
        if remedy.startswith("use a GPU of "):
            with pytest.raises(UserError):  # the smallest of whole GiB
                memory_fit.on_gpu(changed, work, (gib - 1) * GIB)
    made = planned(chosen, work, gib)
    assert made.total() <= made.usable_bytes
    assert all(value_of(chosen, name) != value for name, value in memory_fit.UNSET.items())
    assert made.total("actor") <= chosen.actor.gpu_memory_fraction * gib * GIB + 1
    assert memory_fit.on_gpu(chosen, work, gib * GIB) == chosen, "what is resolved stays as it is"


def applied(config: Config, remedy: str, gib: int) -> tuple[Config, int]:
    """What a refusal asks for, done."""
    for change in remedy.split(" and "):
        if change.startswith("leave out "):
            config = with_values(config, {change.removeprefix("leave out "): None})
        elif change.startswith("use a GPU of "):
            gib = int(change.split()[4])
        else:
            name, value = change.removeprefix("set ").split("=")
            config = with_values(config, {name: int(value) if value.isdigit() else value})
    return config, gib


@pytest.mark.parametrize(("available", "recompute"), [(2.0, "none"), (1.99, "micro-batch")])
def test_on_a_cpu_half_of_the_memory_decides(available, recompute) -> None:
    config, work = paper(), qwen("1.5B")
    resolved = with_values(config, {"learner.recompute": "none", "learner.micro_batch_tokens": 4096})
    needed = memory.step_activations(resolved, work).peak
    chosen = memory_fit.on_cpu(config, work, int(needed * available) + 1)
    assert (chosen.learner.recompute, chosen.learner.micro_batch_tokens) == (recompute, 4096)
    assert chosen.actor == config.actor
    kept = memory_fit.on_cpu(with_values(config, {"learner.recompute": "layer"}), work, 1)
    assert kept.learner.recompute == "layer"


@pytest.mark.parametrize("recompute", ["none", "layer", "micro-batch"])
@pytest.mark.parametrize("tokens", [40, 4096])
def test_a_whole_update_takes_what_was_planned(tmp_path, recompute, tokens) -> None:
    """With the head's workspace and the adapter's gradient, which are small here."""
    folder = tiny.save_model(tmp_path)
    config = tiny.config(dropout=0.1, recompute=recompute, micro_batch_tokens=tokens)
    config = with_values(
        config, {"run.prompts_per_step": 3, "actor.group_size": 4, "actor.max_tokens": 25, "model.lora_rank": 1}
    )
    learner = Learner(folder, config, tiny.CANARY)
    groups = [tiny.group(seed, [25] * 4, [1.0, 0.0, 2.0, 0.5], prompt_length=12) for seed in range(3)]
    with activations.LiveBytes() as seen:
        assert learner.update(groups).skipped is None

    def measured(lengths: tuple[int, ...], mode: str) -> Activations:
        return measure(learner.policy.trunk.config, config.model, lengths=[lengths], recompute=mode, gpu=False)

    size = Size.of(plan.check_model(config, folder), config.model)
    work = Work(size=size, longest_prompt_tokens=12, activations=measured)
    assert memory.step_activations(config, work).peak == pytest.approx(seen.peak, rel=0.08)


def table_row(name: str, gib: int) -> str | None:
    """Of the notes' table; None where the model does not fit."""
    try:
        config = memory_fit.on_gpu(paper(), qwen(name), gib * GIB)
    except UserError:
        return None
    made = planned(config, qwen(name), gib)
    chosen = (config.learner.recompute, config.learner.micro_batch_tokens, config.actor.num_sequences)
    sizes = (made.total("learner"), made.total("actor"), made.gpu_bytes - made.total())
    return "| " + " | ".join(map(str, (name, gib, *chosen, *(f"{size / GIB:.1f}" for size in sizes)))) + " |"


def test_the_table_of_the_notes_is_what_the_plan_computes() -> None:
    fits = {gib: {name: row for name in QWEN if (row := table_row(name, gib))} for gib in (40, 80)}
    rows = [fits[gib][name] for name in QWEN if name != "0.5B" for gib in fits if name in fits[gib]]
    largest = [f"{list(models)[-1]} on {gib} GiB" for gib, models in fits.items()]
    expected = "\n".join([*rows, "", f"Largest published Qwen2.5 that fits: {', '.join(largest)}."])
    assert expected in NOTES.read_text(), f"{NOTES} should say\n{expected}"
