"""A grid with Ray, vLLM and a small random model, whose driver is killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest
from small_model import save_model

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
GRID = f"""
[run]
steps = {STEPS}
prompts_per_step = 1
checkpoint_every = 1
[task]
gym_options = {{ min_terms = 2, max_terms = 2 }}
num_train = 8
num_eval = 2
[actor]
group_size = 2
max_tokens = 8
[grid]
seeds = [4]
variants = [
    {{ name = "grpo-baseline_alpha-0", method = {{ name = "sa-ah-grpo", alpha = 0.0 }} }},
    {{ name = "holder", method = {{ name = "holder" }}, learner = {{ inner_updates = 2 }} }},
]
"""


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "launch/experiment.py", "--config", str(folder / "grid.toml")]
    command += ["--dir", str(folder / "cells"), "--model.path", str(folder / "model")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.timeout(1800)
def test_a_killed_grid_resumes_and_its_cells_are_ordinary_runs(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "grid.toml").write_text(GRID)
    first, second = (tmp_path / "cells" / name for name in ("grpo-baseline_alpha-0_seed-4", "holder_seed-4"))
    driver = start(tmp_path)
    deadline = time.monotonic() + 850
    while not (first / "checkpoints" / "step-000001").exists():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(driver.pid).children(recursive=True)
    assert sum("raylet" in process.name() for process in family) == 2  # one of the grid, one of the cell
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=100)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not second.exists()

    driver = start(tmp_path)
    output, _ = driver.communicate(timeout=850)
    assert driver.returncode == 0, output
    assert "2 of 2 cells are finished" in output
    assert (tmp_path / "cells" / f"{first.name}.log").read_text().count("starting vLLM") == 2
    for folder in (first, second):
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
        assert metrics[-1]["adapter/version"] == STEPS
        evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
        assert [record["step"] for record in evaluations] == [0, STEPS]
        written = tomllib.loads((folder / "config.toml").read_text())
        assert written["run"]["seed"] == 4
        assert written["learner"]["inner_updates"] == (2 if folder == second else 1)
        assert f"finished {STEPS} steps" in (tmp_path / "cells" / f"{folder.name}.log").read_text()
