"""Child processes die with their parent, and run on the given processors."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common import process

ROOT = Path(__file__).resolve().parents[2]
MINE = sorted(os.sched_getaffinity(0))
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"

# Starts a child that handles no SIGTERM, with the death signal of its argument.
PARENT = f"""
import signal, sys, time
from common.process import child
started = child([sys.executable, "-c", {DEAF!r}], death_signal=signal.Signals(int(sys.argv[1])), stdout=-1)
started.stdout.readline()
print(started.pid, flush=True)
time.sleep(600)
"""
# Starts three generations of processes, each in its own session, adopts the orphans and kills them all.
ANCESTOR = """
import subprocess, time
import psutil
from common.process import adopt_orphans, kill_descendants
adopt_orphans()
subprocess.Popen(["setsid", "sh", "-c", "setsid sh -c 'setsid sleep 600 & setsid sleep 600' & sleep 0.2"]).wait()
while len(family := psutil.Process().children(recursive=True)) < 3:
    time.sleep(0.05)
kill_descendants()
print([p.is_running() for p in family], psutil.Process().children())
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def started(number: signal.Signals) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A parent, and its child that handles no SIGTERM."""
    parent = python(PARENT, str(int(number)))
    assert parent.stdout
    return parent, psutil.Process(int(parent.stdout.readline()))


def test_a_child_dies_with_its_killed_parent() -> None:
    parent, orphan = started(signal.SIGKILL)
    assert orphan.ppid() == parent.pid
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([orphan], timeout=20)
    assert not alive


def test_the_signal_is_the_callers_choice() -> None:
    parent, orphan = started(signal.SIGTERM)
    parent.kill()
    parent.wait()
    try:
        with pytest.raises(psutil.TimeoutExpired):
            orphan.wait(1)  # it handles none
    finally:
        orphan.kill()


def test_a_parent_that_died_before_the_signal_was_set_is_noticed(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    command = [sys.executable, "-P", process.__file__, str(gone.pid), "15", "", "touch", str(tmp_path / "late")]
    assert subprocess.run(command).returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_the_parent_sets_the_processors() -> None:
    show = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    for given, got in ((MINE[-1:], MINE[-1:]), ((), MINE)):
        output, _ = process.child(show, processors=given, stdout=subprocess.PIPE, text=True).communicate()
        assert output == f"{got}\n"


def test_a_child_is_the_command_itself(tmp_path: Path) -> None:
    """Id, exit code, arguments, folder, environment and open files; the standard library is not shadowed."""
    reader, writer = os.pipe()
    command = ["sh", "-c", f'echo "$$ $0 $GREETING" $(pwd) >/dev/fd/{writer}; exit 3', "a b"]
    child = process.child(command, pass_fds=[writer], cwd=tmp_path, env={**os.environ, "GREETING": "hello"})
    os.close(writer)
    with os.fdopen(reader) as lines:
        assert lines.read() == f"{child.pid} a b hello {tmp_path}\n"
    assert child.wait() == 3


def test_stop_kills_only_a_process_that_ignores_sigterm() -> None:
    deaf, polite = python(DEAF), python("import time; print('here', flush=True); time.sleep(600)")
    for each in (deaf, polite):
        assert each.stdout and each.stdout.readline()
    process.stop(polite, 20)
    assert polite.returncode == -signal.SIGTERM
    process.stop(polite, 20)
    before = time.monotonic()
    process.stop(deaf, 0.5)
    assert deaf.returncode == -signal.SIGKILL
    assert 0.5 <= time.monotonic() - before < 10


def test_a_family_is_killed_with_its_orphans() -> None:
    output, _ = python(ANCESTOR).communicate(timeout=60)
    assert output == "[False, False, False] []\n"
