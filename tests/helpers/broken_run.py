"""A run in processes of its own, some of which are killed or stopped at random moments."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.process import child

ROOT = Path(__file__).resolve().parents[2]
SPARE_SECONDS, FIRST_SECONDS = 5.0, 180.0  # in the place of launch.runtime.recovery's: a stopped process costs them
PROGRAM = f"""
import sys
from launch.runtime import recovery
recovery.SPARE_SECONDS, recovery.FIRST_SECONDS = {SPARE_SECONDS}, {FIRST_SECONDS}
from launch import run
sys.exit(run.main(sys.argv[1:]))
"""
WORKERS = ("learner", "actor", "reward")  # replaced within the run
RESTARTED = ("driver", "raylet", "gcs_server")  # the run ends, and is resumed

IN_A_ROW = 3  # kills without a step between them; recovery.MAX_LOSSES of its own kind would end the run
STEP = re.compile(r"step \d+/")  # the display's line of a finished step
SILENT_SECONDS = 400.0  # a run that prints nothing for so long hangs
GONE_SECONDS = 25.0  # after its end, for all processes of the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    kind: str
    how: str  # "killed" or "stopped"
    moment: float  # time.monotonic


class BrokenRun:
    """launch/run.py as a process; `lines` are what it has printed, with the time of each; `log` gets them, too."""

    def __init__(self, options: Sequence[str], ray_folder: Path, log: Path) -> None:
        self.log = log
        path = [str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
        environment = {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(ray_folder), "PYTHONPATH": os.pathsep.join(path)}
        self.process = child(  # it ends with us
            [sys.executable, "-c", PROGRAM, *options],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.segments: set[str] = set()  # of shared memory, as found before each kill; none may stay
        self.lines: list[tuple[float, str]] = []
        self._note("started")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._note(line.rstrip())

    def _note(self, line: str) -> None:
        self.lines.append((time.monotonic(), line))
        with self.log.open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def attack(
        self, kinds: Sequence[str], number: int, *, gap_seconds: float, stops: float, chance: random.Random
    ) -> list[Kill]:
        """Wait for the end of the run; meanwhile kill a process of one of `kinds` up to `number` times.

        The gaps are exponential with this mean, the first one from the first step on. The fraction `stops` is stopped
        instead, but not while a replacement starts: a start may take cluster.node_wait_seconds, and then ends the run.
        """
        kills: list[Kill] = []
        due = None
        while self.process.poll() is None:
            time.sleep(0.02)
            steps = [moment for moment, line in list(self.lines) if STEP.match(line)]
            now = time.monotonic()
            if now - self.lines[-1][0] > SILENT_SECONDS:
                break
            if due is None:
                due = now + chance.expovariate(1 / gap_seconds) if steps else None
            elif now >= due and len(kills) < number:
                due = None
                in_a_row = len([kill for kill in kills if kill.moment > steps[-1]])
                if in_a_row < IN_A_ROW:
                    kills += self._kill(kinds, 0 if in_a_row else stops, chance)
        return kills

    def _kill(self, kinds: Sequence[str], stops: float, chance: random.Random) -> list[Kill]:
        alive: dict[str, list[psutil.Process]] = {}
        for process in descendants():
            self.segments |= segments(process)
            kind = "driver" if process.pid == self.process.pid else kind_of(process)
            if kind in kinds:
                alive.setdefault(kind, []).append(process)
        if not alive:
            return []
        kind = chance.choice(sorted(alive))
        stop = kind in WORKERS and chance.random() < stops
        with contextlib.suppress(psutil.NoSuchProcess):
            chosen = chance.choice(alive[kind])
            chosen.send_signal(signal.SIGSTOP if stop else signal.SIGKILL)
            kill = Kill(kind=kind, how="stopped" if stop else "killed", moment=time.monotonic())
            self._note(f"=== {kill.kind} {chosen.pid} {kill.how}")
            return [kill]
        return []

    def end(self) -> int | None:
        """The exit status; None for a run that hung, which is killed."""
        hung = self.process.poll() is None
        self.process.kill()
        self.process.wait()
        self._reader.join(timeout=GONE_SECONDS)
        return None if hung else self.process.returncode


def kind_of(process: psutil.Process) -> str | None:
    """What a process of a run is; None for one that is not attacked, or is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        name, command = process.name(), process.cmdline()
        if process.status() == psutil.STATUS_STOPPED:
            return None
        for side in ("Learner", "Actor"):
            if command and command[0].startswith(f"ray::{side}"):
                return side.lower()
        if "actor.reward_pool" in command:
            return "reward"
        return name if name in RESTARTED else None
    return None


def descendants() -> list[psutil.Process]:
    """The living descendants of this process."""
    return [process for process in psutil.Process().children(recursive=True) if not _ended(process)]


def _ended(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.status() == psutil.STATUS_ZOMBIE:
            if process.ppid() == os.getpid():  # an orphan that we have adopted
                with contextlib.suppress(psutil.TimeoutExpired):
                    process.wait(0)
            return True
        return False
    return True


@contextlib.contextmanager
def nothing_left(ray_folder: Path) -> Iterator[list[str]]:
    """Yields a list, which after the block has what the block has left: processes, and files of Ray.

    This process must adopt orphans (common.process).
    """
    left: list[str] = []
    yield left
    deadline = time.monotonic() + GONE_SECONDS
    while (alive := descendants()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(f"process {process.pid} {' '.join(process.cmdline())[:80]}")
            process.kill()
    left += [str(path) for path in ray_folder.iterdir()]


def segments(process: psutil.Process) -> set[str]:
    """The shared memory that a process has mapped."""
    with contextlib.suppress(OSError):
        return set(re.findall("/dev/shm/.*$", Path(f"/proc/{process.pid}/maps").read_text(), re.MULTILINE))
    return set()
