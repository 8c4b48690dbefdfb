"""A grid's folder from a stranger: nothing outside of it is written or removed, and each fault is one line."""

import json
from pathlib import Path

import pytest
from small_grid import GRID

from common.config import dump, with_values
from launch import experiment
from launch.experiments import grid, runner
from learner import checkpoint


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the grid, of which one cell has begun; and a folder of the owner."""
    (tmp_path / "grid.toml").write_text(GRID)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (tmp_path / "outside" / "config.toml").write_text("")  # so that it looks like a run that died early
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("a cell would have been started"))
    planned = {"learner.recompute": "none", "learner.micro_batch_tokens": 4096}
    good = grid.cells(Path("grid.toml"), Path("runs/grid"))[0]
    good.config.run.dir.mkdir(parents=True)
    (good.config.run.dir / "config.toml").write_text(dump(with_values(good.config, planned)))
    return tmp_path


LINKS = {
    ".lock": "secret",
    "good_seed-1.log": "secret",
    "bad_seed-1.log": "new",
    "bad_seed-1": ".",
    "torn_seed-1": "none",
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_a_grids_folder_is_refused(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (here / "runs" / "grid" / name).symlink_to(here / "outside" / LINKS[name])
    assert experiment.main(["--config", "grid.toml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"runs/grid/{name} is a symbolic link")
    assert err.count("\n") == 1
    assert sorted(path.name for path in (here / "outside").iterdir()) == ["config.toml", "secret"]
    assert (here / "outside" / "secret").read_text() == "secret"


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "checkpoints/step-000001"])
def test_a_link_in_a_cells_folder_is_refused(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    good = here / "runs" / "grid" / "good_seed-1"
    with checkpoint.written_whole(good / "checkpoints" / "step-000002"):
        pass
    if (good / name).is_dir():
        (good / name).rename(good / "moved")
    (good / name).symlink_to(here / "outside")
    if name == "checkpoints":  # the stranger's own has one, too
        with checkpoint.written_whole(here / "outside" / "step-000002"):
            pass
    before = {path: path.stat().st_mtime_ns for path in (here / "outside").rglob("*")}
    assert experiment.main(["--config", "grid.toml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"runs/grid/good_seed-1/{name} is a symbolic link")
    assert {path: path.stat().st_mtime_ns for path in (here / "outside").rglob("*")} == before


def test_a_cell_whose_checkpoints_are_all_damaged_is_not_emptied(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = here / "runs" / "grid" / "good_seed-1"
    with checkpoint.written_whole(good / "checkpoints" / "step-000002"):
        pass
    (good / "checkpoints" / "step-000002" / "more.json").write_text("{}")
    assert experiment.main(["--config", "grid.toml"]) == 2
    err = capsys.readouterr().err
    assert "no checkpoint in runs/grid/good_seed-1/checkpoints is whole: step-000002 is damaged: more.json" in err
    assert (good / "config.toml").exists()


def test_only_a_damaged_last_checkpoint_is_made_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cell does not count as finished."""
    good = here / "runs" / "grid" / "good_seed-1"
    for step in (2, 3):
        with checkpoint.written_whole(good / "checkpoints" / checkpoint.name(step)):
            pass
    assert experiment.main(["--config", "grid.toml", "--dry-run"]) == 0
    assert "good_seed-1: finished" in capsys.readouterr().out
    (good / "checkpoints" / "step-000003" / "checksums.json").unlink()
    assert experiment.main(["--config", "grid.toml", "--dry-run"]) == 0
    assert "good_seed-1: resume" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["text", None, [], {}, float("nan"), 1e308])
def test_progress_shows_what_is_a_number(here: Path, value: object) -> None:
    cell = grid.cells(Path("grid.toml"), Path("runs/grid"))[0]
    records = [{"step": 1, "reward/mean": value, "time/step_seconds": value}, {"step": 2, "reward/mean": 2.0}]
    (cell.config.run.dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shown = runner.progress(cell, "running")
    assert (shown.step, shown.steps) == (2, 3)
