"""Submits a run as a Ray job; `make run` calls it.

python -m launch.runtime.submit [OPTIONS of launch/run.py]
"""

import asyncio
import logging
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from ray.exceptions import AuthenticationError
from ray.job_submission import JobInfo, JobStatus, JobSubmissionClient

from common.command_line import load
from common.types import UserError
from launch.runtime.cluster import DEFAULT_CONFIG, JOB_STOP_SECONDS, ROOT, exit_on_signal, ray_address, refused

AGENT_START_SECONDS = 60


def submit(options: Sequence[str]) -> int:
    """Run launch/run.py with `options` as a Ray job, follow its log, and return the driver's exit status.

    `ray job submit` does the same, but turns every failure into status 1. If this call is interrupted, the job is
    stopped.
    """
    logging.disable(logging.WARNING)  # hides the messages of Ray's job client
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, exit_on_signal)
    command = shlex.join([sys.executable, "launch/run.py", *options])
    with ray_address(job_server=True) as address:
        try:
            client = JobSubmissionClient(address)
        except (ConnectionError, AuthenticationError):
            raise refused() from None
        job = _start(client, f"cd {shlex.quote(str(ROOT))} && exec {command}")
        try:
            asyncio.run(_follow(client, job))
            return _exit_status(_ended(client, job))
        finally:
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(name, signal.SIG_IGN)  # the rest takes a bounded time: a second Ctrl-C is not needed
            client.stop_job(job)
            _ended(client, job)


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


def _exit_status(info: JobInfo) -> int:
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if not info.driver_exit_code or info.driver_exit_code < 0:  # never started, stopped, or killed by a signal
        print(f"The job is {info.status}: {info.message}", file=sys.stderr)
        return 1
    return info.driver_exit_code


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
