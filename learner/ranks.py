"""Learner ranks as a cut of the step: every rank packs the whole step, and computes its own micro-batches.

Two sums over the ranks make each of them see the whole: one of the per-token statistics, in which every rank fills in
its own tokens and leaves the others 0, and one of the adapter's gradient. Between them all ranks compute the same
targets and the same loss of the whole step, so that nothing else knows how many ranks there are. The one place that
uses torch.distributed.
"""

import socket
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from learner.batch import StepBatch
from learner.head import HeadStats
from learner.policy.forward import ForwardOutput

TIMEOUT_SECONDS = 1800.0  # of one sum: for the slowest rank to reach it


class PeerLost(RuntimeError):
    """A sum over the ranks failed: another rank is gone, or cannot be reached."""


class Ranks:
    """One of `world` ranks. Alone it leaves everything as it is."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self.sharded = False  # whether the ranks of a node make every pass together
        self._store: Any = None  # a TCPStore
        self._node: Any = None  # DeviceMesh of the ranks on this node
        self._group: dist.ProcessGroupGloo | None = None

    def open(self, address: str, port: int = 0) -> int:
        """Rank 0 opens the store where the ranks meet, on its own `address`; returns the port (0: a free one)."""
        # The store would listen on every address of the machine.
        listener = socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            *(address, listener.getsockname()[1], None, True),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return int(self._store.port)

    def join(self, own_address: str, address: str, port: int, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Meet the other ranks at the store of rank 0; returns when all of them are there.

        The group is not torch's default one: that stays unusable in a process once its set-up has failed.
        """
        timeout = timedelta(seconds=timeout_seconds)
        if self._store is None:
            self._store = dist.TCPStore(address, port, None, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address)]
        self._group = dist.ProcessGroupGloo(self._store, self.rank, self.world, options)
        self._store.set(f"address of {self.rank}", own_address)

    def shard(self, root: nn.Module, parts: Sequence[nn.Module], device: torch.device) -> None:
        """Spread the frozen weights of `root` over the ranks of this node (FSDP2); each of its `parts` is gathered when
        it computes. From then on all ranks must make equally many passes: `part` repeats micro-batches for it.
        """
        if self._node is None:
            addresses = [self._store.get(f"address of {rank}") for rank in range(self.world)]
            beside = [rank for rank in range(self.world) if addresses[rank] == addresses[self.rank]]
            store = dist.PrefixStore(f"node of {beside[0]}", self._store)  # type: ignore[attr-defined]
            dist.init_process_group(store=store, rank=beside.index(self.rank), world_size=len(beside))
            self._node = init_device_mesh(device.type, (len(beside),))
        for module in (*parts, root):
            trained = {parameter for parameter in module.parameters() if parameter.requires_grad}
            fully_shard(module, mesh=self._node, reshard_after_forward=True, ignored_params=trained)
        self.sharded = True

    def leave(self) -> None:
        """Drop the group, which frees the ranks that wait for this one in a sum."""
        self._group = None

    def part(self, batch: StepBatch) -> StepBatch:
        """The step with this rank's micro-batches alone: each, from the longest on, goes to the rank with the fewest
        tokens so far. With sharded weights a rank that has fewer of them than another one repeats the shortest, whose
        tokens `whole` leaves out."""
        if self.world == 1:
            return batch
        own = self._own(batch, self.rank)
        if self.sharded:
            most = max(len(self._own(batch, rank)) for rank in range(self.world))
            shortest = min(range(len(batch.micro_batches)), key=lambda i: len(batch.micro_batches[i].token_ids_L))
            own += [shortest] * (most - len(own))
        return replace(batch, micro_batches=tuple(batch.micro_batches[i] for i in own))

    def whole(self, output: ForwardOutput, batch: StepBatch) -> ForwardOutput:
        """The statistics of all tokens of the step, from the output for `part(batch)`; its tokens keep their graph.

        Each number is one rank's plus zeros: the sum is exact, and equal on all ranks.
        """
        if self.world == 1:
            return output
        columns = {f"stats.{f.name}": getattr(output.stats, f.name) for f in fields(HeadStats)}
        columns["residual_N"] = output.residual_N
        own = {name: column for name, column in columns.items() if column is not None}
        own_n = self._own_tokens(batch)
        matrix = output.stats.logprob_N.new_zeros(len(own), len(batch.rollout_N))
        for row, column in zip(matrix, own.values(), strict=True):
            row[own_n] = column.detach()[: len(own_n)]
        self._sum(matrix)
        whole: dict[str, Any] = dict.fromkeys(columns) | {
            name: with_graph(row, own_n, column) if column.requires_grad else row
            for (name, column), row in zip(own.items(), matrix, strict=True)
        }
        stats = HeadStats(**{f.name: whole[f"stats.{f.name}"] for f in fields(HeadStats)})
        return ForwardOutput(stats, output.hidden_NH, whole["residual_N"])

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients over the ranks; one that had no token has none, and adds 0."""
        if self.world == 1:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        self._sum(flat)
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def _own(self, batch: StepBatch, of: int) -> list[int]:
        """Indices of the micro-batches of rank `of`, the same division on every rank."""
        tokens = [len(micro_batch.token_ids_L) for micro_batch in batch.micro_batches]
        load, owner = [0] * self.world, [0] * len(tokens)
        for index in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
            owner[index] = min(range(self.world), key=load.__getitem__)
            load[owner[index]] += tokens[index]
        return [index for index, rank in enumerate(owner) if rank == of]

    def _own_tokens(self, batch: StepBatch) -> Tensor:
        """Numbers, 0..N-1, of the scored tokens of this rank's micro-batches."""
        ends = np.cumsum([0, *(len(micro_batch.target_N) for micro_batch in batch.micro_batches)])
        parts = [torch.arange(ends[i], ends[i + 1]) for i in self._own(batch, self.rank)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts]).to(batch.rollout_N.device)

    def _sum(self, values: Tensor) -> None:
        """Sum over the ranks, in place. A rank that fails drops its group, which frees those that wait for it."""
        if self._group is None:
            raise RuntimeError(f"rank {self.rank} of {self.world} is in no group; join() first")
        on_cpu = values.cpu()
        try:
            self._group.allreduce([on_cpu]).wait()  # type: ignore[attr-defined]
        except RuntimeError as error:
            self.leave()
            raise PeerLost(f"rank {self.rank}: {error}") from None
        values.copy_(on_cpu)


def with_graph(row_N: Tensor, own_n: Tensor, column: Tensor) -> Tensor:
    """The statistics of all tokens, of which the own ones keep the graph of `column`; what it has beyond them counts 0
    times, so that the backward pass runs through it, too."""
    own, repeated = column.tensor_split([len(own_n)])
    return row_N.index_put((own_n,), own) + (0 * repeated.sum() if len(repeated) else 0)
