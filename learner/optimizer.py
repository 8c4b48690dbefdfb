"""AdamW with a warmed-up cosine schedule; a step that is not finite is skipped."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from common.config import LearnerConfig


def learning_rate(step: int, *, steps: int, peak: float) -> float:
    """Rate of optimizer step `step`, 0..steps-1: linear warm-up over max(5, steps // 10) steps, then a cosine to 0.

    The first step takes peak / warm-up, not 0: no step is without effect. (arXiv 2606.05434, Table 1.)
    """
    warmup = max(5, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Optimizer:
    """AdamW on `parameters`."""

    def __init__(self, parameters: list[torch.nn.Parameter], config: LearnerConfig, *, steps: int) -> None:
        self.parameters = parameters
        self.config = config
        self.steps = steps
        self.adamw = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

    def rate(self, step: int) -> float:
        return learning_rate(step, steps=self.steps, peak=self.config.learning_rate)

    def step(self, loss: Tensor, step: int) -> tuple[float, str | None]:
        """Backward, clip and update at optimizer step `step`.

        Returns the gradient norm before clipping, and why the update was skipped (None: it was made). A skipped
        update leaves weights and moments as they were.
        """
        self.adamw.zero_grad(set_to_none=True)
        if not torch.isfinite(loss):
            return math.nan, f"loss {loss.item()}"
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip).item()
        if not math.isfinite(norm):
            return norm, f"gradient norm {norm}"
        for group in self.adamw.param_groups:
            group["lr"] = self.rate(step)
        self.adamw.step()
        return norm, None

    def state_dict(self) -> dict[str, Tensor]:
        """AdamW's moments and counts, named "<number of the parameter>.<name>". The rest is the configuration's."""
        state = self.adamw.state_dict()["state"]
        return {f"{number}.{name}": tensor for number, each in state.items() for name, tensor in each.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            number, name = key.split(".")
            state.setdefault(int(number), {})[name] = tensor
        self.adamw.load_state_dict({**self.adamw.state_dict(), "state": state})
