"""The trackers of a run (run.tracker). TensorBoard is written here; each of W&B, MLflow and trackio by its own process.

That process (`follower.py`) reads the run folder as it grows. So nothing that a library does, wait, print, raise or
hang, reaches the run: a tracker that fails is one warning, and is off from there on.
"""

import contextlib
import importlib.util
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import text

from common.config import Config, dump
from common.files import Appended, Warn
from common.metrics import read_lines
from launch.recording import follower
from launch.recording.libraries import numbers

HANG_SECONDS = 120  # without a sign of life; longer than W&B tries to reach its server
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny sqlalchemy alembic", "trackio": "trackio"}


class Tracker(Protocol):
    """Where the records of a run go besides its folder. No method raises or waits, `close` apart."""

    def step(self, step: int, metrics: Mapping[str, float], rollouts: Sequence[Mapping[str, Any]]) -> None:
        """An optimizer step's metrics, and its records in rollouts.jsonl."""

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """A record in evaluations.jsonl."""

    def end(self, *, complete: bool) -> None:
        """Nothing more comes. `complete`: the run has ended as it should."""

    def close(self) -> None:
        """After `end`: wait until all is sent, at most follower.END_SECONDS."""


def missing(names: Sequence[str]) -> str | None:
    """What to install for the trackers `names`; None if nothing."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder ./wandb would be found as a package without a file
            return f"run.tracker={name} needs a library that is not installed; pip install {PACKAGES[name]}"
    return None


def start(config: Config, folder: Path, *, warn: Warn, note: Callable[[str], None]) -> list[Tracker]:
    """The trackers of run.tracker, for a run folder that has its config.toml and, if it is resumed, is rewound."""
    trackers: list[Tracker] = []
    for name in dict.fromkeys(config.run.tracker):
        if name == "tensorboard":
            trackers.append(TensorBoard(folder, config, warn))
        else:
            trackers.append(Process(name, folder, warn=warn, note=note))
    return trackers


class TensorBoard:
    """A file in tensorboard/. What cannot be written there is a warning each time, and no more."""

    def __init__(self, folder: Path, config: Config, warn: Warn) -> None:
        self.sample_every = config.run.sample_every
        next_step = max((record["step"] for record in read_lines(folder / "metrics.jsonl")), default=0) + 1
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self.file = Appended(folder / "tensorboard" / name, warn)
        # TensorBoard then forgets the steps that a resumed run makes again.
        session = _event(step=next_step, session_log=SessionLog(status=SessionLog.START))
        settings = _event(step=next_step - 1, summary=text("config", _code(dump(config))))
        self.start = _event(file_version="brain.Event:2") + session + settings  # written with the first record

    def step(self, step: int, metrics: Mapping[str, float], rollouts: Sequence[Mapping[str, Any]]) -> None:
        self._append(step, metrics)
        if self.sample_every and step % self.sample_every == 0:
            shown = "\n\n".join(map(_sample, rollouts[: follower.MAX_SAMPLES]))
            self.file.append(_event(step=step, summary=text("samples", shown)))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        values = {name: value for name, value in record.items() if name != "step"}
        self._append(record["step"], numbers({"evaluation": values}))

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        if self.file.append(self.start + _event(step=step, summary=Summary(value=scalars))):
            self.start = b""

    def end(self, *, complete: bool) -> None:
        self.file.close()

    def close(self) -> None:
        """Nothing: all is on the disk."""


def _event(**fields: Any) -> bytes:
    """One record of TensorBoard's format."""
    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return record.getvalue()


def _code(content: str) -> str:
    """A block of code in Markdown, which TensorBoard's texts are."""
    return "".join(f"    {line}\n" for line in content.splitlines())


def _sample(rollout: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name} {rollout[name]:.3g}" for name in ("reward", "advantage") if name in rollout)
    return f"{values or 'no reward'}\n\n{_code(rollout['prompt'])}\n\n{_code(rollout['text'])}"


class Process:
    """A library's process. Only the files of the run folder lead to it; this class listens whether it lives."""

    def __init__(self, name: str, folder: Path, *, warn: Warn, note: Callable[[str], None]) -> None:
        self.name = name
        self.log = folder / f"tracker-{name}.log"
        self.warn = warn
        self.note = note
        self.reason: str | None = None
        self.heard_at = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None
        try:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [sys.executable, follower.__file__, name, str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # no Ctrl-C of the terminal, and none to ask for a password
                )
        except OSError as error:
            self._off(str(error))

    def step(self, step: int, metrics: Mapping[str, float], rollouts: Sequence[Mapping[str, Any]]) -> None:
        self._listen()

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self._listen()

    def _listen(self) -> None:
        if self.process is None:
            return
        self._hear()
        if (status := self.process.poll()) is not None:
            self._hear()
            self._off(self.reason or f"it ended with status {status}")
        elif time.monotonic() - self.heard_at > HANG_SECONDS:
            self._off(f"no sign of life for {HANG_SECONDS} s")

    def _hear(self) -> None:
        """Take what the process has answered."""
        assert self.process is not None and self.process.stdout is not None
        file = self.process.stdout.fileno()
        os.set_blocking(file, False)
        with contextlib.suppress(BlockingIOError):
            while answer := os.read(file, 65536):
                self.heard_at = time.monotonic()
                for line in answer.decode(errors="replace").splitlines():
                    if line.startswith("!"):
                        self.reason = line[1:]
                    elif line:
                        self.note(f"{self.name}: {line}")

    def end(self, *, complete: bool) -> None:
        if self.process is None:
            return
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            if complete:
                os.write(self.process.stdin.fileno(), b"complete")
        self.process.stdin.close()
        self.heard_at = time.monotonic()

    def close(self) -> None:
        if self.process is None:
            return
        try:
            status = self.process.wait(max(0.0, self.heard_at + follower.END_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._off(f"it has not finished within {follower.END_SECONDS} s")
        else:
            self._hear()
            if status:
                self._off(self.reason or f"it ended with status {status}")

    def _off(self, reason: str) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(1)
        self.process = None
        self.warn(f"run.tracker={self.name} is off from here on ({reason}); {self.log} has more, the run goes on")
