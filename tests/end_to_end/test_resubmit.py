"""A run whose Ray cluster dies is submitted again by `make run`, and has the numbers of one that was not broken."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from local_run import comparable
from small_model import save_model

from learner import checkpoint

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

HELPERS = Path(__file__).resolve().parents[1] / "helpers"


def submit(model: Path, folder: Path) -> subprocess.Popen[str]:
    options = [
        *("--model.path", str(model), "--model.dtype", "float32", "--task.name", "letters", "--task.num_train", "8"),
        *("--task.num_eval", "2", "--run.steps", "6", "--run.prompts_per_step", "2", "--run.evaluate_every", "0"),
        *("--run.checkpoint_every", "1", "--learner.learning_rate", "1e-3", "--actor.group_size", "2"),
        *("--actor.max_tokens", "8", "--run.dir", str(folder)),
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.runtime.submit", *options],
        env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(HELPERS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    return [comparable(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["gcs_server", "raylet", "launch/run.py"])
def test_a_run_goes_on_after_its_cluster_or_its_driver_died(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    save_model(model)
    whole = submit(model, tmp_path / "whole")
    assert whole.wait() == 0, whole.stdout and whole.stdout.read()
    broken = submit(model, tmp_path / "broken")
    while not list((tmp_path / "broken" / "checkpoints").glob(checkpoint.name(2))):
        assert broken.poll() is None, broken.stdout and broken.stdout.read()
        time.sleep(0.05)
    tree = psutil.Process(broken.pid).children(recursive=True)
    victim = next(process for process in tree if name in (process.name(), *process.cmdline()))
    victim.kill()
    printed, _ = broken.communicate()
    assert broken.returncode == 0, printed
    assert "the run has died; resuming it after step" in printed
    for ours, theirs in zip(metrics(tmp_path / "broken"), metrics(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=0, abs=0, nan_ok=True)
