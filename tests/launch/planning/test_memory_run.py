"""The memory plan in the program: what --dry-run prints, what is refused, what a resumed run takes over."""

from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config

from common.command_line import load
from common.config import dump, with_values
from launch.planning import memory_fit, model_folder, plan
from launch.planning.memory import GIB
from launch.run import main
from launch.runtime.cluster import DEFAULT_CONFIG
from learner import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights: 3 layers, and 10 GB in each copy."""
    path = tmp_path_factory.mktemp("model")
    Qwen2Config(
        hidden_size=8192,
        intermediate_size=49152,
        num_hidden_layers=3,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=49152,
        tie_word_embeddings=True,
    ).save_pretrained(path)
    AutoTokenizer.from_pretrained(model_folder.smollm2()).save_pretrained(path)
    return path


def options(folder: Path, run: Path, *more: str) -> list[str]:
    return ["--model.path", str(folder), "--task.num_train", "8", "--run.dir", str(run), *more]


def test_a_dry_run_prints_the_plan_of_a_gpu_that_is_not_there(folder, tmp_path, capsys) -> None:
    assert main([*options(folder, tmp_path), "--run.gpu_memory_gib", "80", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "# memory on a GPU of 80.00 GiB" in printed
    for part in ("frozen weights", "AdamW", "activations of the step", "head workspace", "KV cache", "CUDA graphs"):
        assert part in printed
    assert 'recompute = "auto"' not in printed
    assert "kv_cache_gib = " in printed
    assert "gpu_memory_fraction = 0." in printed
    assert "max_staleness=1 on one GPU" not in printed
    gpu = ("--run.gpu_memory_gib", "80", "--run.max_staleness", "1", "--dry-run")
    assert main([*options(folder, tmp_path), *gpu]) == 0
    assert "# warning: run.max_staleness=1 on one GPU: the kernels of its two processes take turns" in (
        capsys.readouterr().out
    )


def test_what_does_not_fit_ends_with_status_2_and_one_line(folder, tmp_path, capsys) -> None:
    assert main([*options(folder, tmp_path / "run"), "--run.gpu_memory_gib", "16"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("the GPU's 16.0 GiB, of which 15.2 can be planned, are too few for this run")
    assert "use a GPU of" in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_a_gpu_only_the_learner_is_set(folder, tmp_path) -> None:
    made = plan.make(load(options(folder, tmp_path), DEFAULT_CONFIG))
    assert made.memory is None
    assert made.config.learner.recompute in ("none", "micro-batch")
    assert made.config.learner.micro_batch_tokens == memory_fit.CPU_TOKENS
    assert (made.config.actor.kv_cache_gib, made.config.actor.num_sequences) == (None, None)


def test_the_present_gpu_is_planned_for(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = type("Properties", (), {"total_memory": 80 * GIB, "major": 8, "minor": 0, "name": "a GPU"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    made = plan.make(load(options(folder, tmp_path), DEFAULT_CONFIG))
    assert made.memory.gpu_bytes == 80 * GIB
    assert made.memory.learner_peak_bytes == made.memory.total("learner") - GIB // 2


def test_a_resumed_run_takes_over_what_was_set_when_it_began(folder, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    begun = plan.make(load(options(folder, run), DEFAULT_CONFIG)).config
    begun = with_values(begun, {"learner.recompute": "layer", "learner.micro_batch_tokens": 1234})
    with checkpoint.written_whole(run / "checkpoints" / "step-000001"):
        pass
    (run / "config.toml").write_text(dump(begun))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1}))
    resumed = plan.make(load(options(folder, run, "--run.resume"), DEFAULT_CONFIG)).config
    assert resumed.learner == begun.learner
    with pytest.raises(plan.UserError, match=r"learner.recompute=none differs from layer of the run"):
        plan.make(load(options(folder, run, "--run.resume", "--learner.recompute", "none"), DEFAULT_CONFIG))


def test_a_gpu_run_resumes_with_its_share(folder, tmp_path) -> None:
    run, gpu = tmp_path / "run", ("--run.gpu_memory_gib", "80")
    begun = plan.make(load(options(folder, run, *gpu), DEFAULT_CONFIG)).config
    with checkpoint.written_whole(run / "checkpoints" / "step-000001"):
        pass
    (run / "config.toml").write_text(dump(begun))
    resumed = plan.make(load(options(folder, run, *gpu, "--run.resume"), DEFAULT_CONFIG)).config
    assert resumed.actor == begun.actor
    assert resumed.learner == begun.learner
