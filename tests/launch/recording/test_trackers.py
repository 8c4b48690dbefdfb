"""Trackers: TensorBoard, read back; and that no failure of a library reaches the run."""

import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import run_folders
import tracker_readers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tracked import CHATTER, record, tracked, written

from common.config import Config, with_values
from common.metrics import JsonLines, keep_lines
from launch import report, run
from launch.recording import follower, trackers

ROOT = Path(__file__).resolve().parents[3]


def test_without_an_api_key_wandb_is_offline_and_says_so_once(here):
    folder = written(here / "run")
    record(folder, 1, 2)
    with tracked(folder, "wandb") as (_, heard):
        pass
    assert heard.warnings == []
    assert heard.notes == [
        f"wandb: no API key, so the run stays in {folder}/wandb; wandb login and wandb sync send it later"
    ]
    assert tracker_readers.wandb(folder / "wandb").of("reward/mean") == [(1, 1.0), (2, 2.0)]


def test_wandb_never_asks_for_a_login(here, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with tracked(written(here / "run"), "wandb") as (_, heard):
        pass
    [warning] = heard.warnings
    assert "run.tracker=wandb is off" in warning
    assert "API key" in warning


NO_SPACE = "raise OSError(28, 'No space left on device')"
HANG = "time.sleep(600)"


@pytest.mark.parametrize(
    ("where", "what", "reason"),
    [
        ("init", NO_SPACE, "OSError: [Errno 28] No space left on device"),
        ("log", NO_SPACE, "OSError: [Errno 28] No space left on device"),
        ("finish", "raise ConnectionError('no network')", "ConnectionError: no network"),
        ("log", "os._exit(3)", "it ended with status 3"),
        ("log", "os.kill(os.getpid(), signal.SIGKILL)", "it ended with status -9"),
        ("init", HANG, "no sign of life for 1 s"),
        ("log", HANG, "no sign of life for 1 s"),
        ("finish", HANG, "it has not finished within 1 s"),
    ],
)
def test_whatever_a_library_does_is_one_warning(stub, here, monkeypatch, capfd, where, what, reason):
    """And the run's own calls return at once, before it and after it."""
    stub(**{where: what})
    if what == HANG:
        monkeypatch.setattr(trackers, "HANG_SECONDS" if where != "finish" else "UNUSED", 1, raising=False)
        monkeypatch.setattr(follower, "END_SECONDS", 1)
    folder = written(here / "run")
    record(folder, 1)
    longest = 0.0
    with tracked(folder, "wandb") as (tracker, heard):
        deadline = time.monotonic() + (2 if where == "finish" else 20)
        while not heard.warnings and time.monotonic() < deadline:
            before = time.perf_counter()
            tracker.step(1, {}, [])
            longest = max(longest, time.perf_counter() - before)
            time.sleep(0.05)
        process = tracker.process
        tracker.step(2, {}, [])
        tracker.evaluation({"step": 2})
    assert heard.warnings == [
        f"run.tracker=wandb is off from here on ({reason}); {folder}/tracker-wandb.log has more, the run goes on"
    ]
    assert longest < 0.5
    assert process is None or process.poll() is not None
    assert (heard.notes, *capfd.readouterr()) == ([], "", "")
    assert (folder / "tracker-wandb.log").read_text().count(CHATTER) == 2


def test_a_tracker_of_a_killed_run_sends_the_rest_and_ends(stub, here):
    logged = stub()
    folder = written(here / "run")
    record(folder, 1, 2, 3)
    code = (
        "import os, signal, sys; from pathlib import Path; from launch.recording import trackers\n"
        "tracker = trackers.Process('wandb', Path(sys.argv[1]), warn=print, note=print)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    paths = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    subprocess.run([sys.executable, "-c", code, str(folder)], env={**os.environ, "PYTHONPATH": paths}, check=False)
    deadline = time.monotonic() + 20
    while "exit" not in (logged.read_text() if logged.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert logged.read_text().split("\n") == ["2", "1", "2", "3", "2", "exit 1", ""]


def test_the_report_of_a_run_that_has_ended_is_sent_later(stub, here):
    """As the README says: by the follower alone, which sends nothing again."""
    logged = stub()
    folder = written(here / "run")
    record(folder, 1)
    with tracked(folder, "wandb"):
        pass
    assert logged.read_text().split("\n") == ["1", "exit 0", ""]
    assert report.main([str(folder)]) == 0
    command = [sys.executable, follower.__file__, "wandb", str(folder)]
    subprocess.run(command, input=b"complete", check=True, timeout=60, capture_output=True)
    assert logged.read_text().split("\n") == ["1", "exit 0", "report", "exit 0", ""]


def test_a_run_without_a_writable_folder_goes_on(here):
    (here / "run").write_text("a file")
    with tracked(here / "run", "wandb") as (tracker, heard):
        tracker.step(1, {}, [])
    [warning] = heard.warnings
    assert warning.startswith("run.tracker=wandb is off from here on ([Errno 20] Not a directory")


def test_a_missing_library_is_one_line_before_the_run(here, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "PACKAGES", {"nowhere": "this-package"})
    (here / "nowhere").mkdir()  # a folder in the working directory, like W&B's own, is no library
    monkeypatch.syspath_prepend(str(here))
    assert trackers.missing(["nowhere"]) == (
        "run.tracker=nowhere needs a library that is not installed; pip install this-package"
    )
    assert trackers.missing(["tensorboard", "json"]) is None
    monkeypatch.setattr(trackers, "missing", lambda names: f"{names[0]} is missing")
    assert run.main(["--run.tracker", '["trackio"]', "--dry-run"]) == 2
    assert capsys.readouterr() == ("", "trackio is missing\n")


def shown(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_shows_a_resumed_run_once(tmp_path, monkeypatch):
    """Steps 3 and 4 were made, and then made again from step 2 on: what the first run had written is forgotten."""
    for name, steps, value in (("first", (1, 2, 3, 4), 1.0), ("second", (3,), 2.0)):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)  # so that the second file has another name
        board = trackers.TensorBoard(tmp_path, Config(), pytest.fail)
        metrics = JsonLines(tmp_path / "metrics.jsonl")
        for step in steps:
            board.step(step, {"reward/mean": value, "kl/mean": float("nan")}, [])
            metrics.write({"step": step})
        board.end(complete=True)
        metrics.close()
        keep_lines(tmp_path / "metrics.jsonl", lambda record: record["step"] <= 2)
    points = shown(tmp_path).Scalars("reward/mean")
    assert [(e.step, e.value) for e in points] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert len(os.listdir(tmp_path / "tensorboard")) == 2


def test_tensorboard_has_config_evaluations_and_samples(tmp_path):
    board = trackers.TensorBoard(tmp_path, with_values(Config(), {"run.sample_every": 2}), pytest.fail)
    board.evaluation({"step": 0, "pass_at_1": 0.25, "wilson95": [0.0, 1.0], "sets": {"x": {"n": 3}}})
    for step in (1, 2):
        board.step(step, {"reward/mean": 1.0}, [run_folders.rollout(step, 0, index) for index in range(20)])
    board.end(complete=True)
    events = shown(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("evaluation/pass_at_1")] == [(0, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("evaluation/sets/x/n")] == [(0, 3.0)]
    [config] = events.Tensors("config/text_summary")
    assert '    dir = "runs/default"\n' in config.tensor_proto.string_val[0].decode()
    [samples] = events.Tensors("samples/text_summary")
    text = samples.tensor_proto.string_val[0].decode()
    assert samples.step == 2
    assert text.count("reward ") == follower.MAX_SAMPLES
    assert "reward 4.1, advantage 1.73\n\n    1 + 1 =\n" in text


def test_the_advice_names_the_packages_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, packages in trackers.PACKAGES.items():
        assert sorted(re.match(r"[\w-]+", each)[0] for each in extras[name]) == sorted(packages.split())
