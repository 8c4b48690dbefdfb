"""Submits a run as a Ray job; `make run` calls it.

python -m launch.runtime.submit [OPTIONS of launch/run.py]
"""

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobInfo, JobStatus, JobSubmissionClient

from common.command_line import load
from common.types import UserError
from launch.runtime.cluster import DEFAULT_CONFIG, JOB_STOP_SECONDS, ROOT, exit_on_signal, ray_address, refused
from learner import checkpoint

AGENT_START_SECONDS = 60
GONE = (OSError, RuntimeError, aiohttp.ClientError)  # of Ray's client: requests' errors are OSErrors


def submit(options: Sequence[str]) -> int:
    """Run launch/run.py with `options` as a Ray job, follow its log, and return the driver's exit status.

    `ray job submit` does the same, but turns every failure into status 1. If this call is interrupted, the job is
    stopped. If the cluster or the driver dies, the run is resumed, as long as it has written another checkpoint since.
    """
    logging.disable(logging.WARNING)  # hides the messages of Ray's job client
    checkpoints = load(options, DEFAULT_CONFIG).run.dir / "checkpoints"
    reached = last_step(checkpoints)
    while True:
        status = _attempt(options)
        if status is not None:
            return status
        before, reached = reached, last_step(checkpoints)
        if reached <= before:
            print("the run has died without a new checkpoint; see the lines above", file=sys.stderr)
            return 1
        print(f"the run has died; resuming it after step {reached}", flush=True)
        options = [*options, "--run.resume", "auto"]


def last_step(checkpoints: Path) -> int:
    """The step of the last whole checkpoint in the folder; -1 without one."""
    try:
        latest = checkpoint.latest(checkpoints)
    except UserError:  # none is whole: the resumed run says so
        return -1
    return checkpoint.step_of(latest) if latest else -1


def _attempt(options: Sequence[str]) -> int | None:
    """One job; None if the cluster or the driver died."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, exit_on_signal)
    command = shlex.join([sys.executable, "launch/run.py", *options])
    with ray_address(job_server=True) as address, _named(address):
        try:
            client = JobSubmissionClient(address)
        except (ConnectionError, AuthenticationError):
            raise refused() from None
        job = _start(client, f"cd {shlex.quote(str(ROOT))} && exec {command}")
        stopped: list[int] = []
        try:
            asyncio.run(_follow(client, job))
            status = _exit_status(_ended(client, job))
        except GONE as error:
            print(f"lost the connection to the job: {error}", file=sys.stderr)
            status = None
        finally:
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the rest takes a bounded time
                signal.signal(name, lambda number, _: stopped.append(number))
            with contextlib.suppress(*GONE):
                client.stop_job(job)
                _ended(client, job)
    if stopped:
        sys.exit(128 + stopped[0])
    return status


@contextlib.contextmanager
def _named(address: str) -> Iterator[None]:
    """RAY_ADDRESS names a Ray of our own: Ray's client prefers the variable, which may be "local", to its argument."""
    before = os.environ.get("RAY_ADDRESS", "")
    os.environ["RAY_ADDRESS"] = before if address == "auto" else address
    try:
        yield
    finally:
        os.environ["RAY_ADDRESS"] = before


def _start(client: JobSubmissionClient, command: str) -> str:
    """Submit the job. Retries while a Ray that has just started has no agent yet."""
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
    """The job's information once it has ended, or when it should have been killed."""
    deadline = time.monotonic() + JOB_STOP_SECONDS + 5
    info = client.get_job_info(job)
    while not info.status.is_terminal() and time.monotonic() < deadline:
        time.sleep(0.2)
        info = client.get_job_info(job)
    return info


def _exit_status(info: JobInfo) -> int | None:
    """The driver's exit status; None if a signal killed it."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.driver_exit_code and info.driver_exit_code > 0:
        return info.driver_exit_code
    print(f"The job is {info.status}: {info.message}", file=sys.stderr)
    return 1 if info.status == JobStatus.STOPPED else None


def _check(options: Sequence[str]) -> int:
    """The exit status of launch/run.py --dry-run; its output is shown only if `options` have --dry-run."""
    others = [option for option in options if option != "--dry-run"]
    load(others, DEFAULT_CONFIG)  # finds a misspelt option, and answers --help, before a process starts
    command = [sys.executable, "launch/run.py", "--dry-run", *others]
    return subprocess.run(
        command, cwd=ROOT, stdout=None if len(others) < len(options) else subprocess.DEVNULL
    ).returncode


def main(options: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    try:
        status = _check(options)
        return status if status or "--dry-run" in options else submit(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
