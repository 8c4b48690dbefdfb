"""What a forward pass of the policy must compute, and what it returns."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from learner.head import HeadStats, concatenate


class Demands(NamedTuple):
    """What the forward passes of a step must compute."""

    temperature: float = 1.0  # of every log-probability
    reference: bool = False  # a second pass with the adapter off
    residual: bool = False  # how far the adapter moves the states that predict the scored tokens
    topk: int | None = None  # statistics of the K most likely tokens
    entropy_at_one: bool = True  # the entropy at temperature 1 too
    entropy_gradient: bool = False  # whether the entropies are differentiable
    dropout: bool = True


class ForwardOutput(NamedTuple):
    """The results of one pass at the N scored tokens."""

    stats: HeadStats
    hidden_NH: Tensor | None = None  # of a reference pass: the states that predict them, if the residual is demanded
    residual_N: Tensor | None = None  # l2 distance between these states and the reference's, if it is demanded


def join(outputs: Sequence[ForwardOutput]) -> ForwardOutput:
    """Join the outputs for consecutive parts of the scored tokens."""
    hidden = [output.hidden_NH for output in outputs if output.hidden_NH is not None]
    return ForwardOutput(concatenate([output.stats for output in outputs]), torch.cat(hidden) if hidden else None)


def empty(demands: Demands, hidden_size: int, like: Tensor) -> ForwardOutput:
    """The output of a pass over no token."""
    none_0, topk_0 = like.new_empty(0), None if demands.topk is None else like.new_empty(0)
    at_one_0 = none_0 if demands.entropy_at_one else None
    stats = HeadStats(
        logprob_N=none_0, entropy_N=none_0, entropy_at_one_N=at_one_0, topk_entropy_N=topk_0, topk_mass_N=topk_0
    )
    return ForwardOutput(stats, like.new_empty(0, hidden_size) if demands.residual else None)
