"""One cell of a grid, where Ray has sent it: launch/run.py in a process of its own, on its share of the machine.

A cell takes a GPU, or where there is none `--cores` processors, by default all of the largest machine. It has a Ray of
its own on that share: its learner and its actor ask Ray for the very GPU that the cell's task holds, and what ends one
cell ends no other. It prints into DIR/CELL.log, beside its run folder DIR/CELL/, so all machines of a cluster must see
the same files.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.types import UserError

RUN = Path(__file__).resolve().parents[1] / "run.py"
HELD = "\0horizon-processor-"  # and its number: the name of a processor that is held, in the kernel's abstract sockets
STOP_SECONDS = 45  # what a stopped launch/run.py has to close its actors and its Ray in

# Becomes the program of its arguments, on the processors of the second, and the kernel sends it SIGTERM (15) when the
# worker of the Ray task dies (PR_SET_PDEATHSIG, 1). Not a preexec_fn: Ray's worker has threads, and Python code between
# fork and exec may hang.
CHILD = """
import ctypes, os, sys
os.sched_setaffinity(0, map(int, sys.argv[2].split(",")))
ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[3], sys.argv[3:])
"""


def share(nodes: Sequence[Mapping[str, Any]], cores: int | None) -> dict[str, float]:
    """Ray's options for a cell: a GPU where the cluster has any, else `cores`, or all of its largest machine.

    Raises UserError for more cores than any machine has, and for cores where GPUs are shared out.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    if any(has.get("GPU", 0) >= 1 for has in resources):
        if cores is not None:
            raise UserError(f"--cores {cores}: this cluster has GPUs, and a cell takes one of them; leave it out")
        return {"num_gpus": 1, "num_cpus": 0}
    most = int(max(has.get("CPU", 0) for has in resources))
    if cores is not None and not 1 <= cores <= most:
        raise UserError(f"--cores {cores} is not from 1 to {most}, the processors of the largest machine; give as many")
    return {"num_cpus": cores or most}


def run(config: str, log: Path, folder: Path, environment: Mapping[str, str], cores: int | None) -> str | None:
    """A Ray task: launch/run.py with a TOML text, from `folder`; returns why it failed, or None.

    The environment is the driver's, but for the GPU, which is the task's, and for Ray: the run has its own.
    """
    own = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "RAY_TMPDIR") if name in os.environ}
    with (
        processors(cores) as held,
        tempfile.NamedTemporaryFile("w", suffix=".toml") as file,
        log.open("a") as out,
    ):
        file.write(config)
        file.flush()
        command = [sys.executable, str(RUN), "--config", file.name]
        print(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} launch/run.py", file=out, flush=True)
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(os.getpid()), ",".join(map(str, held)), *command],
            cwd=folder,
            env={**environment, **own, "RAY_ADDRESS": "local"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
        try:
            while child.poll() is None:
                time.sleep(0.2)  # not wait(): Ray's cancelling raises KeyboardInterrupt between two lines of Python
        finally:
            _stop(child)
    if child.returncode == 0:
        return None
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip() and line[0] != "("]
    status = f"status {child.returncode}" if child.returncode > 0 else signal.Signals(-child.returncode).name
    return f"{status}, {said[-1]}"  # a line that begins with a bracket is one of Ray's workers, not the driver's last


@contextlib.contextmanager
def processors(number: int | None) -> Iterator[list[int]]:
    """`number` processors of this machine that no other cell holds, or all of them (None); waits until they are free.

    A name marks each as held, and is gone with the process that bound it. Raises UserError for more than there are.
    """
    mine = sorted(os.sched_getaffinity(0))
    if number is None:
        yield mine
        return
    if number > len(mine):  # Ray counts what the machine has, not what we may use of it
        raise UserError(f"--cores {number} is more than the {len(mine)} processors that a cell may use on its machine")
    while True:
        with contextlib.ExitStack() as names:
            held: list[int] = []
            for processor in mine:
                name = names.enter_context(socket.socket(socket.AF_UNIX))
                with contextlib.suppress(OSError):  # another cell's
                    name.bind(f"{HELD}{processor}")
                    held.append(processor)
                if len(held) == number:
                    yield held
                    return
        time.sleep(1.0)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Let the run close its actors; kill it if that takes too long."""
    if child.poll() is None:
        child.terminate()  # not SIGINT, which the processes of a Ray ignore, and what they start
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
