"""The GPUs that a run is planned for: this machine's, or those of a Ray cluster (launch/runtime/nodes.py).

Reading a GPU's properties creates no CUDA context in the process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Gpu:
    """What the plan needs to know of a GPU."""

    name: str
    capability: tuple[int, int]  # (8, 0) for sm_80
    total_bytes: int
    beside: int = 1  # GPUs of its machine


def here() -> tuple[Gpu, ...]:
    """The GPUs of this machine that torch can use."""
    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(
        Gpu(name=p.name, capability=(p.major, p.minor), total_bytes=p.total_memory, beside=len(found)) for p in found
    )


def weakest(gpus: Sequence[Gpu]) -> Gpu | None:
    """The one with the lowest capability; None if there is none."""
    return min(gpus, key=lambda gpu: gpu.capability, default=None)
