"""run.tracker in a whole run, by launch/run.py: real plan, loop and learner; the library is a stub."""

import local_run
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.metrics import read_lines
from launch import loop, run
from launch.recording.recorder import Recorder

pytestmark = pytest.mark.slow

BOTH = ("--run.tracker", '["tensorboard", "wandb"]')
FAIL = "if row['step'] == 2: raise ConnectionError('no network')"


@pytest.fixture
def start(here, monkeypatch, capsys):
    """A function that starts a run of four steps in here/NAME; returns its status and the lines of its output."""
    local_run.install(monkeypatch)
    model = local_run.save_model(here / "model")

    def start(name: str, *more: str) -> tuple[int, list[str]]:
        status = run.main(local_run.options(model, here / name, *more))
        out, err = capsys.readouterr()
        return status, [*out.splitlines(), *err.splitlines()]

    return start


def comparable(folder, name):
    return [local_run.comparable(record) for record in read_lines(folder / name)]


def test_a_failing_tracker_changes_nothing_but_a_warning(start, stub, here):
    stub(log=FAIL)
    status, lines = start("failing", *BOTH)
    assert status == 0
    [warning] = [line for line in lines if "wandb" in line]
    assert warning.startswith("warning: run.tracker=wandb is off from here on (ConnectionError: no network)")
    assert start("none", "--run.tracker", "[]")[0] == 0
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
        assert comparable(here / "failing", name) == comparable(here / "none", name)
        assert comparable(here / "none", name)
    assert not (here / "none" / "tensorboard").exists()
    events = EventAccumulator(str(here / "failing" / "tensorboard"))
    events.Reload()
    assert {event.step for event in events.Scalars("reward/mean")} == {1, 2, 3, 4}


def test_a_resumed_run_sends_what_is_new(start, stub, here, monkeypatch):
    """It fails after step 3 and resumes after step 2. Its evaluations are at 0, 2 and 4."""
    logged = stub()
    step = Recorder.step

    def failing(self, number, *arguments, **options):
        step(self, number, *arguments, **options)
        if number == 3:
            raise loop.RunFailed("for the test")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "step", failing)
        assert start("run", *BOTH)[0] == 1
    before = logged.read_text().split()
    assert (sorted(before[:-2]), before[-2:]) == (["0", "1", "2", "2", "3"], ["exit", "1"])
    status, lines = start("run", "--run.resume", *BOTH)
    assert status == 0, lines
    assert [line for line in lines if "wandb" in line] == []
    assert logged.read_text().split()[len(before) :] in (["4", "4", "exit", "0"],)
