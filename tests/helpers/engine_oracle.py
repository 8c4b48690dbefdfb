"""Random adapters, and what transformers and peft in float32 make of them: for tests of the engine."""

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from common.adapter import Adapter, Canary, tensors

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 24.0


def make_adapter(
    model: torch.nn.Module, version: int, *, scale: float, dtype: str, targets: tuple[str, ...] = ALL_TARGETS
) -> Adapter:
    """Random A, and random B times `scale`; an odd alpha / rank, so that a wrong factor shows."""
    rng = np.random.default_rng(version)
    factors = {}
    for name, module in model.named_modules():
        if name.endswith(targets):
            rows, columns = module.weight.shape
            prefix = f"base_model.model.{name}"
            lora_a = rng.standard_normal((RANK, columns)) / np.sqrt(columns)
            factors[f"{prefix}.lora_A.weight"] = torch.tensor(lora_a, dtype=torch.float32)
            lora_b = rng.standard_normal((rows, RANK)) * scale
            factors[f"{prefix}.lora_B.weight"] = torch.tensor(lora_b, dtype=torch.float32)
    canary = Canary(token_ids=np.zeros(1, np.int32), logprobs=np.zeros(0), base_logprobs=np.zeros(0))
    return Adapter.of(factors, dtype, version=version, rank=RANK, alpha=ALPHA, target_modules=targets, canary=canary)


@torch.inference_mode()
def score(model: Any, token_ids: Any, *temperatures: float) -> list[np.ndarray]:
    """log_softmax(logits / temperature) of tokens 1..T-1, for each temperature."""
    ids = torch.tensor(np.asarray(token_ids), dtype=torch.long)
    logits = model(ids[None]).logits[0, :-1].float()
    return [(logits / t).log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy() for t in temperatures]


def peft_score(reference: Any, adapter: Adapter, token_ids: np.ndarray) -> np.ndarray:
    lora = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.variant == "rslora",
        target_modules=list(adapter.target_modules),
    )
    model = get_peft_model(reference, lora).eval()
    state = {n.replace(".weight", ".default.weight"): t.float() for n, t in tensors(adapter).items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    [scored] = score(model, token_ids, 1.0)
    model.unload()
    return scored
