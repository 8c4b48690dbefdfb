"""Random adapters, and what transformers and peft in float32 make of them: for tests of the engine."""

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from common.adapter import Adapter, Canary, checksum
from common.config import ModelConfig

ALL_TARGETS = ModelConfig().lora_targets


def make_adapter(
    model: torch.nn.Module, version: int, *, scale: float, targets: tuple[str, ...] = ALL_TARGETS
) -> Adapter:
    """Random A, and random B times `scale`; an odd alpha / rank, so that a wrong factor shows."""
    rng = np.random.default_rng(version)
    rank, tensors = 8, {}
    for name, module in model.named_modules():
        if name.endswith(targets):
            rows, columns = module.weight.shape
            prefix = f"base_model.model.{name}"
            lora_a = rng.standard_normal((rank, columns)) / np.sqrt(columns)
            tensors[f"{prefix}.lora_A.weight"] = lora_a.astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = (rng.standard_normal((rows, rank)) * scale).astype(np.float32)
    canary = Canary(token_ids=np.zeros(1, np.int32), logprobs=np.zeros(0), base_logprobs=np.zeros(0))
    return Adapter(
        version=version,
        tensors=tensors,
        rank=rank,
        alpha=24.0,
        target_modules=targets,
        canary=canary,
        checksum=checksum(tensors),
    )


@torch.inference_mode()
def score(model: Any, token_ids: Any, *temperatures: float) -> list[np.ndarray]:
    """log_softmax(logits / temperature) of tokens 1..T-1, for each temperature."""
    ids = torch.tensor(np.asarray(token_ids), dtype=torch.long)
    logits = model(ids[None]).logits[0, :-1].float()
    return [(logits / t).log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy() for t in temperatures]


def peft_score(reference: Any, adapter: Adapter, token_ids: np.ndarray) -> np.ndarray:
    lora = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.target_modules))
    model = get_peft_model(reference, lora).eval()
    tensors = {n.replace(".weight", ".default.weight"): torch.tensor(t) for n, t in adapter.tensors.items()}
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    [scored] = score(model, token_ids, 1.0)
    model.unload()
    return scored
