"""Starts, joins and leaves Ray; no other module does.

A Ray that is started here runs under a supervisor: a process that starts it, adopts every orphan among its descendants,
and kills them all when its parent ends. Without a supervisor, a `kill -9` of the driver would leave Ray's agents and
vLLM's engines running.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import ray
from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup as authentication
from ray._private.utils import read_ray_address

from common.process import adopt_orphans, child, kill_descendants, stop
from common.types import UserError

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = ROOT / "launch" / "configs" / "default.toml"

OBJECT_STORE_BYTES = 512 << 20  # a few adapter versions and groups; Ray's own default is 30 % of the memory
JOB_STOP_SECONDS = 15  # Ray kills a driver that has not stopped by then
SUPERVISOR_STOP_SECONDS = 20
ANSWER_SECONDS = 10
REGISTER_SECONDS = 600  # a worker on a busy machine needs more than Ray's 60 to import what it needs

OPEN = (
    "warning: the Ray at {} has token authentication off: whoever reaches its ports can run any program there; run "
    "`ray get-auth-token --generate` once, and start it with RAY_AUTH_MODE=token"
)


@contextlib.contextmanager
def connect(note: Callable[[str], None] | None = None) -> Iterator[None]:
    """Connect to Ray for the duration of the block; call it from the main thread.

    Uses the first of these that exists: the cluster of the Ray job that this process runs in; the one that RAY_ADDRESS
    names; the one that `ray start` started on this machine; a new one, which ends with the block or with this process.
    RAY_ADDRESS=local asks for a new one. What actors print appears in this process's output. Raises UserError if Ray
    does not let this process in; `note` (None: stderr) is told if it lets in anybody.
    """
    if not sys.stdout.isatty():
        os.environ["RAY_COLOR_PREFIX"] = "0"
    with ray_address(job_server=False) as address:
        interrupts: list[int] = []
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))  # Ray loses a Ctrl-C while it starts
        # Overrides PYTHONPATH alone, which in a job starts with the job's own.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        environment = {"env_vars": {"PYTHONPATH": _python_path()}}
        try:
            ray.init(address=address, runtime_env=environment, logging_level=logging.ERROR)
        except ConnectionError:
            raise refused() from None
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])  # Ray's own handler prints a C++ stack
        if interrupts:
            raise KeyboardInterrupt
        try:
            if _lets_in_anybody(gcs := ray.get_runtime_context().gcs_address):
                (note or partial(print, file=sys.stderr))(OPEN.format(gcs))
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def ray_address(*, job_server: bool) -> Iterator[str]:
    """The address of the running Ray, or of a new one that ends with the block."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    named = os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS")
    if named != "local" and (named or _started_by_hand()):
        authentication.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        yield "auto"
    else:
        authentication.enable_token_auth_by_default()
        authentication.ensure_token_if_auth_enabled()
        ray_constants.ENABLE_RAY_CLUSTER = False  # else Ray reads 127.0.0.1 as the machine's address to the outside
        with _supervised(job_server=job_server) as address:
            yield address


def refused() -> UserError:
    """The error of a Ray that does not answer, or not to this token."""
    named = os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS")
    ray_named = f"the Ray at {named}" if named else "the Ray of `ray start`"
    return UserError(
        f"{ray_named} does not accept the connection; check that it runs there, and that RAY_AUTH_MODE and "
        "RAY_AUTH_TOKEN are the same as where it was started"
    )


def _lets_in_anybody(address: str) -> bool:
    """Whether a cluster answers without a token. This process's own settings do not tell: it may send one unasked."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:  # as Ray connects
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", timeout=ANSWER_SECONDS)
        except grpc.RpcError:
            return False
        return True


def _started_by_hand() -> bool:
    """Whether a Ray of `ray start` answers on this machine; a killed one leaves its address file behind."""
    host, _, port = (read_ray_address() or "").rpartition(":")
    if not host:
        return False
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _supervised(*, job_server: bool) -> Iterator[str]:
    """A new Ray for this process alone; yields its address."""
    environment = {
        "PYTHONPATH": _python_path(),
        "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_SECONDS),
        # Ray's first driver waits for workers that it starts ahead: without end if one takes too long to register.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_worker_niceness": "0",  # at Ray's default of 15 any other process on the machine starves the training
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",  # no other node: all of its servers listen on loopback
        "RAY_ADDRESS": "",  # Ray's own commands would take "local" for an address
    }
    supervisor = child(
        [sys.executable, "-m", "launch.runtime.cluster", str(job_server).lower()],
        env={"RAY_worker_register_timeout_seconds": str(REGISTER_SECONDS), **os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C must reach only this process, which then stops the supervisor
    )
    assert supervisor.stdout
    try:
        address = supervisor.stdout.readline().strip()
        if not address:
            raise RuntimeError("Ray did not start; see the lines above for the reason")
        yield address
    finally:
        stop(supervisor, SUPERVISOR_STOP_SECONDS)


def supervise(job_server: str) -> None:
    """The supervisor: start a Ray, print its address, and on SIGTERM kill it with all its descendants."""
    signal.signal(signal.SIGTERM, exit_on_signal)  # also sent when the parent dies
    adopt_orphans()
    # Its own folder, so that it touches neither another user's /tmp/ray nor the address file of a Ray started by hand.
    # Not below TMPDIR, which may be long: the paths of Ray's sockets are limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
    try:
        with open(folder / "start.log", "w") as log:
            # A Ray that one of its tasks starts (a cell of a grid) creates its folder in this one.
            environment = {**os.environ, "RAY_TMPDIR": str(folder)}
            head = subprocess.Popen(_head_command(folder, job_server), env=environment, stdout=log, stderr=log)
        record = folder / "ray_current_cluster"  # written when Ray is up
        while head.poll() is None and not (record.exists() and record.read_text()):
            time.sleep(0.1)
        if head.poll() is None:
            print(record.read_text(), flush=True)
            head.wait()  # until SIGTERM, or until one of Ray's processes ends
        sys.stderr.write((folder / "start.log").read_text())
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        kill_descendants()
        shutil.rmtree(folder, ignore_errors=True)


def _python_path() -> str:
    """Where workers find this checkout and the caller's own modules, whatever folder their node was started in."""
    own = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join([str(ROOT), *map(os.path.abspath, own)])


def _head_command(folder: Path, job_server: str) -> list[str]:
    """`ray start` with free ports instead of the fixed ones: other Rays may run on this machine."""
    options = {
        "port": 0,
        "dashboard-port": 0,
        "dashboard-agent-listen-port": 0,
        "ray-client-server-port": _free_port(),  # the one port option that does not accept 0
        "include-dashboard": job_server,
        "num-gpus": _num_gpus(),
        "object-store-memory": OBJECT_STORE_BYTES,
        "temp-dir": folder,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    return command + [f"--{name}={value}" for name, value in options.items()]


def _num_gpus() -> int:
    """The GPUs as torch counts them. Ray counts 0 if NVML fails, and a task that asks for a GPU would wait forever."""
    if shutil.which("nvidia-smi") is None:
        return 0
    import torch  # a late import: without a GPU the supervisor does not need it

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def exit_on_signal(number: int, _: object) -> None:
    """A signal handler that exits once: the kernel repeats the death signal for each thread of the parent."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    supervise(sys.argv[1])
