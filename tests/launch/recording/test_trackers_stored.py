"""What W&B, MLflow and trackio store of a run that dies and is resumed, read back."""

import json
import os
from pathlib import Path

import pytest
import run_folders
import tracker_readers
from tracked import record, tracked, written

from launch.recording import follower, recorder, trackers


def stored(name: str, folder: Path) -> tracker_readers.Stored:
    run_id = json.loads((folder / f"tracker-{name}.json").read_text())["id"]
    if name == "wandb":
        return tracker_readers.wandb(folder / "wandb")
    if name == "trackio":
        return tracker_readers.trackio("horizon", run_id)
    return tracker_readers.mlflow(os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"), run_id)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "store"), [("wandb", None), ("mlflow", None), ("mlflow", "files"), ("trackio", None)])
def test_a_run_is_stored_whole_and_each_step_once(here, monkeypatch, capfd, name, store):
    """It dies after step 4, resumes after step 2 with other numbers, and ends with step 5."""
    pytest.importorskip(name, reason=f"{name} is not installed: pip install {trackers.PACKAGES[name]}")
    if store:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", (here / store).as_uri())
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    capfd.readouterr()
    folder = written(here / "run")
    record(folder, 1)
    with tracked(folder, name, complete=False) as (_, first):
        record(folder, 2, 3, 4, seconds=0.7)
    if name != "wandb":  # an offline file of W&B has the end of its process alone
        assert stored(name, folder).complete in (False, None)
    recorder.rewind(folder, 2)
    (folder / "report.html").write_text("<p>the report")
    with tracked(folder, name) as (_, second):
        record(folder, 3, 4, 5, offset=100.0)
    assert first.warnings == second.warnings == []
    assert capfd.readouterr() == ("", "")
    run = stored(name, folder)
    assert run.of("reward/mean") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 105.0)]
    assert run.of("evaluation/pass_at_1") == [(2, 0.25), (4, 0.5)]
    assert run.of("evaluation/sets/x/n") == [(2, 3), (4, 3)]
    assert run.of("kl/mean") == []
    assert len(set(run.ids)) == 1
    assert {key: str(value) for key, value in run.config.items() if "." in key} == {
        "run.dir": str(folder),
        "run.seed": "1",
        "run.steps": "5",
        "run.sample_every": "2",
        "model.path": "smollm2-135m-instruct",
        "method.name": "sa-ah-grpo",
        "method.alpha": "0.5",
    }
    expected = [run_folders.rollout(2, index // 4, index) for index in range(follower.MAX_SAMPLES)]
    assert run.tables.keys() == {2, 4}
    assert run.tables[2] == [{column: each[column] for column in follower.COLUMNS} for each in expected]
    assert run.report == "<p>the report"
    assert run.complete in (True, None)
