"""Whole runs with vLLM, SmolLM2 and Ray: the files of a run, exact resume, no process left behind."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from launch.planning import model_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
OPTIONS = [
    *("--run.steps", str(STEPS), "--run.checkpoint_every", "2", "--run.evaluate_every", "2"),
    *("--task.num_eval", "4", "--actor.max_tokens", "24", "--run.prompts_per_step", "2", "--run.sample_every", "2"),
    *("--model.lora_dropout", "0.05", "--evaluation.num_samples", "2"),
]
METRICS = [
    "reward/mean",
    "reward/std",
    "reward/correct_fraction",
    "kl/mean",
    "entropy/normalized_mean",
    "weight/mean",
    "weight/negative_mean",
    "advantage/negative_fraction",
    "completion/length_mean",
    "actor_learner_kl",
    "staleness/mean",
    "staleness/max",
    "adapter/version",
    "time/rollout_seconds",
    "time/reward_seconds",
    "time/learn_seconds",
    "time/publish_seconds",
    "time/step_seconds",
    "throughput/tokens_per_second",
    "idle/learner_fraction",
    "idle/actor_fraction",
    "idle/mean_fraction",
    "memory/peak_bytes",
]


def start(folder: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "launch/run.py", *OPTIONS, "--run.dir", str(folder), *options]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def records(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def comparable(record: dict) -> dict:
    """Without what differs between equal runs: times, memory, and how many canaries there was time for."""
    clocks = ("time/", "throughput/", "memory/", "idle/", "adapter/canary")
    return {k: v for k, v in record.items() if not k.startswith(clocks) and k != "seconds"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = start(folder)
    output, _ = process.communicate(timeout=850)
    assert process.returncode == 0, output
    return folder, output


def test_run_folder(finished):
    folder, output = finished
    metrics = records(folder, "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    for step in metrics:
        assert all(isinstance(step[name], float) and math.isfinite(step[name]) for name in METRICS)
        assert step["adapter/version"] == step["step"]
        assert step["staleness/max"] == 0
        assert step["actor_learner_kl"] < 0.05  # actor and learner hold the same policy
    assert metrics[0]["kl/mean"] < 1e-6 < metrics[-1]["kl/mean"]  # the adapter starts as zero and is trained
    rollouts = records(folder, "rollouts.jsonl")
    assert len(rollouts) == STEPS * 2 * 4
    assert {r["version"] for r in rollouts} == set(range(STEPS))
    for rollout in rollouts:
        assert len(rollout["tokens"]) == len(rollout["entropies"]) == len(rollout["weights"])
        assert rollout["reward"] == pytest.approx(sum(rollout["parts"].values()))
        if rollout["advantage"] >= 0:
            assert set(rollout["weights"]) == {1.0}  # SA-AH-GRPO discounts negative advantages alone
        elif len(rollout["weights"]) > 1:
            assert rollout["weights"][-1] < rollout["weights"][0] <= 1
    assert {r["finish_reason"] for r in rollouts} <= {"stop", "length"}
    evaluations = records(folder, "evaluations.jsonl")
    assert [e["step"] for e in evaluations] == [0, 2, 4]
    assert all(e["num_problems"] == 4 and e["k"] == 2 for e in evaluations)
    assert list((folder / "tensorboard").iterdir())
    assert f"step {STEPS}/{STEPS} reward" in output
    assert "sample of step 2" in output
    assert f"finished {STEPS} steps" in output


def test_checkpoint_is_pefts_own_format(finished):
    folder, _ = finished
    base = AutoModelForCausalLM.from_pretrained(model_folder.smollm2(), dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, folder / "checkpoints" / "step-000004")
    tokens = torch.arange(100, 120)[None]
    with torch.no_grad():
        adapted = model(tokens).logits
        with model.disable_adapter():
            assert not torch.equal(adapted, model(tokens).logits)


@pytest.mark.long
def test_the_evaluation_command_equals_the_runs_own_evaluation(finished):
    folder, _ = finished
    checkpoint = folder / "checkpoints" / "step-000002"
    command = [sys.executable, "launch/evaluate.py", str(checkpoint)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    expected = next(e for e in records(folder, "evaluations.jsonl") if e["step"] == 2)
    assert comparable(got) == comparable(expected)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_killed_run_leaves_no_process_and_resumes_exactly(finished, tmp_path):
    """kill -9 of the driver once the checkpoint of step 2 exists; the resumed run must equal the uninterrupted one."""
    whole, _ = finished
    folder = tmp_path / "killed"
    process = start(folder)
    deadline = time.monotonic() + 850
    while not (folder / "checkpoints" / "step-000002").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in p.name() for p in family)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=100)
    assert not alive
    resumed = start(folder, "--run.resume")
    output, _ = resumed.communicate(timeout=850)
    assert resumed.returncode == 0, output
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
        expected, got = ([comparable(r) for r in records(run, name)] for run in (whole, folder))
        assert got == expected, f"{name} differs after resuming"
    timeline = records(folder, "timeline.jsonl")
    assert [record["step"] for record in timeline] == list(range(1, STEPS + 1))
    moments = [moment for record in timeline for moment in (record["start_seconds"], record["end_seconds"])]
    assert moments == sorted(moments)


@pytest.mark.long
def test_an_interrupted_run_ends_cleanly(tmp_path):
    """Ctrl-C while vLLM starts: status 130, one line, no process left."""
    process = start(tmp_path / "interrupted")
    deadline = time.monotonic() + 400
    while not any("raylet" in p.name() for p in psutil.Process(process.pid).children(recursive=True)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(5)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130, output
    assert "interrupted; resume it with --run.resume" in output
    _, alive = psutil.wait_procs(family, timeout=100)
    assert not alive
