"""The process of a tracker: reads a run folder as it grows, and sends what is new to W&B, MLflow or trackio.

python launch/recording/follower.py LIBRARY RUN. `trackers.py` starts it and reads its standard output: an empty line is
a sign of life, `!` precedes the reason of a failure, any other line is for the user. At the end of its standard input,
which the run's death brings too, it sends the rest and finishes. What the library prints is in the run folder's
tracker-LIBRARY.log; tracker-LIBRARY.json there has the id with which a resumed run continues, and the steps sent.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the checkout, not from launch/recording/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.files import NotWritten, write_whole
from common.metrics import is_count
from launch.recording.libraries import LIBRARIES, Run, flat, numbers

ID = r"[\w-][^/\\\x00-\x1f]*"  # no path to another folder, which begins with a dot or has a slash
SECONDS = 1.0  # between two looks at the files
END_SECONDS = 60  # for what is left to send when the run has ended
MAX_SAMPLES = 16  # rows of the sample table of a step that is a multiple of run.sample_every
COLUMNS = ("prompt", "answer", "text", "reward", "advantage", "correct", "finish_reason")
EVALUATIONS, METRICS, ROLLOUTS = FILES = ("evaluations.jsonl", "metrics.jsonl", "rollouts.jsonl")


class Follower:
    """Sends the records of each step once, even if several processes in turn follow the run."""

    def __init__(self, library: str, folder: Path, say: Callable[[str], None]) -> None:
        config = flat(tomllib.loads((folder / "config.toml").read_text()), ".")
        self.folder = folder
        self.say = say
        self.state = folder / f"tracker-{library}.json"
        id, sent = self._before()
        self.sent = dict.fromkeys(FILES, -1) | sent  # the last step of each file
        self.read = dict.fromkeys(FILES, 0)  # bytes
        self.sample_every = config["run.sample_every"]
        self.samples: list[dict[str, Any]] = []  # of one step, whose lines may still be being written
        self.library = LIBRARIES[library](Run(folder=folder, config=config, id=id, say=say))
        self._save()

    def _before(self) -> tuple[str | None, dict[str, int]]:
        """The id of the tracker's run, and the steps sent, from the follower before this one; None without any.

        Raises ValueError for what none has written: the folder may come from a stranger, and an id may become a path.
        """
        if not self.state.exists():
            return None, {}
        state = json.loads(self.state.read_text())
        id, sent = (state.get("id"), state.get("sent")) if isinstance(state, dict) else (None, None)
        if not (isinstance(id, str) and re.fullmatch(ID, id) and isinstance(sent, dict)):
            raise ValueError(f"{self.state} holds no run of a tracker; remove it to start another one")
        return id, {name: step for name, step in sent.items() if name in FILES and is_count(step)}

    def send(self) -> None:
        """Send what is new. A sample table is sent when it is full, or the lines of a later step are there."""
        for record in self._new(EVALUATIONS):
            self._mark(EVALUATIONS, record["step"])
            values = numbers({"evaluation": {name: value for name, value in record.items() if name != "step"}})
            self.library.log(record["step"], values)
        for record in self._new(METRICS):
            self._mark(METRICS, record["step"])
            self.library.log(record.pop("step"), numbers(record))
        for record in self._new(ROLLOUTS) if self.sample_every else ():
            if self.samples and self.samples[0]["step"] != record["step"]:
                self._send_samples()
            if record["step"] % self.sample_every == 0 and len(self.samples) < MAX_SAMPLES:
                self.samples.append({column: record.get(column) for column in ("step", *COLUMNS)})
        if len(self.samples) == MAX_SAMPLES:
            self._send_samples()

    def finish(self, *, complete: bool) -> None:
        """Send the rest, and a report if the run folder has one."""
        self.send()
        if self.samples:
            self._send_samples()
        report = self.folder / "report.html"
        if complete and report.exists():
            self.library.report(report)
        self.library.finish(complete=complete)

    def _new(self, name: str) -> Iterator[dict[str, Any]]:
        """The records that were written since the last call, of steps that were not sent."""
        if not (self.folder / name).exists():
            return
        with (self.folder / name).open("rb") as file:
            file.seek(self.read[name])
            for line in file:
                if not line.endswith(b"\n"):  # it is being written
                    return
                self.read[name] += len(line)
                self.say("")
                record = json.loads(line)
                if record["step"] > self.sent[name]:
                    yield record

    def _send_samples(self) -> None:
        step = self.samples[0]["step"]
        self._mark(ROLLOUTS, step)
        self.library.table(step, "samples", [{column: row[column] for column in COLUMNS} for row in self.samples])
        self.samples = []

    def _mark(self, name: str, step: int) -> None:
        """Count a step as sent. This comes before it is: a crash in between loses it, and never sends it twice."""
        self.say("")
        self.sent[name] = step
        self._save()

    def _save(self) -> None:
        try:
            write_whole(self.state, json.dumps({"id": self.library.id, "sent": self.sent}) + "\n")
        except NotWritten as error:  # its advice is for a run that ends
            raise OSError(str(error).partition(";")[0]) from None


class RunsEnd:
    """The end of standard input, waited for in the background; it says whether the run is complete."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.complete = False
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        self.complete = sys.stdin.buffer.read() == b"complete"
        signal.alarm(END_SECONDS + 5)  # ends a process that hangs, if nobody else does: the run may be dead
        self.reached.set()


def main(library: str, folder: str) -> None:
    """Follow the run in `folder` to its end."""
    os.nice(10)  # the run's own processes come first
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the log: what the library prints is not for the display

    def say(line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the run is dead
            print(line, file=answers)

    end = RunsEnd()
    try:
        follower = Follower(library, Path(folder), say)
        while not end.reached.wait(SECONDS):
            say("")
            follower.send()
        follower.finish(complete=end.complete)
    except Exception as error:
        first, *_ = str(error).strip().splitlines() or [""]
        say(f"!{type(error).__name__}: {first[:300]}")
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
