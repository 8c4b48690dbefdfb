"""AdamW with warm-up and a cosine schedule; a step whose loss or gradient is not finite is skipped."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from common.config import LearnerConfig
from common.types import UserError
from learner.ranks import Ranks


def learning_rate(step: int, *, steps: int, peak: float) -> float:
    """Learning rate of optimizer step `step`, 0..steps-1: linear warm-up over max(5, steps // 10) steps, then a cosine
    to 0 (arXiv 2606.05434, Table 1). The first rate is peak / warm-up, not 0, so that no step is without effect.
    """
    warmup = max(5, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Optimizer:
    """AdamW on `parameters`."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], config: LearnerConfig, *, steps: int, ranks: Ranks | None = None
    ) -> None:
        self.parameters = parameters
        self.config = config
        self.steps = steps
        self.ranks = ranks or Ranks()
        self.adamw = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

    def rate(self, step: int) -> float:
        return learning_rate(step, steps=self.steps, peak=self.config.learning_rate)

    def step(self, loss: Tensor, step: int) -> tuple[float, str | None]:
        """Backward, clip and update at optimizer step `step`.

        All ranks have the same loss, sum of gradients and weights. Returns the gradient norm before clipping, and why
        the update was skipped (None: it was made). A skipped update leaves weights and moments as they were.
        """
        self.adamw.zero_grad(set_to_none=True)
        if not torch.isfinite(loss):
            return math.nan, f"loss {loss.item()}"
        if loss.requires_grad:  # not on a rank without tokens
            loss.backward()
        self.ranks.sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip).item()
        if not math.isfinite(norm):
            return norm, f"gradient norm {norm}"
        for group in self.adamw.param_groups:
            group["lr"] = self.rate(step)
        self.adamw.step()
        return norm, None

    def state_dict(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts, named "<parameter index>.<name>"; the configuration holds the rest."""
        state = self.adamw.state_dict()["state"]
        return {f"{index}.{name}": tensor for index, each in state.items() for name, tensor in each.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned. Raises UserError for tensors of other parameters."""
        shapes = {
            f"{index}.{name}": parameter.shape if name != "step" else torch.Size()
            for index, parameter in enumerate(self.parameters)
            for name in ("step", "exp_avg", "exp_avg_sq")
        }
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if shapes.get(key) != tensor.shape:
                raise UserError(
                    f"the checkpoint cannot be loaded: {key!r} is not a part of AdamW's state on this model's adapter; "
                    "use another one"
                )
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
        self.adamw.load_state_dict({**self.adamw.state_dict(), "state": state})
