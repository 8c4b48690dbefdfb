"""rsLoRA: learner, checkpoint and published version have one scale, alpha / sqrt(rank), which PEFT reads back."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from engine_oracle import score
from peft import PeftModel
from transformers import AutoModelForCausalLM

from actor import gpu_share
from common.adapter import scale, tensors
from common.config import ActorConfig, ModelConfig
from learner.policy.policy import Policy

RANK, ALPHA = 4, 3.0
IDS = np.arange(20) * 7 % tiny.V
SCALES = {"lora": 0.75, "rslora": 1.5}  # by hand


@pytest.mark.parametrize("variant", SCALES)
def test_peft_computes_with_the_checkpoint_what_the_learner_computes(tmp_path, variant):
    folder = tiny.save_model(tmp_path / "model")
    config = ModelConfig(dtype="float32", lora_rank=RANK, lora_alpha=ALPHA, lora_variant=variant)
    policy = Policy(folder, config, device=torch.device("cpu"), recompute="none", head_backend="torch")
    with policy.probed(0.1):
        policy.save(tmp_path / "adapter")
        learners, published = policy.logprobs(IDS), policy.adapter(3, None)
    with policy.reference():
        unmoved = policy.logprobs(IDS)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["use_rslora"], settings["r"], settings["lora_alpha"]) == (variant == "rslora", RANK, ALPHA)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    [pefts] = score(PeftModel.from_pretrained(base, tmp_path / "adapter"), IDS, 1.0)
    np.testing.assert_allclose(learners, pefts, atol=2e-5)
    assert np.abs(learners - unmoved).mean() > 0.1

    weights = {name.removeprefix("base_model.model."): value for name, value in tensors(published).items()}
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name in [name for name in weights if name.endswith(".lora_A.weight")]:
            layer = merged.get_submodule(name.removesuffix(".lora_A.weight"))
            layer.weight += SCALES[variant] * weights[name.replace("lora_A", "lora_B")] @ weights[name]
    np.testing.assert_allclose(learners, *score(merged, IDS, 1.0), atol=2e-5)

    started = gpu_share.arguments("m", config, ActorConfig(), seed=1, on_gpu=False)
    assert published.scale == started["additional_config"]["horizon"]["scale"] == SCALES[variant]


def test_the_two_scales_agree_at_rank_one():
    assert scale(1, ALPHA, "lora") == scale(1, ALPHA, "rslora") == ALPHA
    assert scale(64, ALPHA, "rslora") == pytest.approx(math.sqrt(64) * scale(64, ALPHA, "lora"))
