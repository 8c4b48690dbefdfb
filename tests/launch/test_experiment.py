"""The command line of a grid: what a dry run prints, and the one line for whatever is wrong."""

from pathlib import Path

import pytest
from small_grid import GRID

from common.config import dump, with_values
from launch import experiment
from launch.experiments import grid, runner
from learner import checkpoint


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the grid, in which no cell may start."""
    (tmp_path / "grid.toml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("a cell would have been started"))
    return tmp_path


PLANNED = {"learner.recompute": "none", "learner.micro_batch_tokens": 4096}  # what the memory plan sets


def written(cell: grid.Cell, *checkpoints: int) -> Path:
    """The folder of a run that began, with checkpoints after these steps."""
    folder = cell.config.run.dir
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(dump(with_values(cell.config, PLANNED)))
    for step in checkpoints:
        with checkpoint.written_whole(folder / "checkpoints" / checkpoint.name(step)):
            pass
    return folder


def test_a_dry_run_prints_what_each_cell_will_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, torn = grid.cells(Path("grid.toml"), Path("runs/grid"))
    written(good, 1, 2, 3)
    written(bad)
    written(torn, 2)
    assert experiment.main(["--config", "grid.toml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["good_seed-1: finished", "bad_seed-1: start", "torn_seed-1: resume"]
    assert lines[-1] == "# 3 cells of 3 steps, 2 to run"
    assert (bad.config.run.dir / "config.toml").exists()  # a dry run deletes nothing


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "--config is missing; name a grid, such as launch/configs/grids/main_comparison.toml"),
        (["--config"], "argument --config: expected one argument; see --help"),
        (["--config", "grid.toml", "--cores", "0"], "--cores 0 is not a number of processors; give 1 or more"),
        (["--config", "grid.toml", "--cores", "half"], "argument --cores: invalid int value: 'half'; see --help"),
        (["--config", "grid.toml", "--scale", "gpu"], "--scale gpu is not in grid.toml; leave it out"),
        (["--config", "grid.toml", "--run.stepps", "3"], "unknown option --run.stepps; did you mean --run.steps?"),
        (["--config", "grid.toml", "--model.path", "/no/model"], "model.path=/no/model is not a directory"),
        (["--config", "grid.toml", "--task.gym", "chain_summ"], "unknown reasoning-gym data set task.gym=chain_summ"),
        (["--config", "grid.toml", "--run.steps", "4"], "run.steps=4 differs from 3 of the run in runs/grid/good_seed"),
        (["--config", "grid.toml", "--dir", "other"], "run.dir=other/torn_seed-1 is not empty"),
    ],
)
def test_whatever_is_wrong_is_one_line_before_any_cell_starts(
    options: list[str], line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the one bad cell is finished (other steps), or the last (a folder that no run made)."""
    written(grid.cells(Path("grid.toml"), Path("runs/grid"))[0], 3)
    (here / "other" / "torn_seed-1").mkdir(parents=True)
    (here / "other" / "torn_seed-1" / "thesis.tex").write_text("mine")
    assert experiment.main(options) == 2
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1


def test_what_is_wrong_with_the_last_variant_alone_is_found_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "grid.toml").write_text(GRID.replace('"sa-ah-grpo" }', '"sa-ah-grpo" }, model = { lora_targets = ["w"] }'))
    assert experiment.main(["--config", "grid.toml"]) == 2
    assert capsys.readouterr().err.startswith("model.lora_targets: w is not a linear module of the model")


def test_a_second_driver_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with runner.alone_in(Path("runs/grid")):
        assert experiment.main(["--config", "grid.toml"]) == 2
    assert capsys.readouterr().err.startswith("--dir runs/grid is in use by another experiment")
