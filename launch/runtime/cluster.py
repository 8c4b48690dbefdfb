"""How Ray is started, joined and left: the only place that knows.

    python -m launch.runtime.cluster submit [OPTIONS of launch/run.py]     what `make run` calls

A Ray that is started here has a keeper, a process that starts it, adopts every orphan among its descendants and ends
them all when the process that asked for it ends, however that ends: nothing else survives a `kill -9` of a driver
without leaving agents of Ray or engines of vLLM behind.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import ray
from ray._private.authentication import authentication_token_setup as authentication
from ray._private.utils import read_ray_address
from ray.job_submission import JobInfo, JobStatus, JobSubmissionClient

from common.command_line import load
from common.types import UserError

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = ROOT / "launch" / "configs" / "default.toml"

OBJECT_STORE_BYTES = 512 << 20  # a few adapter versions and groups; Ray's own default is 30 % of the memory
JOB_STOP_SECONDS = 15  # what a stopped driver has to end its actors in before it is killed
KEEPER_STOP_SECONDS = 20
AGENT_START_SECONDS = 60

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
    with _cluster(job_server=False) as address:
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


def submit(options: Sequence[str]) -> int:
    """Run launch/run.py with `options` as a Ray job, follow its log, and return the driver's exit status.

    It is what `ray job submit` does, which turns every failure into status 1. The job is stopped when this call is
    interrupted.
    """
    logging.disable(logging.WARNING)  # of Ray's job client
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _exit)
    command = shlex.join([sys.executable, "launch/run.py", *options])
    with _cluster(job_server=True) as address:
        client = JobSubmissionClient(address)
        job = _start(client, f"cd {shlex.quote(str(ROOT))} && exec {command}")
        try:
            asyncio.run(_follow(client, job))
            return _exit_status(_ended(client, job))
        finally:
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(name, signal.SIG_IGN)  # what follows is bounded in time: no second Ctrl-C is needed
            client.stop_job(job)
            _ended(client, job)


@contextlib.contextmanager
def _cluster(*, job_server: bool) -> Iterator[str]:
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
        [sys.executable, "-m", "launch.runtime.cluster", "keep", str(os.getpid()), str(job_server).lower()],
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
    signal.signal(signal.SIGTERM, _exit)
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
        "object-store-memory": OBJECT_STORE_BYTES,
        "temp-dir": folder,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    return command + [f"--{name}={value}" for name, value in options.items()]


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


def _exit(number: int, _: object) -> None:
    # Once: the kernel sends a dead parent's signal again for each thread of it that dies, into the cleaning up too.
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _start(client: JobSubmissionClient, command: str) -> str:
    """Submit the job; on a Ray that has only just started, the agent that is to run it may take a while to come."""
    deadline = time.monotonic() + AGENT_START_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=command)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _ended(client: JobSubmissionClient, job: str) -> JobInfo:
    """What the job server says of the job once it has ended, or a little after it should have."""
    deadline = time.monotonic() + JOB_STOP_SECONDS + 5
    info = client.get_job_info(job)
    while not info.status.is_terminal() and time.monotonic() < deadline:
        time.sleep(0.2)
        info = client.get_job_info(job)
    return info


def _exit_status(info: JobInfo) -> int:
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if not info.driver_exit_code or info.driver_exit_code < 0:  # never started, stopped, or killed by a signal
        print(f"The job is {info.status}: {info.message}", file=sys.stderr)
        return 1
    return info.driver_exit_code


def _check(options: Sequence[str]) -> int:
    """The exit status of launch/run.py --dry-run, whose plan is shown only if it was asked for."""
    others = [option for option in options if option != "--dry-run"]
    load(others, DEFAULT_CONFIG)  # which alone tells a misspelt option at once, and answers --help
    command = [sys.executable, "launch/run.py", "--dry-run", *others]
    return subprocess.run(
        command, cwd=ROOT, stdout=None if len(others) < len(options) else subprocess.DEVNULL
    ).returncode


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    match list(argv):
        case ["keep", parent, job_server]:
            keep(int(parent), job_server)
            return 0
        case ["submit", *options]:
            try:
                status = _check(options)
                return status if status or "--dry-run" in options else submit(options)
            except UserError as error:
                print(error, file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                return 128 + signal.SIGINT
        case _:
            print("usage: python -m launch.runtime.cluster submit [OPTIONS of launch/run.py]", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
