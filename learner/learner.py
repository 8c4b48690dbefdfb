"""The learner: scored rollouts in, one new adapter version out. launch/runtime/workers.py makes a Ray actor of it."""

import os
import resource
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers

from common.adapter import PROBE_VERSION, Adapter, Canary
from common.config import Config
from common.types import Group, UpdateResult
from learner import checkpoint
from learner.batch import StepBatch, pack
from learner.metrics import per_rollout, step_metrics
from learner.objective import Objective, Targets
from learner.optimizer import Optimizer
from learner.policy.forward import Demands, ForwardOutput
from learner.policy.policy import Policy, mixed
from learner.ranks import Ranks
from learner.selection import select

PROBE_STRENGTH = 0.01  # the first one tried
PROBE_NATS = 2.0  # far above rounding: SmolLM2 in bfloat16 has 0.14 nats of noise where an adapter moves it by 5.1
PROBE_GAIN = 1.1  # stops the search on a model of random weights, which no adapter moves by PROBE_NATS


class Learner:
    """One policy, its optimizer, and the number of optimizer steps taken."""

    def __init__(
        self, model_folder: Path, config: Config, canary_token_ids: np.ndarray, *, ranks: Ranks | None = None
    ) -> None:
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # because Ray sets it to 1
        torch.manual_seed(config.run.seed)
        assert config.learner.micro_batch_tokens is not None, "the memory plan sets it"
        self.config = config
        self.micro_batch_tokens = config.learner.micro_batch_tokens
        self.policy = Policy(
            model_folder,
            config.model,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            recompute=config.learner.recompute,
            head_backend=config.learner.head_backend,
            sharded=config.learner.shard,
        )
        self.objective = Objective(config, self.policy.vocab_size)
        self.ranks = ranks or Ranks()
        self.optimizer = Optimizer(self.policy.parameters(), config.learner, steps=config.run.steps, ranks=self.ranks)
        self.canary_token_ids = canary_token_ids
        self.step = 0

    def meet(self, own_address: str, address: str, port: int) -> None:
        """Join the other ranks at the store of rank 0, and spread the base over those of this node if it is to be."""
        self.ranks.join(own_address, address, port)
        if self.config.learner.shard:
            self.policy.shard(self.ranks)

    @cached_property
    def canary_base_logprobs(self) -> np.ndarray:
        """The canary's log-probabilities without the adapter."""
        with self.policy.reference():
            return self.policy.logprobs(self.canary_token_ids)

    def update(self, groups: Sequence[Group]) -> UpdateResult:
        """One step: `learner.inner_updates` updates on each of `learner.mini_batches` parts of the same groups.

        Where every group is excluded, nothing changes, and the result does not count as a skipped step.
        """
        with ExitStack() as stack:
            stack.callback(self.ranks.leave)  # the others would wait for a rank that raises
            result = self._update(groups)
            stack.pop_all()
        return result

    def _update(self, groups: Sequence[Group]) -> UpdateResult:
        step, self.step = self.step, self.step + 1
        selection = select(
            groups,
            self.objective.method,
            max_tokens=self.config.actor.max_tokens,
            rewards=self.config.task.rewards,
        )
        metrics = {"learner/rate": self.optimizer.rate(step)} | selection.metrics()
        num_rollouts = sum(len(group.rollouts) for group in groups)
        if not selection.groups:
            return UpdateResult(metrics=metrics, tokens=(None,) * num_rollouts)

        policy, objective, config = self.policy, self.objective, self.config.learner
        batch = pack(
            selection.groups,
            max_tokens=self.micro_batch_tokens,
            min_micro_batches=config.gradient_accumulation,
            device=policy.device,
            mini_batches=config.mini_batches,
        )
        own, demands = self.ranks.part(batch), objective.demands
        own_reference = policy.reference_pass(own, demands) if demands.reference else None
        reference = self.ranks.whole(own_reference, batch) if own_reference else None
        at_once = config.mini_batches == 1  # the first update can use the graph of this pass
        with torch.set_grad_enabled(at_once):
            output = self._forward(batch, demands, step, reference=own_reference)
        targets = objective.targets(output, reference, batch, selection, step)
        metrics |= step_metrics(output.stats, targets, selection, batch, vocab_size=policy.vocab_size)
        terms, skipped = self._updates(batch, targets, step, first=output if at_once else None)
        metrics |= terms | {"memory/peak_bytes": peak_bytes()}
        tokens = per_rollout(targets, selection, batch, num_rollouts)
        return UpdateResult(metrics=metrics, tokens=tokens, skipped=skipped)

    def _updates(
        self, batch: StepBatch, targets: Targets, step: int, *, first: ForwardOutput | None
    ) -> tuple[dict[str, float], str | None]:
        """The inner updates on each mini-batch, from `first` on, the pass that made the targets, if its graph is kept.

        Returns the means of the terms of the loss over the last update of each mini-batch, and why an update was
        skipped, which ends the step.
        """
        demands = self.objective.demands._replace(residual=False, topk=None, entropy_at_one=False)
        terms: deque[dict[str, float]] = deque(maxlen=len(batch.mini_batches))
        skipped = None
        for number, (inner, slices) in enumerate(product(range(self.config.learner.inner_updates), batch.mini_batches)):
            part = batch.part(slices)
            output = first if first and not number else self._forward(part, demands, step, inner)
            loss, of_loss = self.objective.loss(output, targets.part(slices.tokens), part)
            norm, skipped = self.optimizer.step(loss, step)
            terms.append(of_loss | {"gradient/norm": norm})
            if skipped:
                skipped += f" in update {number + 1} of the step; those before it were made" if number else ""
                break
        else:
            self.objective.entropy_bonus = targets.next_entropy_bonus
        return {name: sum(each[name] for each in terms) / len(terms) for name in terms[-1]}, skipped

    def _forward(
        self, batch: StepBatch, demands: Demands, step: int, inner: int = 0, reference: ForwardOutput | None = None
    ) -> ForwardOutput:
        """A pass over the batch by all ranks. Its dropout is that of the inner update, equal in every mini-batch's."""
        seed = mixed(self.config.run.seed, step, inner)
        return self.ranks.whole(self.policy.forward(self.ranks.part(batch), demands, reference, seed=seed), batch)

    def adapter(self, canary: bool = True) -> Adapter:
        """A copy of the current weights, whose version is the number of steps taken; with a canary on request."""
        return self.policy.adapter(self.step, self._canary() if canary else None)

    def _canary(self) -> Canary:
        started = time.perf_counter()
        logprobs = self.policy.logprobs(self.canary_token_ids)
        return Canary(
            token_ids=self.canary_token_ids,
            logprobs=logprobs,
            base_logprobs=self.canary_base_logprobs,
            seconds=time.perf_counter() - started,
        )

    def checksum(self, canary: bool = False) -> str:
        """Of the current weights as they are published. With a sharded base every rank makes the canary's passes."""
        return self.adapter(canary and self.ranks.sharded).checksum

    def probe(self) -> Adapter:
        """A strong random adapter, version PROBE_VERSION, that shows whether an actor computes what the learner does.

        Its strength is doubled until it moves the canary's log-probabilities by PROBE_NATS on average, or until a
        doubling moves them by less than PROBE_GAIN times as much. The learner's own weights stay unchanged.
        """
        strength, moved = PROBE_STRENGTH, 0.0
        while True:
            with self.policy.probed(strength):
                canary = self._canary()
                adapter = self.policy.adapter(PROBE_VERSION, canary)
            before, moved = moved, np.abs(canary.logprobs - canary.base_logprobs).mean()
            if not PROBE_GAIN * before < moved < PROBE_NATS:
                return adapter
            strength *= 2

    def save(self, folder: Path) -> None:
        """Write adapter, optimizer, step and entropy bonus into the existing `folder`."""
        self.policy.save(folder)
        learner = {"step": self.step, "optimizer": self.optimizer.state_dict()}
        checkpoint.save_state(folder, learner | {"entropy_bonus": self.objective.entropy_bonus})

    def load(self, folder: Path) -> int:
        """Restore all that `save` wrote, so that training resumes exactly. Returns the step."""
        self.policy.load(folder)
        learner = checkpoint.load_state(folder)
        self.step, self.objective.entropy_bonus = learner["step"], learner["entropy_bonus"]
        self.optimizer.load_state_dict(learner["optimizer"])
        return self.step

    def files(self) -> dict[str, np.ndarray]:
        """What `save` writes, as bytes by file name: the caller's machine may not share a disk with this one."""
        with TemporaryDirectory() as folder:
            self.save(Path(folder))
            return {path.name: np.fromfile(path, np.uint8) for path in Path(folder).iterdir()}

    def load_files(self, files: Mapping[str, np.ndarray]) -> int:
        """`load` of files that the caller has read."""
        with TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content.data)
            return self.load(Path(folder))


def peak_bytes() -> float:
    """The most memory that this process has held: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
