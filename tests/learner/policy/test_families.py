"""The learner on a tiny model of each family, against transformers' own attention and PEFT's own layers."""

import numpy as np
import pytest
import tiny
import torch
from engine_oracle import peft_score, score
from families import FAMILIES, SIZES, WINDOW, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from common.config import ModelConfig
from learner.batch import pack
from learner.policy.activations import measure
from learner.policy.forward import Demands
from learner.policy.policy import Policy

GROUPS = [tiny.group(1, [40, 7, 21], [1.0, 0.0, 0.5], prompt_length=35), tiny.group(2, [3, 30], [1.0, 0.0])]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_transformers_and_peft_compute(tmp_path, family):
    folder = save_model(tmp_path, family, vocab_size=tiny.V)
    config = ModelConfig(dtype="float32", lora_rank=4, lora_alpha=12, max_length=256)
    policy = Policy(folder, config, device=torch.device("cpu"), recompute="none", head_backend="torch")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    rollouts = [rollout for group in GROUPS for rollout in group.rollouts]
    assert max(len(rollout.token_ids) for rollout in rollouts) > 2 * WINDOW
    batch = pack(GROUPS, max_tokens=4096, min_micro_batches=1, device=policy.device)
    with policy.probed(0.1), torch.no_grad():
        adapter = policy.adapter(1, None)
        packed = batch.split(policy.forward(batch, Demands(dropout=False)).stats.logprob_N)
        with policy.reference():
            unmoved = policy.logprobs(rollouts[0].token_ids)
    np.testing.assert_allclose(unmoved, *score(model, rollouts[0].token_ids, 1.0), atol=1e-4)
    for rollout, logprobs in zip(rollouts, packed, strict=True):
        expected = peft_score(model, adapter, rollout.token_ids)[rollout.num_prompt_tokens - 1 :]
        np.testing.assert_allclose(logprobs, expected, atol=1e-3)
    assert np.abs(packed[0] - unmoved[GROUPS[0].rollouts[0].num_prompt_tokens - 1 :]).mean() > 0.5, "a strong adapter"


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_its_activations_are_measured_without_data(family, gpu):
    """So that the memory plan can be made; a rotary embedding that reads positions would fail."""
    model_type, values = FAMILIES[family]
    model = AutoConfig.for_model(model_type, **(SIZES | {"vocab_size": tiny.V} | values))
    config = ModelConfig(dtype="bfloat16" if gpu else "float32", max_length=256)
    none, layer = (measure(model, config, lengths=[[40, 30], [60]], recompute=r, gpu=gpu) for r in ("none", "layer"))
    assert 0 < layer.kept < none.kept <= none.peak
