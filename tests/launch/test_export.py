"""launch/export.py: what it writes loads with PEFT and transformers and computes what the learner does."""

import json
import signal
from pathlib import Path

import local_run
import numpy as np
import pytest
import torch
import trained_run
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import export
from launch.exporting import comparison, merge

pytestmark = pytest.mark.usefixtures("short_prompts")
TOKENS = np.array([1, 20, 300, 4000, 4001, 7, 49000, 12], dtype=np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return local_run.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    return trained_run.write(tmp_path_factory.mktemp("runs") / "trained", model)


@pytest.fixture
def short_prompts(monkeypatch):
    """Of the comparison: a tiny model has a real vocabulary, which takes most of its time."""
    monkeypatch.setattr(comparison, "MAX_TOKENS", 32)


def exported(run: Path, out: Path, *options: str) -> tuple[int, str]:
    return export.main([str(trained_run.saved(run)), "--out", str(out), *options]), str(out)


def logprobs(model) -> np.ndarray:
    tokens_T = torch.from_numpy(TOKENS).long()
    with torch.no_grad():
        logits_TV = model.eval()(input_ids=tokens_T[None, :-1]).logits[0].float()
    return logits_TV.log_softmax(-1).gather(1, tokens_T[1:, None])[:, 0].numpy()


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_peft_loads_the_adapter_and_computes_what_the_learner_does(model, tmp_path, variant):
    run = trained_run.write(tmp_path / "run", model, "--model.lora_variant", variant, "--model.lora_rank", "4")
    assert exported(run, tmp_path / "out")[0] == 0
    learner = trained_run.policy(run)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tmp_path / "out"
    )
    expected = learner.logprobs(TOKENS)
    np.testing.assert_allclose(logprobs(loaded), expected, atol=2e-5)
    with learner.reference():
        assert np.abs(learner.logprobs(TOKENS) - expected).mean() > 0.01  # the adapter moves them
    ours = LoraConfig.from_pretrained(tmp_path / "out").to_dict()
    pefts = LoraConfig.from_pretrained(trained_run.saved(run)).to_dict()
    differing = {key for key in pefts if ours[key] != pefts[key]} - {"base_model_name_or_path", "peft_version"}
    assert differing == set()


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_transformers_loads_the_merged_model_and_computes_what_the_learner_does(model, tmp_path, variant, capsys):
    run = trained_run.write(tmp_path / "run", model, "--model.lora_variant", variant, "--model.lora_rank", "4")
    assert exported(run, tmp_path / "out", "--merge", "--dtype", "float32")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.float32
    np.testing.assert_allclose(logprobs(merged), trained_run.policy(run).logprobs(TOKENS), atol=2e-5)
    out = capsys.readouterr().out
    assert "100.0% of the update retained" in out
    assert "warning" not in out


def test_the_merged_weights_are_those_of_peft(model, run, tmp_path):
    """Peft merges in float32 too; it shares no code with ours."""
    assert exported(run, tmp_path / "out", "--merge", "--dtype", "float32")[0] == 0
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    unmerged = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = PeftModel.from_pretrained(base, trained_run.saved(run)).merge_and_unload().state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == load_file(model / "model.safetensors").keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)
        adapted = "_proj" in name
        assert torch.equal(tensor, unmerged[name]) != adapted, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merged_model_of_16_bits_is_rounded_once(run, tmp_path, dtype):
    """round(W + s B A) of the float32 sum; with a strong adapter the rounding is small beside its effect."""
    assert exported(run, tmp_path / "exact", "--merge", "--dtype", "float32")[0] == 0
    assert exported(run, tmp_path / "out", "--merge", "--dtype", dtype)[0] == 0
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].to(getattr(torch, dtype))), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert str(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype) == f"torch.{dtype}"


def test_the_tokenizer_comes_along(model, run, tmp_path):
    assert exported(run, tmp_path / "out")[0] == 0
    ours, base = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", model))
    chat = [{"role": "user", "content": "What is 12 + 3?"}]
    assert ours.apply_chat_template(chat, add_generation_prompt=True) == base.apply_chat_template(
        chat, add_generation_prompt=True
    )
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (model / "generation_config.json").read_bytes()


def test_an_update_below_the_steps_of_bfloat16_is_refused(model, tmp_path, capsys):
    """Entries of W are about 0.3, half a step of which is 1e-3; those of the update are about 1e-5."""
    bfloat16 = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    bfloat16.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "model")
    run = trained_run.write(tmp_path / "run", tmp_path / "model", strength=1e-5)
    assert exported(run, tmp_path / "new" / "out", "--merge")[0] == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("--dtype bfloat16 keeps ")
    assert captured.err.splitlines()[-1].endswith("use --dtype float16 or float32, or leave out --merge")
    assert list((tmp_path / "new").iterdir()) == []
    assert exported(run, tmp_path / "new" / "out", "--merge", "--dtype", "float32")[0] == 0


def kept(share: float = 1.0, difference: float = 0.0, dtype: str = "bfloat16") -> export.Merge:
    return export.Merge(
        dtype=dtype,
        retained=merge.Retained(kept=share, whole=1.0),
        comparison=comparison.Comparison(num_prompts=8, num_tokens=100, difference=difference, effect=1.0),
    )


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (kept(0.95, 0.05), ""),
        (kept(0.85), "warning: --dtype bfloat16 keeps 85% of the update and misses 0% of the adapter's effect"),
        (kept(1.0, 0.2), "warning: --dtype bfloat16 keeps 100% of the update and misses 20% of the adapter's effect"),
        (kept(1.0, 0.005, "float32"), ""),
    ],
)
def test_what_rounding_costs_is_said(result, says, capsys):
    export.check_loss(result)
    out = capsys.readouterr().out
    assert out.startswith(says) and bool(out) == bool(says)


@pytest.mark.parametrize(
    "result", [kept(0.45), kept(1.0, 0.6), kept(1.0, 0.02, "float32")], ids=["update", "effect", "float32"]
)
def test_what_rounding_has_eaten_is_refused(result):
    with pytest.raises(export.UserError, match=r"leave out --merge$"):
        export.check_loss(result)


def occupied(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (occupied, "is not empty"),
        (lambda out: out.write_text("mine"), "is not a folder"),
        (lambda out: out.symlink_to(out.parent / "nowhere"), "is not a folder"),
    ],
)
def test_what_is_at_out_already_stays(run, tmp_path, prepare, reason, capsys):
    out = tmp_path / "out"
    prepare(out)
    assert exported(run, out)[0] == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and reason in err
    assert out.is_symlink() or out.is_file() or [path.name for path in out.iterdir()] == ["mine.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(run, tmp_path):
    (tmp_path / "out").mkdir()
    assert exported(run, tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(merge, "save_file", full)
    assert exported(run, tmp_path / "out", "--merge")[0] == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"--out {tmp_path / 'out'} cannot be written (No space left on device); make room, or name another folder"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(run, tmp_path, monkeypatch, number):
    """In the middle of the weights, when the unfinished folder is there."""
    seen: list[int] = []

    def ended(*_: object) -> None:
        seen.append(len(list(tmp_path.glob(".out.*"))))
        signal.raise_signal(number)

    monkeypatch.setattr(merge, "save_file", ended)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as ending:
            exported(run, tmp_path / "out", "--merge")
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert (ending.value.code, seen, list(tmp_path.iterdir())) == (128 + number, [1], [])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the following arguments are required: CHECKPOINT, --out"),
        (["x"], "the following arguments are required: --out"),
        (["x", "--out", "y", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["x", "--out", "y", "--dtype", "float32"], "--dtype float32 is of a merged model; add --merge"),
        (["nowhere", "--out", "y"], "nowhere is not a checkpoint in a run folder"),
        (["x", "--out", "a\0b"], "cannot be used as a path"),
    ],
)
def test_bad_options_are_one_line(arguments, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and reason in err
    assert list(tmp_path.iterdir()) == []
