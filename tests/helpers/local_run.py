"""launch/run.py within one process: the real plan, loop and learner on a tiny model; Ray and vLLM are stood in for."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import local_actor
import pytest
import tiny
import torch
from local_actor import Local
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from actor.actor import Receipt
from launch import run
from launch.planning import model_folder
from launch.planning.plan import Plan
from launch.runtime.channel import Channel
from launch.runtime.recovery import Losses
from learner.learner import Learner

CLOCKS = ("time/", "throughput/", "memory/", "idle/", "adapter/canary", "seconds")  # differ between equal runs

PARTS = 60  # of a reward, so that each line of a file is longer than a page of 4 KB


class Actor:
    """Samples tokens and rewards that follow from the prompt's index and the adapter's version."""

    def rollout(self, prompts, sampling):
        return [self.sampled(prompt) for prompt in prompts]

    def sampled(self, prompt):
        group = tiny.group(31 * prompt.index + self.version, [9, 30], [1.0 + prompt.index % 3, 0.0])
        parts = {f"part {'of a name that is long ' * 3}{i}": 0.1 * i for i in range(PARTS)}
        rollouts = (replace(r, version=self.version, score=replace(r.score, parts=parts)) for r in group.rollouts)
        return replace(group, prompt=prompt, rollouts=tuple(rollouts))

    def load(self, adapter):
        self.version = adapter.version
        return Receipt(
            version=adapter.version,
            checksum=adapter.checksum,
            canary_logprobs=adapter.canary and adapter.canary.logprobs,
            load_seconds=0.0,
        )

    def close(self):
        """Nothing: it is no process."""


@contextlib.contextmanager
def start(plan: Plan, *, losses: Losses | None = None) -> Iterator[SimpleNamespace]:
    """In the place of launch.runtime.workers.start."""
    crew = local_actor.crew(Local(Learner(plan.model_folder, plan.config, plan.canary_token_ids)))
    if plan.resume_from is not None:
        crew.load(plan.resume_from)
    fleet = local_actor.fleet(Local(Actor()))
    channel = Channel(fleet, canary_bound_nats=0.1)
    version = channel.publish(crew).version
    try:
        yield SimpleNamespace(
            plan=plan, learner=crew, fleet=fleet, channel=channel, losses=crew.losses, version=version
        )
    finally:
        fleet.close()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `launch.run.main` start no process."""
    local_actor.install(monkeypatch)
    monkeypatch.setattr(run.cluster, "connect", contextlib.nullcontext)
    monkeypatch.setattr(run.workers, "start", start)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)


def save_model(folder: Path) -> Path:
    """A Llama of one small layer, in float32, with SmolLM2's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder.smollm2())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(model: Path, folder: Path, *more: str) -> list[str]:
    """Four steps with a checkpoint and an evaluation after every second one."""
    return [
        *("--model.path", str(model), "--model.dtype", "float32", "--model.lora_rank", "2", "--task.num_train", "8"),
        *("--task.num_eval", "2", "--actor.max_tokens", "32", "--actor.group_size", "2", "--run.steps", "4"),
        *("--run.prompts_per_step", "2", "--run.checkpoint_every", "2", "--run.evaluate_every", "2"),
        *("--run.dir", str(folder), *more),
    ]


def comparable(record: dict) -> dict:
    """A record without what differs between equal runs."""
    return {name: value for name, value in record.items() if not name.startswith(CLOCKS)}
