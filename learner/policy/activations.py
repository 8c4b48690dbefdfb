"""What the policy's trunk keeps in memory for a micro-batch, measured by running it on tensors without data.

A forward and a backward pass of any architecture then take a second and no memory. Each storage that an operator
allocates is counted until it is freed. Torch picks kernels by device, so there are two kinds of tensors without data:

- for a CPU, torch's fake tensors, which report the CPU as their device;
- for a GPU, the meta device, where attention takes the GPU's path (learner/policy/attention.py) into the fake kernel
  that torch registers for varlen_attn. Fake tensors that report a GPU would need a torch built for CUDA; without one,
  autograd aborts the process. The kernels are those of a GPU except for attention in float32: the meta device keeps
  all attention weights of a head, as a GPU does where query heads share keys; else a GPU has a kernel that keeps less.
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

FEW, MORE = 2, 3  # numbers of layers that are run; their difference is what each further layer adds


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch, without weights, adapter, adapter gradients and head."""

    kept: int  # from the forward pass until the backward pass
    peak: int  # the maximum over both passes, `kept` included


def measure(
    model: PretrainedConfig,
    config: ModelConfig,
    *,
    lengths: Sequence[Sequence[int]],
    recompute: str,
    gpu: bool,
    dropout: bool = True,
) -> Activations:
    """The activations of a micro-batch with `lengths` as in MicroBatch, all of whose positions are scored.

    `recompute` is learner.recompute; `gpu` selects a GPU or a CPU; `dropout` is the argument of Policy.set_dropout.
    """

    def run(layers: int) -> Activations:
        device = torch.device("meta" if gpu else "cpu")
        policy = Policy(_with_layers(model, layers), config, device=device, recompute=recompute, head_backend="torch")
        policy.set_dropout(dropout)
        if gpu:
            return observe(policy, lengths)
        mode = FakeTensorMode()
        _make_fake(policy.peft_model, mode)
        with mode:
            return observe(policy, lengths)

    num_layers = model.get_text_config().num_hidden_layers
    if num_layers <= MORE:
        return run(num_layers)
    few, more = run(FEW), run(MORE)

    def extended(name: str) -> int:
        return getattr(few, name) + (num_layers - FEW) * (getattr(more, name) - getattr(few, name))

    return Activations(kept=extended("kept"), peak=extended("peak"))


def _with_layers(model: PretrainedConfig, number: int) -> PretrainedConfig:
    """The configuration of the same model with another number of layers."""
    model = copy.deepcopy(model)
    text = model.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:number]
    text.num_hidden_layers = number
    return model


def observe(policy: Policy, lengths: Sequence[Sequence[int]]) -> Activations:
    """Measure a forward and a backward pass of this policy, which leave a gradient in its parameters."""
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = scored_everywhere(lengths, policy.device)
    with LiveBytes() as memory:
        loss = policy.scored_states(batch).sum()
        kept = memory.live
        loss.backward()
    return Activations(kept=kept, peak=memory.peak)


def scored_everywhere(lengths: Sequence[Sequence[int]], device: torch.device) -> MicroBatch:
    """A micro-batch with `lengths` whose positions are all scored; its tokens are 0."""
    positions_L = torch.arange(sum(map(sum, lengths)), device=device)
    return MicroBatch(
        index=0,
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
    made: dict[Tensor, Tensor] = {}  # so that a tensor shared by two modules stays shared

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
    """Counts the bytes of the storages that operators allocate in its context, until they are freed.

    It does not see scratch memory that an operator frees before it returns, except that of the GPU's attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}  # by the address of the storage

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._enter((args, kwargs), new=False)  # a storage first seen as an argument is older than this context
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
