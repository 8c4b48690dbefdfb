"""Child processes that do not outlive their parent (Linux). Only this file calls prctl.

`child` runs this file as a script, which sets the parent-death signal and the affinity, then becomes the command by
exec. A preexec_fn could deadlock: our processes have threads, and it runs Python code between fork and exec.
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
    """Start `command` on `processors` (none: the caller's); it receives `death_signal` when its parent dies.

    Linux sends that signal when the *thread* that called this function ends, so that thread must outlive the child.
    `popen` are further arguments of subprocess.Popen.
    """
    settings = [str(os.getpid()), str(int(death_signal)), ",".join(map(str, processors))]
    # -P: this folder must not come first in sys.path, where its types.py would replace the standard library's.
    return subprocess.Popen([sys.executable, "-P", __file__, *settings, *command], **popen)


def stop(process: subprocess.Popen[Any], seconds: float) -> None:
    """Send SIGTERM, and SIGKILL if the process has not ended after `seconds`. No effect on a process that has ended."""
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
    """Kill all descendants of a process that adopts orphans: its children, then their orphans, until none remain."""
    while children := psutil.Process().children():
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(children, timeout=1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None).prctl(option, value, 0, 0, 0):
        raise OSError(f"prctl({option}, {value}) failed")


def _become(parent: str, death_signal: str, processors: str, *command: str) -> None:
    """In the new process: apply the settings of `child`, which survive exec, and become the command."""
    _prctl(PR_SET_PDEATHSIG, int(death_signal))
    if os.getppid() != int(parent):  # it died before the line above, so the signal will not come
        sys.exit(128 + int(death_signal))
    if processors:
        os.sched_setaffinity(0, map(int, processors.split(",")))
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(*sys.argv[1:])
