"""Run folders that grow, their trackers, and a library in W&B's place that fails as it is told."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import run_folders

from common.config import Config, with_values
from common.metrics import JsonLines
from launch.recording import trackers

CHATTER = "the library's own words"


def written(folder: Path) -> Path:
    """The folder of a run that makes sample tables of every second step, and has no records yet."""
    return run_folders.write(folder, rewards=(), steps=5, settings={"run": {"sample_every": 2}})


def record(folder: Path, *steps: int, offset: float = 0.0, seconds: float = 0.0) -> None:
    """Append the records of steps as a run does, `seconds` apart: 20 rollouts each, an evaluation at even ones."""
    for step in steps:
        for name, records in {
            "metrics.jsonl": [{"step": step, "reward/mean": step + offset, "kl/mean": None, "reward/parts/a@b": 0.5}],
            "rollouts.jsonl": [run_folders.rollout(step, index // 4, index) for index in range(20)],
            "evaluations.jsonl": [
                {"step": step, "pass_at_1": step / 8, "wilson95": [0.0, 1.0], "sets": {"x": {"n": 3}}}
            ],
        }.items():
            if name != "evaluations.jsonl" or step % 2 == 0:
                file = JsonLines(folder / name)
                file.write(*records)
                file.close()
        time.sleep(seconds)


class Heard:
    """What a tracker had the run print."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []


@contextlib.contextmanager
def tracked(folder: Path, name: str, *, complete: bool = True) -> Iterator[tuple[trackers.Tracker, Heard]]:
    """A tracker of the run in `folder`, from before its first record of now to its end."""
    heard = Heard()
    config = with_values(Config(), {"run.tracker": (name,)})
    [tracker] = trackers.start(config, folder, warn=heard.warnings.append, note=heard.notes.append)
    yield tracker, heard
    tracker.end(complete=complete)
    tracker.close()


STUB = f"""
import os, signal, sys, time

for file in (sys.stdout, sys.stderr):
    print({CHATTER!r}, file=file)

def login(prompt): return True
def init(**_):
    {{init}}
    return Run()

class Settings:
    def __init__(self, **_): pass

class Table:
    def __init__(self, *_, **__): pass
Html = Table

class Run:
    id = "x"
    def define_metric(self, *_, **__): pass
    def log(self, row):
        {{log}}
        with open(os.environ["STUB_LOG"], "a") as file: print(row.get("step", min(row)), file=file)
    def finish(self, exit_code):
        {{finish}}
        with open(os.environ["STUB_LOG"], "a") as file: print("exit", exit_code, file=file)
"""


def install(folder: Path, **what: str) -> None:
    """Make `folder` one from which `import wandb` takes the stub, with code for init, log and finish.

    It appends to the file $STUB_LOG: a line for each log, with the step or without one the name, and the exit code.
    """
    (folder / "wandb").mkdir(parents=True)
    code = STUB.format(**{"init": "pass", "log": "pass", "finish": "pass"} | what)
    (folder / "wandb" / "__init__.py").write_text(code)
