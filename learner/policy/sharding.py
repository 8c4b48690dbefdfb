"""learner.shard: the frozen weights are spread over the ranks of a node, for a base that one GPU cannot hold.

Each decoder layer is gathered before it computes, in the forward and in the backward pass, and given up after it; so is
the head, whose backward pass needs no weight (learner/head). The adapter stays whole on every rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from learner.ranks import Ranks


def shard(base: Any, ranks: Ranks, device: torch.device) -> torch.nn.Module:
    """Spread the weights of a causal language model; returns the module whose weight is the head's.

    Tied embeddings are one weight: the head's module loses its own reference to it.
    """
    trunk, embedding, head = base.get_decoder(), base.get_input_embeddings(), base.get_output_embeddings()
    tied = head.weight is embedding.weight
    if tied:
        head.weight = None
    ranks.shard(trunk, [embedding, *trunk.layers], device)
    if not tied:
        ranks.shard(head, [], device)
    base.to(device)  # the adapter and the buffers
    return embedding if tied else head


@contextmanager
def gathered(module: Any) -> Iterator[Tensor]:
    """The whole weight of a module that may be sharded."""
    sharded = hasattr(module, "unshard")
    if sharded:
        module.unshard()
    yield module.weight
    if sharded:
        module.reshard()
