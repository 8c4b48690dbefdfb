"""What a cell takes of the cluster, and which processors of its machine."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.types import UserError
from launch.experiments import cell
from launch.experiments.cell import processors, share

ROOT = Path(__file__).resolve().parents[3]
ALL = sorted(os.sched_getaffinity(0))
TWO = pytest.mark.skipif(len(ALL) < 2, reason="needs two processors")


def node(**resources: float) -> dict:
    return {"Alive": True, "Resources": resources}


def test_a_cell_takes_a_gpu_or_a_whole_machine() -> None:
    assert share([node(CPU=2.0)], None) == {"num_cpus": 2}
    assert share([node(CPU=2.0), node(CPU=16.0)], None) == {"num_cpus": 16}
    assert share([node(CPU=2.0), node(CPU=16.0, GPU=4.0)], None) == {"num_gpus": 1, "num_cpus": 0}
    gone = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 1.0}}
    assert share([node(CPU=2.0), gone], None) == {"num_cpus": 2}


def test_or_as_many_cores_as_it_is_given() -> None:
    assert share([node(CPU=2.0), node(CPU=16.0)], 4) == {"num_cpus": 4}
    assert share([node(CPU=2.0)], 2) == {"num_cpus": 2}


@pytest.mark.parametrize("cores", [0, 3])
def test_cores_that_no_machine_has_are_refused(cores: int) -> None:
    with pytest.raises(UserError, match=f"--cores {cores} is not from 1 to 2"):
        share([node(CPU=1.0), node(CPU=2.0)], cores)


def test_cores_where_gpus_are_shared_out_are_refused() -> None:
    with pytest.raises(UserError, match="--cores 1: this cluster has GPUs"):
        share([node(CPU=16.0), node(CPU=2.0, GPU=1.0)], 1)


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Locks of our own: a grid may be at work on this machine."""
    for processor in ALL:
        (tmp_path / f"cpu{processor}").touch()
    monkeypatch.setattr(cell, "LOCK", str(tmp_path / "cpu{}"))
    return cell.LOCK


def test_the_kernel_has_a_folder_to_lock_for_each_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for processor in ALL:
        os.close(os.open(cell.LOCK.format(processor), os.O_RDONLY))


@TWO
def test_a_processor_is_held_by_one_cell_at_a_time() -> None:
    with processors(1) as one, processors(1) as other:
        assert len(one) == len(other) == 1
        assert one.keys() | other.keys() <= set(ALL) and one.keys() != other.keys()
    with processors(len(ALL)) as everything:
        assert list(everything) == ALL


def test_a_cell_that_finds_none_free_waits() -> None:
    got: list[float] = []

    def late() -> None:
        with processors(len(ALL)):
            got.append(time.monotonic())

    thread = threading.Thread(target=late)
    with processors(1):
        thread.start()
        time.sleep(0.3)
        assert not got
        freed = time.monotonic()
    thread.join(10)
    assert got and got[0] >= freed


# A cell in a process like Ray's worker; its run takes a second to end after SIGTERM.
WORKER = """
import os, sys
from pathlib import Path
from launch.experiments import cell
folder = Path(sys.argv[1])
cell.RUN, cell.LOCK = folder / "slow.py", sys.argv[2]
cell.run("", folder / "cell.log", folder, os.environ, int(sys.argv[3]))
"""
SLOW = """
import signal, sys, time
from pathlib import Path
def stop(*_):
    time.sleep(1)
    Path("ended").touch()
    sys.exit()
signal.signal(signal.SIGTERM, stop)
Path("began").touch()
time.sleep(600)
"""


@pytest.mark.timeout(120)
def test_a_killed_cell_frees_its_processors_once_its_run_has_ended(tmp_path: Path, locks: str) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    worker = subprocess.Popen([sys.executable, "-c", WORKER, tmp_path, locks, str(len(ALL))], cwd=ROOT)
    while not (tmp_path / "began").exists():
        assert worker.poll() is None
        time.sleep(0.1)
    threading.Timer(1.5, worker.kill).start()
    with processors(1):
        assert worker.poll() is not None
        assert (tmp_path / "ended").exists()


def test_more_processors_than_there_are_is_no_long_wait() -> None:
    with (
        pytest.raises(UserError, match=f"--cores {len(ALL) + 1} is more than the {len(ALL)}"),
        processors(len(ALL) + 1),
    ):
        pytest.fail("it cannot have them")


# Prints what it was given, and ends as its configuration says.
RUN = """
import os, signal, sys, tomllib
config = tomllib.load(open(sys.argv[2], "rb"))
print(sorted(os.sched_getaffinity(0)), os.getcwd(), os.environ["RAY_ADDRESS"], os.environ.get("HELD"))
print("(worker) a later line of another process")
if config["killed"]:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(config["status"])
"""


@pytest.mark.parametrize(
    ("config", "cores", "failure"),
    [
        ("killed = false\nstatus = 0", 1, None),
        ("killed = false\nstatus = 3", None, "status 3, "),
        ("killed = true", 1, "SIGKILL, "),
    ],
)
def test_a_run_gets_its_processors_and_its_failure_is_named(
    config: str, cores: int | None, failure: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.setattr(cell, "RUN", tmp_path / "run.py")
    log = tmp_path / "cell.log"
    result = cell.run(config, log, tmp_path, {**os.environ, "HELD": "yes", "PYTHONUNBUFFERED": "1"}, cores)
    line = f"{ALL[:cores]} {tmp_path} local yes"
    assert line in log.read_text().splitlines()
    assert result == (failure and failure + line)
