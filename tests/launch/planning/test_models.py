"""Which models a run takes: families of chat models by their configuration alone, the others refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, SIZES
from transformers import AutoConfig

from common.config import Config, ModelConfig
from common.types import UserError
from launch.planning import plan
from launch.planning.memory import Size
from learner.policy.base import targets

SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("o_proj", "qkv_proj", "gate_up_proj", "down_proj")  # in the order in which transformers makes them
SMALL = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
LONG = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 512}


def saved(folder: Path, model_type: str, values: dict[str, Any]) -> Path:
    AutoConfig.for_model(model_type, **values).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_module_of_a_family_gets_an_adapter(tmp_path, family):
    model_type, values = FAMILIES[family]
    folder = saved(tmp_path, model_type, SIZES | {"vocab_size": 97} | values)
    config = Config(model=ModelConfig(max_length=256), actor={"max_tokens": 64})
    model = plan.check_model(config, folder)
    expected = FUSED if model_type == "phi3" else SEPARATE
    assert targets(model, config.model) == expected
    explicit = config.model.model_copy(update={"lora_targets": expected})
    size, of_explicit = (Size.of(model, each).num_adapter_parameters for each in (config.model, explicit))
    assert size == of_explicit > 0


@pytest.mark.parametrize(
    ("model_type", "values", "words"),
    [
        ("gemma3", {}, "is multimodal (gemma3)"),
        ("qwen2_5_vl", {}, "is multimodal (qwen2_5_vl)"),
        ("t5", {}, "is an encoder-decoder"),
        ("bart", {}, "is an encoder-decoder"),
        ("llama", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "is quantised (awq)"),
        ("qwen3_moe", {"num_experts": 4}, "is a mixture of experts"),
        ("mixtral", {}, "is a mixture of experts"),
        ("gpt_oss", {"num_local_experts": 4}, "is a mixture of experts"),
        ("qwen3_5_text", {}, "mixes tokens otherwise than by attention (linear_attention)"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "mixes tokens otherwise than by attention (conv)"),
        ("falcon_h1", {}, "mixes tokens otherwise than by attention (hybrid)"),
        ("recurrent_gemma", {}, "mixes tokens otherwise than by attention (model.layers.0.temporal_block.conv_1d)"),
        ("falcon", {}, "has attention of its own"),
        ("gpt2", {}, "has no linear modules"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attends to later tokens too"),
        ("gemma2", {"head_dim": 32}, "caps its attention logits (attn_logit_softcapping)"),
        ("granite", {"logits_scaling": 8.0}, "scales its logits (logits_scaling)"),
        ("cohere", {}, "scales its logits (logit_scale)"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic rotary"),
        ("phi3", {**LONG, "pad_token_id": 0}, "needs model.max_length=512 or less, not 1024"),
        ("phi3", {"pad_token_id": 97}, "is not a causal language model: Padding_idx must be within num_embeddings"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_trained_is_refused(tmp_path, model_type, values, words):
    folder = saved(tmp_path, model_type, SMALL | values)
    with pytest.raises(UserError) as error:
        plan.check_model(Config(), folder)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("values", "words"), [
    ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}, "custom code"),
    ({"model_type": "mine"}, "`mine`"),
    ({}, "model_type"),
])  # fmt: skip
def test_custom_code_and_an_unknown_model_type_are_refused(tmp_path, values, words):
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "mine.py").write_text("raise SystemExit('custom code ran')\n")
    with pytest.raises(UserError, match="is not a causal language model") as error:
        plan.check_model(Config(), tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_code_beside_a_known_model_is_not_run(tmp_path):
    """Phi-3's own folders name such code, which transformers no longer needs."""
    saved(tmp_path, "llama", SMALL)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"auto_map": {"AutoConfig": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text("raise SystemExit('custom code ran')\n")
    assert targets(plan.check_model(Config(), tmp_path), ModelConfig()) == SEPARATE
