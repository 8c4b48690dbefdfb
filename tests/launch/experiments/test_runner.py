"""A grid with real Ray and a pretended run: which cells run again, which resume, and what is left behind."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.exceptions import RayError, RayTaskError, WorkerCrashedError
from small_grid import GRID

from launch.experiments import runner
from launch.runtime import cluster

ROOT = Path(__file__).resolve().parents[3]
# Notes each start in starts.txt; ah-grpo fails early, sa-ah-grpo is killed in its second step when it has not resumed.
RUN = """
import json, os, signal, sys, time
from pathlib import Path
sys.path[0] = str(Path(__file__).resolve().parent.parent)
from common.command_line import load
from common.config import dump
from learner import checkpoint

signal.signal(signal.SIGTERM, lambda *_: sys.exit("closed in good order"))
config = load(sys.argv[1:], Path())
folder, name, resume = config.run.dir, config.method.name, config.run.resume
with open(folder.parent / "starts.txt", "a") as starts:
    processors = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    print(folder.name, "resumes" if resume else "starts", processors, gpu, file=starts)
deadline = time.monotonic() + 300
while len((folder.parent / "starts.txt").read_text().splitlines()) < int(os.environ.get("TOGETHER", 1)):
    assert time.monotonic() < deadline, "alone"
    time.sleep(0.1)
assert resume or not folder.exists(), "not emptied"
done = len(list(folder.glob("checkpoints/step-*")))
if not resume:
    folder.mkdir()
    planned = {"recompute": "none", "micro_batch_tokens": 4096}  # the memory plan has set them
    learner = config.learner.model_copy(update=planned)
    (folder / "config.toml").write_text(dump(config.model_copy(update={"learner": learner})))
if name == "ah-grpo" and "FIXED" not in os.environ:
    sys.exit("run failed: it is bad")
for step in range(done + 1, config.run.steps + 1):
    with open(folder / "metrics.jsonl", "a") as metrics:
        print(json.dumps({"step": step, "reward/mean": 1.5, "time/step_seconds": 0.1}), file=metrics)
    if name == "sa-ah-grpo" and step == 2 and not resume:
        os.kill(os.getpid(), signal.SIGKILL)
    with checkpoint.written_whole(folder / "checkpoints" / checkpoint.name(step)):
        pass
    time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
"""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """One in which no other Ray is seen, with an empty home."""
    folder = tempfile.mkdtemp(dir="/tmp")  # shorter than tmp_path: the paths of sockets are limited
    outer = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    cache = outer.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # where the model folder is
    yield {**outer, "RAY_TMPDIR": folder, "HOME": folder, "XDG_CACHE_HOME": cache}
    assert not list(Path(folder).glob("ray-*")), "a Ray left its folder behind"
    shutil.rmtree(folder)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """This repository with the pretended run, and the grid."""
    for package in ("common", "launch", "actor", "learner"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "launch" / "run.py").write_text(RUN)
    cell = tmp_path / "launch" / "experiments" / "cell.py"
    locks = cell.read_text().replace(
        "/sys/devices/system/cpu/", f"{tmp_path}/"
    )  # a grid may be at work on this machine
    cell.write_text(locks)
    for processor in os.sched_getaffinity(0):
        (tmp_path / f"cpu{processor}").touch()
    (tmp_path / "grid.toml").write_text(GRID)
    return tmp_path


def start(checkout: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "launch/experiment.py", "--config", "grid.toml", *options]
    return subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(checkout: Path, environment: dict[str, str]) -> tuple[int, str, str, list[str]]:
    """Status, stdout, stderr and the starts of one whole call."""
    starts = checkout / "runs" / "grid" / "starts.txt"
    starts.unlink(missing_ok=True)
    process = start(checkout, environment)
    out, err = process.communicate(timeout=600)
    noted = starts.read_text().splitlines() if starts.exists() else []
    return process.returncode, out, err, [line.rsplit(" ", 2)[0] for line in noted]


@pytest.mark.long
def test_only_what_is_not_finished_runs_again(checkout: Path, environment: dict[str, str]) -> None:
    status, out, err, starts = finish(checkout, environment)
    assert status == 1, err
    assert starts == ["good_seed-1 starts", "bad_seed-1 starts", "torn_seed-1 starts"]
    bad, torn = err.splitlines()[-2:]  # before them Ray may have its say
    assert bad == "bad_seed-1 failed: status 1, run failed: it is bad"
    assert torn.startswith("torn_seed-1 failed: SIGKILL, # 2")  # it printed nothing: the log's own line
    assert "good_seed-1: finished 3/3 1.50 -" in out
    assert out.splitlines()[-1] == "1 of 3 cells are finished; python launch/report.py runs/grid"
    (checkout / "runs" / "grid" / "bad_seed-1" / "rollouts.jsonl").write_text("of the run that died\n")
    status, out, err, starts = finish(checkout, {**environment, "FIXED": "1"})
    assert status == 0, err
    assert starts == ["bad_seed-1 starts", "torn_seed-1 resumes"]
    assert not (checkout / "runs" / "grid" / "bad_seed-1" / "rollouts.jsonl").exists()
    assert len(list((checkout / "runs" / "grid" / "torn_seed-1" / "checkpoints").iterdir())) == 3
    status, out, err, starts = finish(checkout, environment)
    assert (status, starts) == (0, [])
    assert out.splitlines()[-1] == "3 of 3 cells are finished; python launch/report.py runs/grid"


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [*(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGINT, signal.SIGKILL)), signal.SIGTERM]
)
def test_a_stopped_driver_leaves_no_process_and_a_grid_that_can_resume(
    number: signal.Signals, checkout: Path, environment: dict[str, str]
) -> None:
    process = start(checkout, {**environment, "STEP_SECONDS": "600"})
    folder = checkout / "runs" / "grid"
    deadline = time.monotonic() + 300
    while not (folder / "good_seed-1" / "checkpoints" / "step-000001").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("launch/run.py" in " ".join(p.cmdline()) for p in family)
    process.send_signal(number)
    _, err = process.communicate(timeout=200)
    _, alive = psutil.wait_procs(family, timeout=100)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    if number != signal.SIGKILL:
        assert "closed in good order" in (folder / "good_seed-1.log").read_text()
    if number == signal.SIGINT:
        assert err.splitlines()[-1] == "interrupted; the same command resumes the grid"
        _, _, _, starts = finish(checkout, environment)
        assert starts[0] == "good_seed-1 resumes"


@pytest.mark.slow
def test_cells_share_out_the_gpus_of_a_cluster(checkout: Path, environment: dict[str, str]) -> None:
    """A Ray configured with two GPUs: three cells, two of them concurrent, each with one GPU."""
    folder = Path(environment["RAY_TMPDIR"]) / "by-hand"
    folder.mkdir()
    head = subprocess.Popen(
        [*cluster._head_command(folder, "false"), "--num-gpus=2", "--num-cpus=1"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        record, deadline = folder / "ray_current_cluster", time.monotonic() + 200
        while not (record.exists() and record.read_text()):
            assert head.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        fixed = {**environment, "RAY_ADDRESS": record.read_text(), "FIXED": "1", "TOGETHER": "2"}
        process = start(checkout, fixed)
        out, err = process.communicate(timeout=600)
        assert "torn_seed-1 failed: SIGKILL" in err
        assert process.returncode == 1
        lines = (checkout / "runs" / "grid" / "starts.txt").read_text().split("\n")
        assert {line.split()[-1] for line in lines[:2]} == {"0", "1"}
        assert "good_seed-1: finished 3/3" in out  # the two first waited for each other
        assert "bad_seed-1: finished 3/3" in out
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(60)
        psutil.wait_procs(family, timeout=100)


@pytest.mark.long
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_cells_of_one_core_run_at_once_each_on_its_own(checkout: Path, environment: dict[str, str]) -> None:
    died = checkout / "runs" / "grid" / "good_seed-1"
    died.mkdir(parents=True)
    (died / "config.toml").write_text("")
    (died / "metrics.jsonl").write_text("of a run that died\n")
    process = start(checkout, environment, "--cores", "999")
    _, err = process.communicate(timeout=600)
    assert (process.returncode, err.splitlines()[-1][:18]) == (2, "--cores 999 is not")
    assert (died / "metrics.jsonl").exists()  # refused before anything is emptied
    process = start(checkout, {**environment, "FIXED": "1", "TOGETHER": "2"}, "--cores", "1")
    out, err = process.communicate(timeout=600)
    assert "good_seed-1: finished 3/3" in out, err  # the two first waited for each other
    assert "bad_seed-1: finished 3/3" in out
    lines = (checkout / "runs" / "grid" / "starts.txt").read_text().splitlines()
    one, other = (line.split()[-2] for line in lines[:2])
    assert one.isdigit() and other.isdigit() and one != other


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RayTaskError("f", "Traceback:\n  File x\nValueError: it is off\n", ValueError("it is off")),
            "ValueError: it is off",
        ),
        (WorkerCrashedError(), "The worker died unexpectedly"),
        (RayError(""), "RayError"),
    ],
)
def test_the_reason_of_a_task_that_ray_ended(error: RayError, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(_: object) -> None:
        raise error

    monkeypatch.setattr(runner.ray, "get", get)
    assert str(runner._reason_of(None)).startswith(f"Ray: {reason}")
