"""The frozen base model: how it is loaded, and which models this learner does not compute."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from learner.policy.attention import PACKED


def unsupported(config: PretrainedConfig, max_length: int) -> str | None:
    """Why this learner cannot compute a model of this configuration, in a few words; None if it can."""
    text = config.get_text_config()
    for name in ("logits_scaling", "logit_scale"):
        if getattr(text, name, None) not in (None, 1):
            return f"scales its logits ({name}), which learner/head does not"
    if getattr(text, "attn_logit_softcapping", None):
        return "caps its attention logits (attn_logit_softcapping), which learner/policy/attention.py does not"
    if getattr(text, "use_sliding_window", True) and (getattr(text, "sliding_window", None) or max_length) < max_length:
        return f"attends within a window of {text.sliding_window} tokens, less than model.max_length={max_length}"
    return None


def load_base(model: Path | PretrainedConfig, dtype: str, device: torch.device) -> Any:
    """The model of a folder; of a configuration alone its shapes, on the meta device."""
    if isinstance(model, PretrainedConfig):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model, dtype=getattr(torch, dtype), attn_implementation=PACKED)
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=PACKED).to(device)
