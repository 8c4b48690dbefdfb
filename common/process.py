"""Child processes that do not outlive their parent (Linux). The one place that calls prctl or sets an affinity.

`child` starts a command through this file, run as a script: it sets the parent-death signal and the processors, then
becomes the command. Not a preexec_fn: our processes have threads, and Python code between fork and exec may deadlock.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def child(
    command: Sequence[str],
    *,
    processors: Iterable[int] = (),
    death_signal: signal.Signals = signal.SIGTERM,
    **popen: Any,
) -> subprocess.Popen[Any]:
    """Start `command` on `processors` (none: on the caller's); it receives `death_signal` when its parent dies.

    Linux sends that signal when the *thread* that called this ends: call it from one that lasts as long as the child.
    `popen` are further arguments of subprocess.Popen.
    """
    settings = [str(os.getpid()), str(int(death_signal)), ",".join(map(str, processors))]
    # -P: this folder must not come first in sys.path, where its types.py would replace the standard library's.
    return subprocess.Popen([sys.executable, "-P", __file__, *settings, *command], **popen)


def stop(process: subprocess.Popen[Any], seconds: float) -> None:
    """Send SIGTERM, and SIGKILL to a process that has not ended after `seconds`. One that has ended is left alone."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def kill_descendants() -> None:
    """Kill every descendant of a process that adopts orphans: the children, then those whom these leave, until none."""
    while children := psutil.Process().children():
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(children, timeout=1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None).prctl(option, value, 0, 0, 0):
        raise OSError(f"prctl({option}, {value}) failed")


def _become(parent: str, death_signal: str, processors: str, *command: str) -> None:
    """In the new process: the settings of `child`, which survive the exec."""
    _prctl(PR_SET_PDEATHSIG, int(death_signal))
    if os.getppid() != int(parent):  # it died before the line above, so no signal will come
        sys.exit(128 + int(death_signal))
    if processors:
        os.sched_setaffinity(0, map(int, processors.split(",")))
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(*sys.argv[1:])
