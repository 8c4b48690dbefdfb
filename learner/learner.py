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
from common.types import Group, TokenStreams, UpdateResult
from learner import checkpoint, streams
from learner.batch import StepBatch, pack
from learner.head import HeadStats
from learner.loss import adapt_entropy_bonus
from learner.metrics import step_metrics
from learner.optimizer import Optimizer
from learner.policy.policy import Pass, Policy, join
from learner.selection import select
from learner.streams import Streams

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
        self.method = config.method.resolve()
        self.policy = Policy(
            model_folder,
            config.model,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            recompute=config.learner.recompute,
            head_backend=config.learner.head_backend,
            dropout=not self.method.needs_evaluation_mode,
        )
        self.optimizer = Optimizer(self.policy.parameters(), config.learner, steps=config.run.steps)
        self.canary_token_ids = canary_token_ids
        with self.policy.reference():
            self.canary_base_logprobs = self.policy.logprobs(canary_token_ids)
        self.step = 0
        self.entropy_bonus = self.method.entropy_bonus  # as adapted so far

    def update(self, groups: Sequence[Group]) -> UpdateResult:
        """One optimizer step: `learner.inner_updates` updates on the same groups.

        A step in which no group takes part changes nothing and is not refused.
        """
        step, self.step = self.step, self.step + 1
        selection = select(groups, self.method, max_tokens=self.config.actor.max_tokens)
        result: list[TokenStreams | None] = [None] * sum(len(group.rollouts) for group in groups)
        metrics = {"learner/rate": self.optimizer.rate(step), "groups/dropped": float(sum(selection.dropped.values()))}
        metrics |= {f"groups/dropped_{reason}": float(count) for reason, count in selection.dropped.items()}
        if not selection.groups:
            return UpdateResult(metrics=metrics, streams=tuple(result))

        batch = pack(
            selection.groups,
            max_tokens=self.micro_batch_tokens,
            min_micro_batches=self.config.learner.gradient_accumulation,
            device=self.policy.device,
        )
        reference = self._reference(batch)
        fixed: Streams | None = None
        for _ in range(self.config.learner.inner_updates):
            passed = self._forward(batch)
            if fixed is None:
                bonus, following_bonus = self._bonus_now_and_next(passed.stats)
                fixed = streams.fix(
                    passed,
                    batch,
                    selection,
                    self.method,
                    reference=reference,
                    vocab_size=self.policy.vocab_size,
                    max_tokens=self.config.actor.max_tokens,
                    entropy_bonus=bonus,
                    power=self._power(step),
                )
                metrics |= step_metrics(passed.stats, fixed, selection, batch, vocab_size=self.policy.vocab_size)
            loss, terms = streams.loss(passed.stats, fixed, batch, self.method)
            metrics |= terms
            metrics["gradient/norm"], refused = self.optimizer.step(loss, step)
            if refused:
                break

        assert fixed is not None
        if refused is None:
            self.entropy_bonus = following_bonus
        columns = zip(batch.split(fixed.entropy_N), batch.split(fixed.raw_weights_N), strict=True)
        for place, advantage, (entropies, weights) in zip(
            selection.place_B, selection.advantages_B.tolist(), columns, strict=True
        ):
            result[place] = TokenStreams(advantage=advantage, entropies=entropies, weights=weights)
        metrics["memory/peak_bytes"] = peak_bytes()
        return UpdateResult(metrics=metrics, streams=tuple(result), refused=refused)

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
        learner = {"step": self.step, "optimizer": self.optimizer.state_dict(), "entropy_bonus": self.entropy_bonus}
        checkpoint.save_state(folder, learner)

    def load(self, folder: Path) -> int:
        """All that `save` wrote; the next update is then the one that followed it. Returns the step."""
        self.policy.load(folder)
        learner = checkpoint.load_state(folder)
        self.step, self.entropy_bonus = learner["step"], learner["entropy_bonus"]
        self.optimizer.load_state_dict(learner["optimizer"])
        return self.step

    def _forward(self, batch: StepBatch) -> Pass:
        """One forward pass over the whole step, whose graph is kept: the weights need all its entropies."""
        return join(
            [
                self.policy.forward(
                    micro_batch,
                    temperature=self.config.actor.temperature,
                    topk=None if self.method.entropy == "exact" else self.method.entropy_topk,
                    entropy_gradient=self.method.weight_gradient or self.entropy_bonus > 0,
                    entropy_at_one=True,
                    keep_hidden=self.method.token_weight == "residual",
                )
                for micro_batch in batch.micro_batches
            ]
        )

    def _reference(self, batch: StepBatch) -> Pass | None:
        """The pass with the adapter off, if the method compares with it."""
        if not (self.method.has_kl or self.method.needs_evaluation_mode):
            return None
        with self.policy.reference():
            return join(
                [
                    self.policy.forward(
                        micro_batch,
                        temperature=self.config.actor.temperature,
                        keep_hidden=self.method.token_weight == "residual",
                    )
                    for micro_batch in batch.micro_batches
                ]
            )

    def _power(self, step: int) -> float:
        """p of the power-mean ratio at 0-based step: linear from the first to the last."""
        done = step / max(1, self.config.run.steps - 1)
        return self.method.power_start + done * (self.method.power_end - self.method.power_start)

    def _bonus_now_and_next(self, stats: HeadStats) -> tuple[float, float]:
        """The bonus of this step and of the next."""
        if self.method.entropy_target is None:
            return self.entropy_bonus, self.entropy_bonus
        return adapt_entropy_bonus(
            self.entropy_bonus,
            stats.entropy_N.mean().item(),
            target=self.method.entropy_target,
            step=self.method.entropy_bonus_step,
            maximum=self.method.entropy_bonus_max,
        )


def peak_bytes() -> float:
    """Most memory this process has held: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
