"""Ray as a run starts and leaves it."""

import contextlib
import json
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

from launch.runtime import cluster

ROOT = Path(__file__).resolve().parents[3]

DRIVER = """
import subprocess, time
import ray
from launch.runtime.cluster import connect

@ray.remote(num_cpus=0)
class Actor:
    def start_engine(self):
        subprocess.Popen(["sleep", "600"], start_new_session=True)

with connect():
    actor = Actor.remote()
    ray.get(actor.start_engine.remote())
    print("ready", flush=True)
    time.sleep(600)
"""

PATHS = """
import ray
from launch.runtime.cluster import connect

@ray.remote(num_cpus=0)
def of_modules():
    import learner
    import mine
    return [*learner.__path__, mine.__file__]

with connect():
    print(*ray.get(of_modules.remote()))
"""

CONNECTED = """
from launch.runtime.cluster import connect

with connect():
    print("connected", flush=True)
"""

JOB = """
import sys
if "--dry-run" not in sys.argv:
    print("arguments", sys.argv[1:])
    sys.exit(7)
"""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """One in which no other Ray is seen, with an empty home."""
    folder = tempfile.mkdtemp(dir="/tmp")  # shorter than tmp_path: the paths of sockets are limited
    outer = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    yield {**outer, "RAY_TMPDIR": folder, "HOME": folder, "PYTHONPATH": str(ROOT)}
    shutil.rmtree(folder)


@contextlib.contextmanager
def started_elsewhere(environment: dict[str, str]) -> Iterator[str]:
    """The address of a Ray that `ray start --head` has started, which does not know this checkout."""
    folder = Path(environment["RAY_TMPDIR"])
    plain = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(cluster._head_command(folder, "false"), cwd="/", env=plain, stdout=log, stderr=log)
    try:
        record, deadline = folder / "ray_current_cluster", time.monotonic() + 100
        while not (record.exists() and record.read_text()):
            assert head.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield record.read_text()
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(60)
        psutil.wait_procs(family, timeout=100)


def submit(options: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.runtime.submit", *options]
    return subprocess.run(
        command, cwd=folder, env={**environment, "PYTHONPATH": str(folder)}, capture_output=True, text=True
    )


def test_bad_input_ends_in_one_line_before_ray_is_started(environment: dict[str, str]) -> None:
    done = submit(["--run.stepps", "3"], ROOT, environment)
    assert done.returncode == 2
    assert done.stderr == "unknown option --run.stepps; did you mean --run.steps?\n"
    assert done.stdout == ""
    assert not list(Path(environment["RAY_TMPDIR"]).glob("ray*"))


@pytest.mark.slow
def test_workers_that_start_slowly_do_not_hold_a_driver_up(environment: dict[str, str]) -> None:
    """No worker imports Ray within a second. By default a driver waits for two, which Ray has given up by then."""
    slow = {**environment, "RAY_worker_register_timeout_seconds": "1"}
    done = subprocess.run([sys.executable, "-c", CONNECTED], cwd=ROOT, env=slow, capture_output=True, timeout=100)
    assert done.stdout == b"connected\n"


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process(environment: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    driver = subprocess.Popen([sys.executable, script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert driver.stdout
    assert driver.stdout.readline() == "ready\n"
    descendants = psutil.Process(driver.pid).children(recursive=True)
    assert {"raylet", "gcs_server", "sleep"} <= {process.name() for process in descendants}
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(descendants, timeout=40)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_submit_returns_the_status_of_the_driver_and_stops_the_ray_that_it_started(
    environment: dict[str, str], tmp_path: Path
) -> None:
    for package in ("common", "launch", "learner"):
        shutil.copytree(ROOT / package, tmp_path / package)
    (tmp_path / "launch" / "run.py").write_text(JOB)
    done = submit(["--run.steps", "3"], tmp_path, environment)
    assert done.returncode == 7, done.stderr
    assert "arguments ['--run.steps', '3']" in done.stdout
    assert not list(Path(environment["RAY_TMPDIR"]).glob("ray-*"))


@pytest.mark.slow
def test_workers_of_a_ray_started_elsewhere_import_the_checkout_and_the_callers_modules(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Also where the job has a PYTHONPATH of its own, which Ray would refuse to replace."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.py").touch()
    (tmp_path / "driver.py").write_text(PATHS)
    with started_elsewhere(environment) as address:
        job = {
            **environment,
            "RAY_ADDRESS": address,
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": {"PYTHONPATH": "other"}}}),
            "PYTHONPATH": f"{ROOT}:own",
        }
        done = subprocess.run(
            [sys.executable, "driver.py"], cwd=tmp_path, env=job, capture_output=True, text=True, timeout=200
        )
        assert done.stdout.split() == [str(ROOT / "learner"), str(own / "mine.py")], done.stderr


WARNED = """
from launch.runtime.cluster import connect

with connect():
    print("in")
with connect(lambda text: print("told:", text)):
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_joining_a_cluster_without_token_authentication_triggers_a_warning(
    environment: dict[str, str], tmp_path: Path, mode: str
) -> None:
    """Also where this side sends a token, which such a cluster does not look at."""
    (tmp_path / "driver.py").write_text(WARNED)
    token = {"RAY_AUTH_TOKEN": "a" * 64}
    with started_elsewhere({**environment, **token, "RAY_AUTH_MODE": mode}) as address:
        for own in {mode, "token"}:
            driver = {**environment, **token, "RAY_AUTH_MODE": own, "RAY_ADDRESS": address}
            done = subprocess.run(
                [sys.executable, "driver.py"], cwd=tmp_path, env=driver, capture_output=True, text=True, timeout=200
            )
            warning = cluster.OPEN.format(address) + "\n" if mode == "disabled" else ""
            assert (done.returncode, done.stderr) == (0, warning)
            assert done.stdout == "in\n" + (f"told: {warning}" if warning else "")
