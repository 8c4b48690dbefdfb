"""The learner: scored rollouts in, one new adapter version out. launch/runtime/workers.py makes a Ray actor of it."""

import os
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from common.adapter import PROBE_VERSION, Adapter, Canary
from common.config import Config
from common.types import Group, UpdateResult
from learner import checkpoint
from learner.batch import pack
from learner.metrics import per_rollout, step_metrics
from learner.objective import Objective
from learner.optimizer import Optimizer
from learner.policy.policy import Policy
from learner.selection import select

PROBE_STRENGTH, PROBE_NATS = 0.01, 2.0  # bfloat16 on SmolLM2: noise of .14 nats where 5.1 are moved
PROBE_GAIN = 1.1  # a model of random weights predicts nearly uniformly: no adapter moves it by PROBE_NATS


class Learner:
    """One policy, its optimizer and the number of steps behind them."""

    def __init__(self, model_folder: Path, config: Config, canary_token_ids: np.ndarray) -> None:
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # Ray gives an actor one thread
        torch.manual_seed(config.run.seed)
        assert config.learner.micro_batch_tokens is not None, "the memory plan has set it"
        self.config = config
        self.micro_batch_tokens = config.learner.micro_batch_tokens
        self.policy = Policy(
            model_folder,
            config.model,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            recompute=config.learner.recompute,
            head_backend=config.learner.head_backend,
        )
        self.objective = Objective(config, self.policy.vocab_size)
        self.optimizer = Optimizer(self.policy.parameters(), config.learner, steps=config.run.steps)
        self.canary_token_ids = canary_token_ids
        with self.policy.reference():
            self.canary_base_logprobs = self.policy.logprobs(canary_token_ids)
        self.step = 0

    def update(self, groups: Sequence[Group]) -> UpdateResult:
        """One optimizer step: `learner.inner_updates` updates on the same groups.

        A step of which every group is excluded changes nothing, and is not a skipped one.
        """
        step, self.step = self.step, self.step + 1
        selection = select(groups, self.objective.method, max_tokens=self.config.actor.max_tokens)
        metrics = {"learner/rate": self.optimizer.rate(step)} | selection.metrics()
        num_rollouts = sum(len(group.rollouts) for group in groups)
        if not selection.groups:
            return UpdateResult(metrics=metrics, tokens=(None,) * num_rollouts)

        policy, objective = self.policy, self.objective
        batch = pack(
            selection.groups,
            max_tokens=self.micro_batch_tokens,
            min_micro_batches=self.config.learner.gradient_accumulation,
            device=policy.device,
        )
        reference = policy.reference_pass(batch, objective.demands) if objective.demands.reference else None
        output = policy.forward(batch, objective.demands)
        targets = objective.targets(output, reference, batch, selection, step)
        metrics |= step_metrics(output.stats, targets, selection, batch, vocab_size=policy.vocab_size)
        for number in range(self.config.learner.inner_updates):
            if number:
                output = policy.forward(batch, objective.demands)
            loss, terms = objective.loss(output, targets, batch)
            metrics |= terms
            metrics["gradient/norm"], skipped = self.optimizer.step(loss, step)
            if skipped:
                break
        else:
            objective.entropy_bonus = targets.next_entropy_bonus
        metrics["memory/peak_bytes"] = peak_bytes()
        tokens = per_rollout(targets, selection, batch, num_rollouts)
        return UpdateResult(metrics=metrics, tokens=tokens, skipped=skipped)

    def adapter(self, canary: bool = True) -> Adapter:
        """The current weights as version number of steps taken; with a canary, if it is asked for."""
        return self.policy.adapter(self.step, self._canary() if canary else None)

    def _canary(self) -> Canary:
        return self.policy.canary(self.canary_token_ids, self.canary_base_logprobs)

    def probe(self) -> Adapter:
        """A strong random adapter under the number PROBE_VERSION, to find out whether an actor computes as we do.

        It is doubled until it moves the canary by PROBE_NATS in the mean, or by no more than PROBE_GAIN times what the
        last one did. The learner's own weights stay.
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
        """Adapter, optimizer, step and random state into the existing `folder`."""
        self.policy.save(folder)
        learner = {"step": self.step, "optimizer": self.optimizer.state_dict()}
        checkpoint.save_state(folder, learner | {"entropy_bonus": self.objective.entropy_bonus})

    def load(self, folder: Path) -> int:
        """All that `save` wrote; the next update is then the one that followed it. Returns the step."""
        self.policy.load(folder)
        learner = checkpoint.load_state(folder)
        self.step, self.objective.entropy_bonus = learner["step"], learner["entropy_bonus"]
        self.optimizer.load_state_dict(learner["optimizer"])
        return self.step


def peak_bytes() -> float:
    """Most memory this process has held: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
