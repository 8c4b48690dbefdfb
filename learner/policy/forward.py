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
    hidden_states: bool = False  # the states that predict the scored tokens
    topk: int | None = None  # statistics of the K most likely tokens
    entropy_gradient: bool = False  # whether the entropies are differentiable
    dropout: bool = True


class ForwardOutput(NamedTuple):
    """The results of one pass at the N scored tokens."""

    stats: HeadStats
    hidden_NH: Tensor | None  # the hidden states that predict them, detached; None if not demanded


def join(outputs: Sequence[ForwardOutput]) -> ForwardOutput:
    """Join the outputs for consecutive parts of the scored tokens."""
    hidden = [output.hidden_NH for output in outputs if output.hidden_NH is not None]
    return ForwardOutput(concatenate([output.stats for output in outputs]), torch.cat(hidden) if hidden else None)
