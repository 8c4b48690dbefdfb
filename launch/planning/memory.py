"""The memory plan's parts: what one learner rank and one actor take of a GPU, before either starts.

The plan is for the longest step: every prompt is as long as the longest one, every completion has actor.max_tokens.
With cluster.layout = colocated a GPU holds both sides, with separate the one or the other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from actor.gpu_share import PREFILL_TOKENS, graph_sizes
from common.config import Config, ModelConfig
from launch.planning.synthetic import synthetic_groups
from learner.batch import pack
from learner.head.interface import GPU_WORKSPACE_BYTES
from learner.objective import demands
from learner.policy.activations import Activations
from learner.policy.base import targets

GIB = 2**30
KV_CACHE = "KV cache"
BLOCK_TOKENS = 16  # of vLLM's KV cache
ADAPTER_BYTES = 16  # per parameter: the weight, its gradient and AdamW's two moments, all float32
LOGIT_BYTES = 16  # per logit while vLLM samples: logits, log-probabilities, probabilities, noise, all float32
RESIDENT_FACTOR = 2  # vLLM's fused layers pad B with zeros (actor/vllm_worker.py): 1.5 times at Qwen2.5's shapes

# The constants below can only be measured on a GPU. They come from public reports; we have not measured them yet.
#
# A process's CUDA context, with the kernels that it has loaded, grows with the number of multiprocessors: .10 GiB with
# the 34 of an RTX 4060 Ti, .42 with the 142 of an RTX 6000 Ada, .54 with the 188 of an RTX PRO 6000 (llama.cpp#23604,
# unsloth-zoo#1053); an A100 has 108, an H100 132.
#
# The driver of a run has no context: it reads the GPU's properties alone, which creates none (reported in
# unsloth-zoo#1053 with torch 2.10 on CUDA 13). The process of launch/benchmark.py has one, since it measures the GPU's
# rates. The plan does not include it: it takes a quarter of the 2 GiB that SPARE_FRACTION leaves on 40 GiB.
CONTEXT_BYTES = GIB // 2

# vLLM captures each of gpu_share.graph_sizes as a full and as a piecewise CUDA graph, into one pool. Reports agree on
# about 24 MiB per graph (gpustack/runner#251: .36 GiB for 16; vllm#22897: 24 to 28 MiB each; vllm#50780: 24). The first
# graph takes the pool's base, which the others share (vllm/v1/worker/gpu/cudagraph_utils.py). With 256 sequences, 9
# sizes and 18 graphs, that is .81 GiB; vLLM's default of 51 sizes, 35 of them also full graphs, would be 2.9.
GRAPH_POOL_BYTES, GRAPH_BYTES = GIB // 4, GIB // 32
GRAPHS_PER_SIZE = 2

# The plan counts the bytes of tensors. This share of the GPU stays unplanned, for what the allocators of both sides
# lose to rounding and fragmentation. vLLM allocates nearly all of its memory once. The learner allocates other sizes
# for each micro-batch; in segments of fixed size it could lose a third of what it holds (torchtune#1185: 16.4 GiB, 10.8
# without). 5 % can be enough because its segments grow instead, by pages of 2 or 20 MiB
# (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, launch/runtime/workers.py).
SPARE_FRACTION = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Sizes of a model and of its adapter."""

    num_parameters: int  # tied weights count once
    num_adapter_parameters: int
    kv_elements: int  # keys and values of one token, over all layers
    kv_heads: int
    hidden: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, model: PreTrainedModel, config: ModelConfig) -> "Size":
        """The size of `model`, which may be on the meta device."""
        text, names = model.config.get_text_config(), targets(model, config)
        adapted = [
            module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in names
        ]
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            num_adapter_parameters=sum(config.lora_rank * (m.in_features + m.out_features) for m in adapted),
            kv_heads=heads,
            kv_elements=2 * text.num_hidden_layers * heads * head_size,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            vocab=text.vocab_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the plan needs besides the configuration."""

    size: Size
    longest_prompt_tokens: int
    ranks_beside: int = 1  # learner ranks of a node, over which learner.shard spreads the frozen weights
    activations: Callable[[tuple[int, ...], str], Activations]  # of a packed sequence's lengths and learner.recompute


class Part(NamedTuple):
    """One use of memory."""

    side: str  # "learner" or "actor"
    name: str
    num_bytes: int
    note: str = ""  # the setting that it depends on


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The parts of a resolved run, and the size of a GPU."""

    gpu_bytes: int
    separate: bool  # each side has GPUs of its own
    parts: tuple[Part, ...]

    @property
    def usable_bytes(self) -> int:
        return int(self.gpu_bytes * (1 - SPARE_FRACTION))

    def total(self, side: str | None = None) -> int:
        """Bytes of one side; without a name, of the fullest GPU."""
        if side is None:
            return (max if self.separate else sum)([self.total("learner"), self.total("actor")])
        return sum(part.num_bytes for part in self.parts if part.side == side)

    @property
    def learner_peak_bytes(self) -> int:
        """The prediction of the learner's memory/peak_bytes, which does not include the CUDA context."""
        return self.total("learner") - CONTEXT_BYTES

    def of(self, side: str, name: str) -> int:
        """Bytes of one part; 0 if there is none."""
        return sum(part.num_bytes for part in self.parts if (part.side, part.name) == (side, name))

    def table(self) -> str:
        """One line per part, in GiB."""
        rows = [(side, f"{name} ({note})" if note else name, size) for side, name, size, note in self.parts]
        rows += [(side, "together", self.total(side)) for side in ("learner", "actor")]
        rows += [("", "left free", self.gpu_bytes - self.total())]
        width = max(len(name) for _, name, _ in rows)
        lines = [f"{side:8} {name:{width}} {size / GIB:6.2f}" for side, name, size in rows]
        held = "a GPU for either side, each" if self.separate else "a GPU"
        return "\n".join([f"memory on {held} of {self.gpu_bytes / GIB:.2f} GiB", *lines])


def plan(config: Config, work: Work, gpu_bytes: int) -> Memory:
    """The parts of a run whose learner.recompute and learner.micro_batch_tokens are set."""
    parts = [*_learner(config, work), *_actor(config, work, gpu_bytes)]
    separate = config.cluster.layout == "separate"
    return Memory(gpu_bytes=gpu_bytes, separate=separate, parts=tuple(part for part in parts if part.num_bytes))


def _learner(config: Config, work: Work) -> list[Part]:
    side, step, size = "learner", step_activations(config, work), work.size
    shards = work.ranks_beside if config.learner.shard else 1
    layer = size.hidden * (4 * size.hidden + 3 * size.intermediate)
    gathered = size.vocab * size.hidden + 2 * layer if shards > 1 else 0  # the head, a layer at work and the next one
    return [
        Part(side, "frozen weights", size.num_parameters * _itemsize(config) // shards),
        Part(side, "gathered weights", gathered * _itemsize(config)),
        Part(side, "adapter, gradient, AdamW", work.size.num_adapter_parameters * ADAPTER_BYTES),
        Part(side, "activations of the step", step.kept, f"recompute {config.learner.recompute}"),
        Part(side, "one micro-batch at work", step.peak - step.kept, f"{config.learner.micro_batch_tokens} tokens"),
        Part(side, "head workspace", GPU_WORKSPACE_BYTES),
        Part(side, "CUDA context", CONTEXT_BYTES),
    ]


def _actor(config: Config, work: Work, gpu_bytes: int) -> list[Part]:
    side, actor, size, itemsize = "actor", config.actor, work.size, _itemsize(config)
    sequences = actor.num_sequences or concurrent_rollouts(config)
    graphs = GRAPHS_PER_SIZE * len(graph_sizes(sequences))
    tokens = max(PREFILL_TOKENS, sequences)
    sampling = tokens * (2 * size.hidden + 3 * size.intermediate) * itemsize + sequences * size.vocab * LOGIT_BYTES
    shards = actor.tensor_parallel  # each holds its share of weights, adapter and cache; the vocabulary's logits whole
    parts = [
        Part(side, "frozen weights", size.num_parameters * itemsize // shards),
        Part(side, "CUDA graphs", 0 if actor.eager else GRAPH_POOL_BYTES + graphs * GRAPH_BYTES, f"{graphs}"),
        Part(side, "CUDA context", CONTEXT_BYTES),
        Part(side, "workspace", sampling),
        Part(side, "adapter", size.num_adapter_parameters * itemsize * RESIDENT_FACTOR // shards),
    ]
    cache = kv_cache_bytes(config, work)
    if actor.kv_cache_gib is None and actor.gpu_memory_fraction is not None:  # the rest of its share
        cache = max(cache, int(gpu_bytes * actor.gpu_memory_fraction) - sum(part.num_bytes for part in parts))
    return [*parts, Part(side, KV_CACHE, cache, f"{sequences} sequences")]


def concurrent_rollouts(config: Config) -> int:
    """Rollouts that one actor samples in a step."""
    return math.ceil(config.run.prompts_per_step / config.actor.num_actors) * config.actor.group_size


def kv_cache_bytes(config: Config, work: Work) -> int:
    """Bytes as set, or those of `actor.num_sequences` sequences of the longest length, without prefix sharing.

    At least one sequence of model.max_length: vLLM does not start with less.
    """
    if config.actor.kv_cache_gib is not None:
        return round(config.actor.kv_cache_gib * GIB)
    sequences = config.actor.num_sequences or concurrent_rollouts(config)
    longest = math.ceil((work.longest_prompt_tokens + config.actor.max_tokens) / BLOCK_TOKENS)
    blocks = max(sequences * longest, math.ceil(config.model.max_length / BLOCK_TOKENS)) + 1  # vLLM's null block
    shards = min(config.actor.tensor_parallel, work.size.kv_heads)  # further ranks hold copies of a head
    return blocks * BLOCK_TOKENS * work.size.kv_elements // shards * _itemsize(config)


def step_activations(config: Config, work: Work) -> Activations:
    """The activations of the longest step's largest update, with what the head keeps."""
    assert config.learner.micro_batch_tokens is not None, "the caller has chosen it"
    update_tokens, max_tokens, sequence = _longest_update(
        config.run.prompts_per_step,
        config.actor.group_size,
        work.longest_prompt_tokens,
        config.actor.max_tokens,
        config.learner.micro_batch_tokens,
        config.learner.gradient_accumulation,
        config.learner.mini_batches,
    )
    one = work.activations(sequence, config.learner.recompute)
    kept = one.kept * update_tokens // sum(sequence) + _head_bytes(config, work)
    return Activations(kept=kept, peak=kept + (one.peak - one.kept) * max_tokens // sum(sequence))


def _head_bytes(config: Config, work: Work) -> int:
    """What the head keeps for N scored tokens: float32 gradients of an update; of a step, for some methods, hidden
    states [N, H]."""
    needed = demands(config)
    gradients = 1 + needed.entropy_gradient
    states = 2 if needed.residual else 0  # with the adapter and without
    prompts, group_size, parts = config.run.prompts_per_step, config.actor.group_size, config.learner.mini_batches
    rollouts = prompts * group_size
    # Of the largest mini-batch: whole groups, or a part of one.
    learned = (
        math.ceil(prompts / parts) * group_size if parts <= prompts else math.ceil(group_size / (parts // prompts))
    )
    elements = config.actor.max_tokens * work.size.hidden
    return elements * (learned * 4 * gradients + rollouts * _itemsize(config) * states)


@lru_cache
def _longest_update(
    num_prompts: int,
    group_size: int,
    prompt_tokens: int,
    completion_tokens: int,
    max_tokens: int,
    min_number: int,
    mini_batches: int,
) -> tuple[int, int, tuple[int, ...]]:
    """Tokens of the step's largest mini-batch and micro-batch, and the lengths of its first packed sequence."""
    [group] = synthetic_groups(
        1, group_size, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, vocab_size=1, seed=0
    )
    cpu = torch.device("cpu")
    batch = pack(
        [group] * num_prompts,
        max_tokens=max_tokens,
        min_micro_batches=min_number,
        device=cpu,
        mini_batches=mini_batches,
    )
    lengths = [len(micro_batch.token_ids_L) for micro_batch in batch.micro_batches]
    of_updates = [sum(lengths[each.micro_batches]) for each in batch.mini_batches]
    return max(of_updates), max(lengths), batch.micro_batches[0].lengths[0]


def _itemsize(config: Config) -> int:
    assert config.model.dtype != "auto", "the caller has resolved it"
    return 2 if config.model.dtype == "bfloat16" else 4
