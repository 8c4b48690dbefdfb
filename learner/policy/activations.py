"""What the policy's trunk keeps in memory for a micro-batch, found by running it on tensors that hold no data.

A forward and a backward pass of any architecture then take a second and no memory. Each storage that their operators
make is counted as long as it lives. Operators choose by device, so there are two kinds of such tensors:

- for a CPU torch's fake tensors, which claim to lie on one;
- for a GPU the meta device. Attention takes the GPU's path there (learner/policy/attention.py), which ends in the fake
  kernel that torch registers for varlen_attn. Fake tensors that claim to lie on a GPU would need a torch built for one:
  without, autograd aborts the process. What torch chooses by device elsewhere is the same, but for attention in
  float32: on the meta device it is the plain product with all weights of a head, as on a GPU where query heads share
  keys; where they do not, a GPU has a kernel that keeps less.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PretrainedConfig

from common.config import ModelConfig
from learner.batch import Ends, MicroBatch
from learner.policy.attention import KERNEL_BACKWARD, backward_scratch_bytes
from learner.policy.policy import Policy

FEW, MORE = 2, 3  # layers that are run; what a further one adds is their difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch; without the weights, the adapter and its gradient, and the head."""

    kept: int  # from the forward pass until the backward
    peak: int  # most at any time of the two, what is kept included


def measure(
    model: PretrainedConfig,
    config: ModelConfig,
    *,
    lengths: Sequence[Sequence[int]],
    recompute: str,
    gpu: bool,
    dropout: bool = True,
) -> Activations:
    """Of a micro-batch of rows with `lengths` (see MicroBatch), all of whose positions are scored.

    `recompute` as learner.recompute says; `gpu`: on a GPU, otherwise on a CPU; `dropout` as Policy takes it.
    """
    num_layers = model.get_text_config().num_hidden_layers
    options: dict[str, Any] = {"lengths": lengths, "recompute": recompute, "gpu": gpu, "dropout": dropout}
    if num_layers <= MORE:
        return _run(model, config, **options)
    few, more = (_run(_with_layers(model, number), config, **options) for number in (FEW, MORE))

    def extended(name: str) -> int:
        return getattr(few, name) + (num_layers - FEW) * (getattr(more, name) - getattr(few, name))

    return Activations(kept=extended("kept"), peak=extended("peak"))


def _with_layers(model: PretrainedConfig, number: int) -> PretrainedConfig:
    """The configuration of the same model, only lower."""
    model = copy.deepcopy(model)
    text = model.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:number]
    text.num_hidden_layers = number
    return model


def _run(
    model: PretrainedConfig,
    config: ModelConfig,
    *,
    lengths: Sequence[Sequence[int]],
    recompute: str,
    gpu: bool,
    dropout: bool,
) -> Activations:
    device = torch.device("meta" if gpu else "cpu")
    policy = Policy(model, config, device=device, recompute=recompute, head_backend="torch")
    policy.set_dropout(dropout)
    if gpu:
        return observe(policy, lengths)
    mode = FakeTensorMode()
    _make_fake(policy.peft_model, mode)
    with mode:
        return observe(policy, lengths)


def observe(policy: Policy, lengths: Sequence[Sequence[int]]) -> Activations:
    """What a forward and a backward pass of this policy take; it is left with a gradient."""
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = scored_everywhere(lengths, policy.device)
    with LiveBytes() as memory:
        loss = policy.scored_states(batch).sum()
        kept = memory.live
        loss.backward()
    return Activations(kept=kept, peak=memory.peak)


def scored_everywhere(lengths: Sequence[Sequence[int]], device: torch.device) -> MicroBatch:
    """A micro-batch of some tokens."""
    positions_L = torch.arange(sum(map(sum, lengths)), device=device)
    return MicroBatch(
        token_ids_L=torch.zeros_like(positions_L),
        position_ids_L=positions_L,
        lengths=tuple(map(tuple, lengths)),
        ends=Ends.of(lengths, positions_L.device),
        predictor_N=positions_L,
        target_N=positions_L,
        rollout_N=positions_L,
        token_N=positions_L,
    )


def _make_fake(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Turn all tensors of a module on the meta device into fake ones on the CPU."""
    made: dict[Tensor, Tensor] = {}  # shared ones stay shared

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in made:
            new: Tensor = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            made[tensor] = torch.nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return made[tensor]

    for part in module.modules():
        own: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in own:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make inside of it, while they live.

    What an operator takes for itself and returns before it ends is not seen, except the GPU attention's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}  # by the storage's address

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._enter((args, kwargs), new=False)  # what is an argument first was there before
        result = operator(*args, **(kwargs or {}))
        self._enter(result, new=True)
        if operator is KERNEL_BACKWARD:
            self.peak = max(self.peak, self.live + backward_scratch_bytes(*args))
        return result

    def _enter(self, tree: Any, *, new: bool) -> None:
        for leaf in tree_iter(tree):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                address = storage._cdata
                if address not in self._sizes:
                    self._sizes[address] = storage.nbytes() if new else 0
                    self.live += self._sizes[address]
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._leave, address)

    def _leave(self, address: int) -> None:
        self.live -= self._sizes.pop(address)
