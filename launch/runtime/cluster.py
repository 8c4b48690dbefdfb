"""How Ray is started, joined and left: the only place that knows.

A Ray that is started here has a keeper, a process that starts it, adopts every orphan among its descendants and ends
them all when the process that asked for it ends, however that ends: nothing else survives a `kill -9` of a driver
without leaving agents of Ray or engines of vLLM behind.
"""

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray
from ray._private.authentication import authentication_token_setup as authentication
from ray._private.utils import read_ray_address

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = ROOT / "launch" / "configs" / "default.toml"

OBJECT_STORE_BYTES = 512 << 20  # a few adapter versions and groups; Ray's own default is 30 % of the memory
JOB_STOP_SECONDS = 15  # what a stopped driver has to end its actors in before it is killed
KEEPER_STOP_SECONDS = 20

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


@contextlib.contextmanager
def connect() -> Iterator[None]:
    """Be connected to Ray for the length of the block; call it from the main thread.

    In a Ray job, to the job's cluster; else to the one that RAY_ADDRESS names or that `ray start` began on this
    machine; else, or where RAY_ADDRESS is "local", to an own one, which ends with the block or with this process. What
    actors print appears in this process's output.
    """
    if not sys.stdout.isatty():
        os.environ["RAY_COLOR_PREFIX"] = "0"
    with ray_address(job_server=False) as address:
        interrupts: list[int] = []
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))  # Ray would lose it while it starts
        ray.init(address=address, logging_level=logging.ERROR)
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])  # Ray replaces it, by one that prints a C++ stack
        if interrupts:
            raise KeyboardInterrupt
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def ray_address(*, job_server: bool) -> Iterator[str]:
    """The address of the Ray that runs, or of a new one."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    named = os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS")
    if named != "local" and (named or _started_by_hand()):
        authentication.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        yield "auto"
    else:
        authentication.enable_token_auth_by_default()
        authentication.ensure_token_if_auth_enabled()
        with _keeper(job_server=job_server) as address:
            yield address


def _started_by_hand() -> bool:
    """Whether a Ray that `ray start` began on this machine still answers; a killed one leaves its record behind."""
    host, _, port = (read_ray_address() or "").rpartition(":")
    if not host:
        return False
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _keeper(*, job_server: bool) -> Iterator[str]:
    """A new Ray for this process alone; yields its address."""
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),  # for the workers too
        "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_SECONDS),
        "RAY_worker_niceness": "0",  # Ray's 15 lets anything else on the machine starve the training
        "RAY_ADDRESS": "",  # for Ray's own commands: "local" has been understood here
    }
    keeper = subprocess.Popen(
        [sys.executable, "-m", "launch.runtime.cluster", str(os.getpid()), str(job_server).lower()],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C is for us, who then end the keeper in good order
    )
    assert keeper.stdout
    try:
        address = keeper.stdout.readline().strip()
        if not address:
            raise RuntimeError("Ray did not start; the lines above say why")
        yield address
    finally:
        keeper.terminate()
        try:
            keeper.wait(KEEPER_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            keeper.kill()


def keep(parent: int, job_server: str) -> None:
    """Start a Ray, print its address, and on SIGTERM end it and all that came of it.

    The kernel sends that SIGTERM too when the process `parent`, which started this one, dies.
    """
    signal.signal(signal.SIGTERM, exit_on_signal)
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.getppid() != parent:
        return
    # An own folder, to touch neither another user's /tmp/ray nor the record of a Ray that was started by hand; not
    # below TMPDIR: the paths of Ray's sockets have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
    try:
        with open(folder / "start.log", "w") as log:
            # RAY_TMPDIR: a Ray that a task starts in turn (launch/experiment.py) leaves nothing behind either.
            environment = {**os.environ, "RAY_TMPDIR": str(folder)}
            head = subprocess.Popen(_head_command(folder, job_server), env=environment, stdout=log, stderr=log)
        record = folder / "ray_current_cluster"  # written when Ray is up
        while head.poll() is None and not (record.exists() and record.read_text()):
            time.sleep(0.1)
        if head.poll() is None:
            print(record.read_text(), flush=True)
            while head.poll() is None and os.getppid() == parent:  # until SIGTERM, or the end of one of Ray's processes
                time.sleep(0.2)
        if os.getppid() == parent:
            sys.stderr.write((folder / "start.log").read_text())
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_children()
        shutil.rmtree(folder, ignore_errors=True)


def _head_command(folder: Path, job_server: str) -> list[str]:
    """`ray start` with every fixed port replaced by a free one: there may be other Rays on this machine."""
    options = {
        "port": 0,
        "dashboard-port": 0,
        "dashboard-agent-listen-port": 0,
        "ray-client-server-port": _free_port(),  # the one option that takes no 0
        "include-dashboard": job_server,
        "num-gpus": _num_gpus(),
        "object-store-memory": OBJECT_STORE_BYTES,
        "temp-dir": folder,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    return command + [f"--{name}={value}" for name, value in options.items()]


def _num_gpus() -> int:
    """As torch counts them. Ray's own count is 0 where NVML fails, and what asks for a GPU then waits for ever."""
    if shutil.which("nvidia-smi") is None:
        return 0
    count = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    counted = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True)
    return int(counted.stdout)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _kill_children() -> None:
    """Kill every descendant, and those that a killed one leaves to us, until there is none."""
    while children := psutil.Process().children():
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=1)


def exit_on_signal(number: int, _: object) -> None:
    # Once: the kernel sends a dead parent's signal again for each thread of it that dies, into the cleaning up too.
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    keep(int(sys.argv[1]), sys.argv[2])
