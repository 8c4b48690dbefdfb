"""The loop with the real learner on a tiny model; actors and Ray are stood in for, to script what the loop meets."""

import math
import time
from dataclasses import replace
from itertools import pairwise

import local_actor
import numpy as np
import pytest
import tiny
from local_actor import Local

from actor.actor import Receipt
from actor.rollout import Sampling
from common.metrics import read_lines
from common.types import Prompt
from launch import loop
from launch.loop import train
from launch.planning.prompts import PromptStream
from launch.recording.console import Display
from launch.recording.recorder import Recorder
from launch.runtime.buffer import Buffer
from launch.runtime.channel import AdapterMismatch, Channel
from launch.runtime.fleet import Fleet
from launch.runtime.recovery import RunFailed
from launch.runtime.workers import Workers
from learner.learner import Learner

SAMPLING = Sampling(group_size=2, temperature=1.0, max_tokens=8, stop=(), seed=0)


class ScriptedActor:
    """Gives the rewards of a script, and holds whatever adapter it is given (or says so)."""

    def __init__(self, rewards):
        self.rewards = iter(rewards)
        self.version = 0
        self.lies = False

    def rollout(self, prompts, sampling):
        reward = next(self.rewards)
        group = tiny.group(prompts[0].index, [3, 5], [reward, None if reward is None else 0.0])
        return [replace(group, rollouts=tuple(replace(r, version=self.version) for r in group.rollouts))]

    def load(self, adapter):
        self.version = adapter.version
        canary = adapter.canary
        logprobs = canary and (canary.base_logprobs - 1 if self.lies else canary.logprobs)
        return Receipt(
            version=adapter.version,
            checksum=adapter.checksum,
            canary_logprobs=logprobs,
            load_seconds=0.0,
        )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that trains on scripted rewards; the recorded metrics are in tmp_path."""
    local_actor.install(monkeypatch)
    folder = tiny.save_model(tmp_path / "model")

    def run(rewards, lies=False, **changes):
        config = tiny.config(steps=len(rewards))
        changes = {"prompts_per_step": 1, "dir": tmp_path, "evaluate_every": 0, "sample_every": 1} | changes
        config = config.model_copy(update={"run": config.run.model_copy(update=changes)})
        learner = local_actor.crew(Local(Learner(folder, config, np.arange(8, dtype=np.int32))))
        actor = ScriptedActor(rewards)
        actor.lies = lies
        tokenizer = type("Tokenizer", (), {"decode": staticmethod(str)})
        recorder = Recorder(tmp_path, tokenizer, Display("test", steps=len(rewards)), config)
        stream = PromptStream([Prompt(messages=({"role": "user", "content": "?"},), answer="1")], seed=0)
        fleet = local_actor.fleet(Local(actor))
        buffer = Buffer(fleet, stream, SAMPLING, prompts_per_step=1, num_steps=len(rewards))
        channel = Channel(fleet, canary_bound_nats=0.1)
        workers = Workers(plan=None, learner=learner, fleet=fleet, channel=channel, losses=learner.losses, version=0)
        try:
            train(config, workers, buffer, recorder, eval_prompts={}, first_step=0)
        finally:
            recorder.close()

    return run


def test_every_step_is_recorded_and_fresh(run, tmp_path, capsys):
    run([1.0, 2.0, 3.0])
    metrics = read_lines(tmp_path / "metrics.jsonl")
    assert [m["adapter/version"] for m in metrics] == [1, 2, 3]
    assert [m["staleness/max"] for m in metrics] == [m["staleness/mean"] for m in metrics] == [0, 0, 0]
    assert "step 3/3 reward 1.50 ± 1.50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("every", "evaluated", "saved"), [(0, [], [3]), (1, [0, 1, 2, 3], [1, 2, 3]), (2, [0, 2, 3], [2, 3])]
)
def test_evaluations_and_checkpoints_come_when_they_are_due(run, tmp_path, monkeypatch, every, evaluated, saved):
    """The last step has both; an evaluation comes before the first step too; 0 evaluates never."""
    steps = []
    monkeypatch.setattr(loop, "evaluate", lambda actors, prompts, config, *, step: steps.append(step) or {"step": step})
    monkeypatch.setattr(Recorder, "evaluation", lambda self, record: None)
    run([1.0, 2.0, 3.0], evaluate_every=every, checkpoint_every=every)
    assert steps == evaluated
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [loop.position(folder) for folder in folders] == [(step, step) for step in saved]


def test_waiting_for_rollouts_and_for_prefetched_ones_are_two_times(run, tmp_path, monkeypatch):
    take = Buffer.take
    monkeypatch.setattr(Buffer, "take", lambda self, count: [time.sleep(0.1), take(self, count)][1])
    paused = Fleet.paused
    monkeypatch.setattr(Fleet, "paused", lambda self: [time.sleep(0.3), paused(self)][1])
    run([1.0])
    (metrics,) = read_lines(tmp_path / "metrics.jsonl")
    assert 0.1 <= metrics["time/wait_seconds"] < 0.3 <= metrics["time/ahead_seconds"]
    phases = sum(metrics[f"time/{phase}_seconds"] for phase in ("wait", "learn", "ahead", "publish", "commit"))
    assert phases == pytest.approx(metrics["time/step_seconds"])


def test_the_timeline_has_every_part_and_every_phase(run, tmp_path, monkeypatch):
    rollout = ScriptedActor.rollout
    monkeypatch.setattr(ScriptedActor, "rollout", lambda *args: [time.sleep(0.05), rollout(*args)][1])
    run([1.0, 2.0, 3.0])
    steps, metrics = (read_lines(tmp_path / f"{name}.jsonl") for name in ("timeline", "metrics"))
    for number, (step, measured) in enumerate(zip(steps, metrics, strict=True)):
        seconds = {
            span["work"]: pytest.approx(span["end_seconds"] - span["start_seconds"], abs=2e-4) for span in step["spans"]
        }
        assert set(seconds) == {"sample", "score", "learn", "publish", "load"}
        assert measured["time/step_seconds"] == pytest.approx(step["end_seconds"] - step["start_seconds"], abs=2e-4)
        assert measured["time/learn_seconds"] == seconds["learn"]
        assert measured["time/publish_seconds"] == seconds["publish"]  # this actor loads in no time
        (sampled,) = [span for span in step["spans"] if span["work"] == "sample"]
        assert (sampled["num_prompts"], sampled["version"]) == (1, number)
        busy = sum(  # of one device, whose sides take turns
            max(0.0, span["end_seconds"] - max(span["start_seconds"], step["start_seconds"]))
            for span in step["spans"]
            if span["work"] != "score"
        )
        idle = measured["idle/mean_fraction"] * measured["time/step_seconds"]
        assert idle == pytest.approx(measured["time/step_seconds"] - busy, abs=1e-3)
    assert all(earlier["end_seconds"] <= later["start_seconds"] for earlier, later in pairwise(steps))


def test_three_skipped_steps_in_a_row_end_the_run(run, tmp_path):
    with pytest.raises(RunFailed, match="3 steps in a row"):
        run([1.0, math.inf, math.inf, 1.0, math.inf, math.inf, math.inf, 1.0])
    metrics = read_lines(tmp_path / "metrics.jsonl")
    assert [m["update/skipped"] for m in metrics] == [0, 1, 1, 0, 1, 1, 1]


def test_three_steps_in_a_row_without_any_reward_end_the_run(run, tmp_path):
    """They train nothing: a run that goes on would look like one that has trained."""
    with pytest.raises(RunFailed, match="3 steps in a row trained nothing; stopped at step 5: every reward failed: it"):
        run([1.0, None, 1.0, None, None, None, 1.0][1:])
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 5


def test_an_evaluation_comes_before_the_next_rollouts_start(run, monkeypatch):
    """An actor takes one call after another: started rollouts would count as the evaluation's time."""
    order = []
    rollout = ScriptedActor.rollout
    monkeypatch.setattr(ScriptedActor, "rollout", lambda *args: [order.append("rollout"), rollout(*args)][1])
    monkeypatch.setattr(loop, "evaluate", lambda *args, step: order.append(step) or {"step": step})
    monkeypatch.setattr(Recorder, "evaluation", lambda self, record: None)
    run([1.0, 2.0, 3.0], evaluate_every=2)
    assert order == [0, "rollout", "rollout", 2, "rollout", 3]


def test_actor_with_another_adapter_ends_the_run(run):
    with pytest.raises(AdapterMismatch, match="version 1 is not what an actor samples with"):
        run([1.0, 2.0], lies=True)
