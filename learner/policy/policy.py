"""The policy: a frozen base model with a LoRA adapter (peft). The reference is the same model with the adapter off.

Dtypes: frozen weights and activations have `model.dtype`; adapter weights, their gradients, head sums and loss are
float32. learner/policy/lora.py rounds the adapter's weights at use, so that they make no float32 activations.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners import lora
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from common.adapter import Adapter, Canary, scale
from common.config import ModelConfig
from common.types import UserError
from learner.batch import MicroBatch, StepBatch
from learner.checkpoint import load_tensors
from learner.head import HeadStats, head_stats
from learner.policy.base import load_base, targets, unsupported
from learner.policy.forward import Demands, ForwardOutput, empty, join
from learner.policy.lora import Projection, SharedInput
from learner.policy.sharding import gathered, shard
from learner.ranks import Ranks


def mixed(*numbers: int) -> int:
    """One seed made of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


SAME_INPUT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # projections that share a call of lora_linear


class _LoraLinear(lora.Linear):
    """peft's layer, computed together with the sibling layers that take the same input."""

    shared: SharedInput

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) if self.disable_adapters else self.shared.output(self, x)

    def projection(self) -> Projection:
        [name] = self.active_adapters
        return Projection(
            self.base_layer.weight, self.base_layer.bias, self.lora_A[name].weight, self.lora_B[name].weight
        )


def _share_inputs(model: torch.nn.Module, scale: float) -> None:
    """Group the adapted projections of each block by their input; one without siblings is a group of its own."""
    for block in model.modules():
        adapted = {name: child for name, child in block.named_children() if isinstance(child, _LoraLinear)}
        groups = [[adapted.pop(name) for name in names if name in adapted] for names in SAME_INPUT]
        for group in [*groups, *([layer] for layer in adapted.values())]:
            shared = SharedInput(group, scale)
            for layer in group:
                layer.shared = shared


class Policy:
    """Base, adapter and head, on one device, in training mode."""

    def __init__(
        self,
        model: Path | PretrainedConfig,
        config: ModelConfig,
        *,
        device: torch.device,
        recompute: str,
        head_backend: str,
        sharded: bool = False,
    ) -> None:
        """Load the model from a folder, or build it from a configuration on the meta device, without data.

        `recompute` is learner.recompute. A model that is to be sharded is loaded into the host's memory, and computes
        after `shard`.
        """
        assert config.dtype != "auto", "the plan resolves auto"
        assert recompute in ("none", "layer", "micro-batch"), "the memory plan resolves auto"
        base = load_base(model, config.dtype, torch.device("cpu") if sharded else device)
        if reason := unsupported(base, config.max_length):
            raise UserError(f"model.path={config.path} {reason}; use another model")
        self.targets = targets(base, config)
        self.device = device
        self.config = config
        lora_config = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.lora_variant == "rslora",
            target_modules=list(self.targets),
            task_type="CAUSAL_LM",
        )
        lora_config._register_custom_module({torch.nn.Linear: _LoraLinear})
        self.peft_model: PeftModel = get_peft_model(base, lora_config)
        _share_inputs(self.peft_model, scale(config.lora_rank, config.lora_alpha, config.lora_variant))
        if recompute == "layer":
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.recompute = recompute
        self.dropout = True
        self._training_mode()
        self.trunk = base.get_decoder()
        projection = base.get_output_embeddings()
        self.base = base
        self.head: torch.nn.Module = projection  # the module whose weight is the head's
        self.vocab_size, self.hidden_size = projection.weight.shape
        self.head_bias_V = projection.bias
        self.softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
        self.head_backend = head_backend

    def shard(self, ranks: Ranks) -> None:
        """Spread the base over the ranks of this node; from then on every pass is one of all of them."""
        self.head = shard(self.base, ranks, self.device)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable weights, which are those of the adapter."""
        return [p for p in self.peft_model.parameters() if p.requires_grad]

    def forward(
        self, batch: StepBatch, demands: Demands, reference: ForwardOutput | None = None, *, seed: int = 0
    ) -> ForwardOutput:
        """One pass over the micro-batches, whose graph is kept: the token weights need all entropies of the step.

        `reference` is the reference pass, for the residual. The dropout of a micro-batch depends on `seed` and its
        position in the step alone: not on the rank that computes it, nor on what was computed before.
        """
        self.set_dropout(demands.dropout)
        outputs = []
        for micro_batch in batch.micro_batches:
            if demands.dropout and self.config.lora_dropout:
                torch.manual_seed(mixed(seed, micro_batch.index))
            outputs.append(self._forward(micro_batch, demands))
        output = self._join(outputs, demands)
        if not demands.residual:
            return output
        assert output.hidden_NH is not None and reference is not None and reference.hidden_NH is not None
        dtype = torch.promote_types(output.hidden_NH.dtype, torch.float32)
        residual_N = (output.hidden_NH.to(dtype) - reference.hidden_NH.to(dtype)).norm(dim=1)
        return ForwardOutput(output.stats, residual_N=residual_N)

    def reference_pass(self, batch: StepBatch, demands: Demands) -> ForwardOutput:
        """The same with the adapter off, without dropout and gradient."""
        plain = demands._replace(topk=None, entropy_gradient=False, entropy_at_one=False)
        with self.reference():
            return self._join([self._forward(micro_batch, plain) for micro_batch in batch.micro_batches], plain)

    def _join(self, outputs: Sequence[ForwardOutput], demands: Demands) -> ForwardOutput:
        if outputs:
            return join(outputs)
        dtype = torch.promote_types(self.base.dtype, torch.float32)
        return empty(demands, self.hidden_size, torch.empty(0, dtype=dtype, device=self.device))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """A context with the adapter off, without dropout and gradient."""
        with torch.no_grad(), self.peft_model.disable_adapter():
            yield

    def _forward(self, batch: MicroBatch, demands: Demands) -> ForwardOutput:
        """The trunk on a micro-batch, and the head at its N scored tokens."""
        hidden_NH = self.scored_states(batch)
        stats = self._head(
            hidden_NH,
            batch.target_N,
            temperature=demands.temperature,
            topk=demands.topk,
            entropy_gradient=demands.entropy_gradient,
            entropy_at_one=demands.entropy_at_one,
        )
        return ForwardOutput(stats, hidden_NH.detach() if demands.residual else None)

    def scored_states(self, batch: MicroBatch) -> Tensor:
        """[N, H]: the trunk's outputs that predict the scored tokens."""
        packing: dict[str, Any] = {
            "position_ids": batch.position_ids_L[None],
            "lengths": batch.lengths,
            "ends": batch.ends,
        }
        if self.recompute == "micro-batch" and torch.is_grad_enabled():
            return checkpoint(self._hidden, batch.token_ids_L, use_reentrant=False, **packing)[batch.predictor_N]
        return self._hidden(batch.token_ids_L, **packing)[batch.predictor_N]

    def set_dropout(self, dropout: bool) -> None:
        """Switch the dropout of the adapter's inputs; the base has none.

        The setting outlasts a pass, because activation checkpointing runs the forward pass again in the backward pass.
        """
        if dropout != self.dropout:
            self.dropout = dropout
            self._training_mode()

    def _training_mode(self) -> None:
        self.peft_model.train()
        for name, module in self.peft_model.named_modules():
            if isinstance(module, torch.nn.Dropout):
                module.train(self.dropout and "lora_dropout" in name)

    def _head(self, hidden_NH: Tensor, target_N: Tensor, **options: Any) -> HeadStats:
        with gathered(self.head) as weight_VH:
            return head_stats(
                hidden_NH.to(weight_VH.dtype),  # the last norm of some models returns float32
                weight_VH,
                target_N,
                bias_V=self.head_bias_V,
                softcap=self.softcap,
                backend=self.head_backend,
                **options,
            )

    def _hidden(self, token_ids_L: Tensor, **packing: Any) -> Tensor:
        """[L, H]: the trunk's output."""
        return self.trunk(input_ids=token_ids_L[None], use_cache=False, **packing).last_hidden_state[0]

    def logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """float32 [T - 1], nats: log-probabilities of tokens 1..T-1 at temperature 1, without dropout and gradient."""
        tokens_T = torch.from_numpy(token_ids.astype(np.int64)).to(self.device)
        self.peft_model.eval()
        with torch.no_grad():
            hidden_TH = self._hidden(tokens_T[:-1])
            logprobs = self._head(hidden_TH, tokens_T[1:]).logprob_N
        self._training_mode()
        return logprobs.float().cpu().numpy()

    def adapter(self, version: int, canary: Canary | None) -> Adapter:
        """A copy of the current weights as adapter version `version`."""
        return Adapter.of(
            get_peft_model_state_dict(self.peft_model),
            self.config.dtype,
            version=version,
            rank=self.config.lora_rank,
            alpha=self.config.lora_alpha,
            variant=self.config.lora_variant,
            target_modules=self.targets,
            canary=canary,
        )

    @contextmanager
    def probed(self, strength: float) -> Iterator[None]:
        """A context in which the adapter is a random one, the same in every call, with no module equal to zero.

        The entries of A have variance 1 / inputs, so that A x is about as large as x; those of B have the standard
        deviation `strength`.
        """
        kept = [parameter.detach().clone() for parameter in self.parameters()]
        generator = torch.Generator().manual_seed(0)
        try:
            with torch.no_grad():
                for name, parameter in self.peft_model.named_parameters():
                    if parameter.requires_grad:
                        size = strength if "lora_B" in name else parameter.shape[1] ** -0.5
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(self.parameters(), kept, strict=True):
                    parameter.copy_(before)

    def save(self, folder: Path) -> None:
        """Write the adapter in PEFT's own format: adapter_model.safetensors and adapter_config.json."""
        self.peft_model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Load the adapter that `save` wrote. Raises UserError for one of another model or rank."""
        path = folder / "adapter_model.safetensors"
        try:
            tensors = load_tensors(path)
            if _shapes(tensors) != _shapes(get_peft_model_state_dict(self.peft_model)):
                raise ValueError(f"{path.name} has other names or shapes than this model's adapter")
        except ValueError as error:
            raise UserError(f"the checkpoint cannot be loaded: {error}; use another one") from None
        set_peft_model_state_dict(self.peft_model, tensors)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
