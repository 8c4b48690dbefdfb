"""Tiny models with random weights, one per family of chat models, and SmolLM2's tokenizer with its chat template."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from launch.planning import model_folder

HEAD = 32  # the smallest head that vLLM's attention on a CPU computes
WINDOW = 24  # tokens that a sliding layer attends to; fewer than a test's sequences have
SIZES = {
    "hidden_size": 4 * HEAD,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
WIDE = {"head_dim": HEAD, "hidden_size": 96}  # the heads together are wider than the hidden states
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * i for i in range(12)],
    "long_factor": [2.0 + 0.3 * i for i in range(12)],
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
# By family: transformers' model_type, and the values of its configuration that differ from SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "llama-3": ("llama", {**WIDE, "rope_parameters": LLAMA3_ROPE}),
    "qwen2.5": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**WIDE, "tie_word_embeddings": True}),
    "gemma-3": (
        "gemma3_text",
        {
            **WIDE,
            "query_pre_attn_scalar": 40,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "rope_parameters": GEMMA_ROPE,
            "initializer_range": 0.1,  # with more, the scaled and tied embeddings repeat the last token
            "final_logit_softcapping": None,
            "tie_word_embeddings": True,
        },
    ),
    "phi-3": ("phi3", {"sliding_window": WINDOW, "pad_token_id": 2}),
    "phi-4": ("phi3", {"pad_token_id": 2}),
    "phi-4-mini": (
        "phi3",
        {
            "rope_parameters": LONG_ROPE,
            "original_max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "pad_token_id": 2,
        },
    ),
    "mistral": ("mistral", {**WIDE, "sliding_window": WINDOW}),
}


def save_model(folder: Path, family: str, vocab_size: int | None = None) -> Path:
    """Save a model of `family` in float32; no weight has a value that could be left out unseen (0 or 1)."""
    model_type, values = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(model_folder.smollm2())
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | {"vocab_size": vocab_size or len(tokenizer)} | values))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
