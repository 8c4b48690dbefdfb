"""The frozen base model: how it is loaded, what gets an adapter, and which models this learner does not compute."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.config import ALL_LINEAR, ModelConfig
from common.types import UserError
from learner.policy.attention import PACKED

ATTENTION = {"full_attention", "sliding_attention"}  # kinds of layers that learner/policy/attention.py computes


def not_trained(config: PretrainedConfig) -> str | None:
    """Why models of this kind are not trained, in a few words; None if they may be."""
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder; only decoders are trained"
    if config.get_text_config() is not config:
        return f"is multimodal ({config.model_type}); only models of text alone are trained"
    if quantization := getattr(config, "quantization_config", None):
        kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        return f"is quantised ({kind}); learner and actor would compute with different weights"
    return None


def unsupported(model: PreTrainedModel, max_length: int) -> str | None:
    """Why learner and actor cannot train this model, in a few words; None if they can. It may be on the meta device."""
    return next(_reasons(model, model.config, max_length), None)


def _reasons(model: PreTrainedModel, config: PretrainedConfig, max_length: int) -> Iterator[str]:
    if reason := not_trained(config):
        yield reason
    yield from _other_layers(model, config)
    for name in ("logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1):
            yield f"scales its logits ({name}), which learner/head does not"
    if getattr(config, "attn_logit_softcapping", None):
        yield "caps its attention logits (attn_logit_softcapping), which learner/policy/attention.py does not"
    if type(model.get_output_embeddings()) is not torch.nn.Linear:
        yield "has no output head that is a plain linear layer"
    if not _linear(model):
        yield "has no linear modules that could get an adapter"
    yield from _varying_positions(config, max_length)


def _other_layers(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[str]:
    """Layers that are not dense, or mix tokens otherwise than by causal attention: across the rollouts of a pack."""
    if any(".experts." in name for name, _ in model.named_parameters()):
        yield "is a mixture of experts, whose router may choose others in the actor than in the learner"
    other = set(getattr(config, "layer_types", None) or ()) - ATTENTION
    convolutions = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv1d)]
    if found := sorted(other) or convolutions[:1]:
        yield f"mixes tokens otherwise than by attention ({found[0]}), which packed rollouts do not allow"
    if not model._supports_attention_backend:
        yield "has attention of its own in transformers, so packed rollouts would attend to one another"
    if getattr(config, "use_bidirectional_attention", False):
        yield "attends to later tokens too (use_bidirectional_attention)"


def _varying_positions(config: PretrainedConfig, max_length: int) -> Iterator[str]:
    """Rotary embeddings that depend on a sequence's length in transformers and on the maximum length in vLLM."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for each in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind, original = each.get("rope_type"), each.get("original_max_position_embeddings")
        if kind == "dynamic":
            yield "has dynamic rotary embeddings, which the actor computes otherwise than the learner"
        if kind == "longrope" and original is not None and max_length > original:
            yield (
                f"needs model.max_length={original} or less, not {max_length}: its rotary embeddings (longrope) change "
                "beyond, in the actor for all sequences, in the learner for longer ones alone"
            )


def targets(model: PreTrainedModel, config: ModelConfig) -> tuple[str, ...]:
    """The names of the linear modules that get an adapter. Raises UserError for a name that the model does not have."""
    names = _linear(model)
    if ALL_LINEAR in config.lora_targets:
        return names
    for target in config.lora_targets:
        if target not in names:
            raise UserError(
                f"model.lora_targets: {target} is not a linear module of the model's layers; these are "
                f"{', '.join(names)}; name some of them, or {ALL_LINEAR}"
            )
    return config.lora_targets


def _linear(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the linear modules below the output head, in the order in which the model has them."""
    head = model.get_output_embeddings()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]
    return tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear))


def load_base(model: Path | PretrainedConfig, dtype: str, device: torch.device) -> Any:
    """The model of a folder; of a configuration alone its shapes, on the meta device."""
    if isinstance(model, PretrainedConfig):
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(model, dtype=getattr(torch, dtype), attn_implementation=PACKED)
    else:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=PACKED).to(device)
    for module in base.modules():
        # transformers reads the positions in each pass to choose between short and long factors, which waits for a GPU
        # and fails without data. `unsupported` has made sure that the short ones hold, which the module begins with.
        if getattr(module, "rope_type", None) == "longrope":
            module.rope_type = "short"
    return base
