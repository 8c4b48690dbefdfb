"""The driver of a grid with real Ray and a run that only pretends: who runs again, who goes on, what is left behind."""

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

from launch import experiment
from launch.experiments import grid
from launch.planning import memory_fit
from launch.runtime import cluster

ROOT = Path(__file__).resolve().parents[3]
GRID = """
[run]
steps = 3
checkpoint_every = 1
[task]
gym_options = { min_terms = 2, max_terms = 2 }
num_train = 4
num_eval = 4
[grid]
seeds = [1]
variants = [
    { name = "good", method = { name = "grpo" } },
    { name = "bad", method = { name = "ah-grpo" } },
    { name = "torn", method = { name = "sa-ah-grpo" } },
]
"""
# Notes each start in starts.txt; ah-grpo fails early, sa-ah-grpo is killed in its second step when it has not resumed.
RUN = """
import json, os, signal, sys, time
from pathlib import Path
sys.path[0] = str(Path(__file__).resolve().parent.parent)
from common.command_line import load
from common.config import dump

signal.signal(signal.SIGTERM, lambda *_: sys.exit("closed in good order"))
config = load(sys.argv[1:], Path())
folder, name, resume = config.run.dir, config.method.name, config.run.resume
with open(folder.parent / "starts.txt", "a") as starts:
    processors = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    print(folder.name, "goes on" if resume else "starts", processors, gpu, file=starts)
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
if name == "ah-grpo" and "MEND" not in os.environ:
    sys.exit("run failed: it is bad")
for step in range(done + 1, config.run.steps + 1):
    with open(folder / "metrics.jsonl", "a") as metrics:
        print(json.dumps({"step": step, "reward/mean": 1.5, "time/step_seconds": 0.1}), file=metrics)
    if name == "sa-ah-grpo" and step == 2 and not resume:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
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
    process = (
        tmp_path / "launch" / "experiments" / "cell.py"
    )  # with names of its own: a grid may be at work on this machine
    process.write_text(process.read_text().replace("horizon-processor", tmp_path.name))
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
    assert torn.startswith("torn_seed-1 failed: SIGKILL, # 2")  # it said nothing: the log's own line
    assert "good_seed-1: finished 3/3 1.50 -" in out
    assert out.splitlines()[-1] == "1 of 3 cells are finished; python launch/report.py runs/grid"
    (checkout / "runs" / "grid" / "bad_seed-1" / "rollouts.jsonl").write_text("of the run that died\n")
    status, out, err, starts = finish(checkout, {**environment, "MEND": "1"})
    assert status == 0, err
    assert starts == ["bad_seed-1 starts", "torn_seed-1 goes on"]
    assert not (checkout / "runs" / "grid" / "bad_seed-1" / "rollouts.jsonl").exists()
    assert len(list((checkout / "runs" / "grid" / "torn_seed-1" / "checkpoints").iterdir())) == 3
    status, out, err, starts = finish(checkout, environment)
    assert (status, starts) == (0, [])
    assert out.splitlines()[-1] == "3 of 3 cells are finished; python launch/report.py runs/grid"


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [*(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGINT, signal.SIGKILL)), signal.SIGTERM]
)
def test_a_stopped_driver_leaves_no_process_and_everything_to_go_on(
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
        assert err.splitlines()[-1] == "interrupted; the same command continues"
        _, _, _, starts = finish(checkout, environment)
        assert starts[0] == "good_seed-1 goes on"


@pytest.mark.slow
def test_cells_share_out_the_gpus_of_a_cluster(checkout: Path, environment: dict[str, str]) -> None:
    """A Ray that believes in two GPUs: three cells, two at once, each told of one GPU."""
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
        mended = {**environment, "RAY_ADDRESS": record.read_text(), "MEND": "1", "TOGETHER": "2"}
        process = start(checkout, mended)
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
    process = start(checkout, {**environment, "MEND": "1", "TOGETHER": "2"}, "--cores", "1")
    out, err = process.communicate(timeout=600)
    assert "good_seed-1: finished 3/3" in out, err  # the two first waited for each other
    assert "bad_seed-1: finished 3/3" in out
    lines = (checkout / "runs" / "grid" / "starts.txt").read_text().splitlines()
    one, other = (line.split()[-2] for line in lines[:2])
    assert one.isdigit() and other.isdigit() and one != other


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the grid, in which no cell may start."""
    (tmp_path / "grid.toml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "run", lambda *_: pytest.fail("a cell would have been started"))
    return tmp_path


PLANNED = {"learner.recompute": "none", "learner.micro_batch_tokens": 4096}  # what the memory plan sets


def written(cell: grid.Cell, *checkpoints: int) -> Path:
    """The folder of a run that began, with checkpoints after these steps."""
    folder = cell.config.run.dir
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(experiment.dump(memory_fit.with_values(cell.config, PLANNED)))
    for step in checkpoints:
        (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    return folder


def test_a_dry_run_says_what_each_cell_will_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, torn = grid.cells(Path("grid.toml"), Path("runs/grid"))
    written(good, 1, 2, 3)
    written(bad)
    written(torn, 2)
    assert experiment.main(["--config", "grid.toml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["good_seed-1: finished", "bad_seed-1: start", "torn_seed-1: continue"]
    assert lines[-1] == "# 3 cells of 3 steps, 2 to run"
    assert (bad.config.run.dir / "config.toml").exists()  # a dry run deletes nothing


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "--config is missing; name a grid, such as launch/configs/grids/main_comparison.toml"),
        (["--config"], "argument --config: expected one argument; see --help"),
        (["--config", "grid.toml", "--cores", "0"], "--cores 0 is no number of processors; give 1 or more"),
        (["--config", "grid.toml", "--cores", "half"], "argument --cores: invalid int value: 'half'; see --help"),
        (["--config", "grid.toml", "--scale", "gpu"], "--scale gpu is not in grid.toml; leave it out"),
        (["--config", "grid.toml", "--run.stepps", "3"], "--run.stepps is no option; did you mean --run.steps?"),
        (["--config", "grid.toml", "--model.path", "/no/model"], "model.path=/no/model is no folder"),
        (["--config", "grid.toml", "--task.gym", "chain_summ"], "task.gym=chain_summ"),
        (["--config", "grid.toml", "--run.steps", "4"], "run.steps=4 differs from 3 of the run in runs/grid/good_seed"),
        (["--config", "grid.toml", "--dir", "other"], "run.dir=other/torn_seed-1 is not empty"),
    ],
)
def test_whatever_is_wrong_is_one_line_before_any_cell_starts(
    options: list[str], line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the one bad cell is finished (other steps), or the last (a folder that no run made)."""
    written(grid.cells(Path("grid.toml"), Path("runs/grid"))[0], 3)
    (here / "other" / "torn_seed-1").mkdir(parents=True)
    (here / "other" / "torn_seed-1" / "thesis.tex").write_text("mine")
    assert experiment.main(options) == 2
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1


def test_what_is_wrong_with_the_last_variant_alone_is_found_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "grid.toml").write_text(GRID.replace('"sa-ah-grpo" }', '"sa-ah-grpo" }, model = { lora_targets = ["w"] }'))
    assert experiment.main(["--config", "grid.toml"]) == 2
    assert capsys.readouterr().err.startswith("model.lora_targets: w is no linear module of the model")


def test_a_second_driver_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with experiment._alone_in(Path("runs/grid")):
        assert experiment.main(["--config", "grid.toml"]) == 2
    assert capsys.readouterr().err.startswith("--dir runs/grid is in use by another experiment")
