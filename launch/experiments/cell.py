"""One cell of a grid on the machine where Ray has placed it: launch/run.py in a process of its own.

A cell takes one GPU, or `--cores` processors or a whole machine if the cluster has no GPU. Its run starts a Ray of its
own on that share: it sees only the cell's GPU, and the failure of one cell does not affect another. It prints into
DIR/CELL.log, beside its run folder DIR/CELL.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.process import child, stop
from common.types import UserError

RUN = Path(__file__).resolve().parents[1] / "run.py"
LOCK = "/sys/devices/system/cpu/cpu{}"  # a cell holds a processor by locking its folder in the kernel's tree
STOP_SECONDS = 45  # that launch/run.py has to close its actors and its Ray


def share(nodes: Sequence[Mapping[str, Any]], cores: int | None) -> dict[str, float]:
    """Ray's resources for a cell: one GPU if the cluster has any, else `cores` processors or the largest machine's.

    Raises UserError for more cores than any machine has, and for cores on a cluster with GPUs.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    if any(has.get("GPU", 0) >= 1 for has in resources):
        if cores is not None:
            raise UserError(f"--cores {cores}: this cluster has GPUs, and a cell takes one of them; leave it out")
        return {"num_gpus": 1, "num_cpus": 0}
    max_cores = int(max(has.get("CPU", 0) for has in resources))
    if cores is not None and not 1 <= cores <= max_cores:
        raise UserError(
            f"--cores {cores} is not from 1 to {max_cores}, the processors of the largest machine; give as many"
        )
    return {"num_cpus": cores or max_cores}


def run(config: str, log: Path, folder: Path, environment: Mapping[str, str], cores: int | None) -> str | None:
    """A Ray task: runs launch/run.py with the TOML text `config` in `folder`; returns why it failed, or None.

    `environment` is the driver's, except for the GPU and Ray's folder, which are the task's.
    """
    own = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "RAY_TMPDIR") if name in os.environ}
    with (
        processors(cores) if cores else contextlib.nullcontext(dict[int, int]()) as held,
        tempfile.NamedTemporaryFile("w", suffix=".toml") as file,
        log.open("a") as out,
    ):
        file.write(config)
        file.flush()
        print(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} launch/run.py", file=out, flush=True)
        process = child(
            [sys.executable, str(RUN), "--config", file.name],
            processors=held,
            pass_fds=held.values(),  # if this worker is killed, the run holds the processors until it ends
            cwd=folder,
            env={**environment, **own, "RAY_ADDRESS": "local"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)  # not wait(): Ray cancels a task by a KeyboardInterrupt between two lines of Python
        finally:
            stop(process, STOP_SECONDS)  # by SIGTERM: a Ray and the processes that it starts ignore SIGINT
    if process.returncode == 0:
        return None
    # The reason is the last line of the driver itself: lines of its Ray's workers begin with a bracket.
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip() and line[0] != "("]
    code = process.returncode
    return f"{f'status {code}' if code > 0 else signal.Signals(-code).name}, {lines[-1]}"


@contextlib.contextmanager
def processors(number: int) -> Iterator[dict[int, int]]:
    """`number` processors of this machine that no other cell holds, each with its open lock; waits until they are free.

    The kernel releases a lock when the last process that has it open ends, even if it is killed. Raises UserError if
    there are fewer processors.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if number > len(allowed):  # Ray counts all processors of the machine, also those that this process may not use
        raise UserError(f"--cores {number} is more than the {len(allowed)} processors that a cell may use here")
    while True:
        with contextlib.ExitStack() as locks:
            held: dict[int, int] = {}
            for processor in allowed:
                lock = os.open(LOCK.format(processor), os.O_RDONLY)
                locks.callback(os.close, lock)
                with contextlib.suppress(BlockingIOError):  # another cell holds it
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held[processor] = lock
                if len(held) == number:
                    yield held
                    return
        time.sleep(1.0)
