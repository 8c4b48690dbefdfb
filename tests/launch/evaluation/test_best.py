"""Which checkpoint is the best, which are deleted, and when a run stops; all of it from the files of the run."""

import json
import math
from pathlib import Path

import pytest

from common.config import Config, EvaluationConfig, RunConfig
from launch.evaluation import best
from launch.evaluation.best import best_step
from learner import checkpoint


def config(folder: Path, metric: str | None = "pass_at_1", **run) -> Config:
    sets = ("math500:x",) if metric and "/" in metric else ()
    return Config(run=RunConfig(dir=folder, **run), evaluation=EvaluationConfig(best=metric, sets=sets))


def evaluations(folder: Path, **values: float) -> None:
    """evaluations.jsonl with these values of pass_at_1; `s10` is that of step 10."""
    records = [{"step": int(step[1:]), "pass_at_1": value} for step, value in values.items()]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def save(folder: Path, step: int) -> Path:
    """A checkpoint whose content is its step."""
    saved = folder / "checkpoints" / checkpoint.name(step)
    with checkpoint.written_whole(saved) as whole:
        (whole / "run_state.json").write_text(json.dumps({"step": step}))
    return saved


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def step_of_best(folder: Path) -> int:
    assert checkpoint.damage(folder / "checkpoints" / "best") is None
    return json.loads((folder / "checkpoints" / "best" / "run_state.json").read_text())["step"]


def records(*values: float) -> list[dict]:
    return [{"step": 10 * i, "pass_at_1": value} for i, value in enumerate(values)]


def test_the_best_is_the_first_of_the_highest_after_training_began():
    assert best_step(records(0.9, 0.2, 0.5, 0.5, 0.1), "pass_at_1") == 20
    assert best_step(records(0.9), "pass_at_1") is None
    assert best_step(records(0.9, math.nan, 0.1), "pass_at_1") == 20
    assert best_step(records(0.9, math.nan), "pass_at_1") is None
    assert best_step([{"step": 10, "pass_at_1": True}, {"step": 20, "pass_at_1": None}], "reward_mean") is None


def test_the_best_by_a_set():
    found = [
        {"step": step, "pass_at_1": 0.1 * step, "sets": {"math500": {"pass_at_1": -0.1 * step}}} for step in (1, 2, 3)
    ]
    assert best_step(found, "math500/pass_at_1") == 1
    assert best_step(found, "pass_at_1") == 3
    assert best_step(found, "svamp/pass_at_1") is None  # evaluated since the run was resumed, not yet


def test_records_that_no_run_writes_have_no_value():
    hostile = [3, None, [], "x", {"math500": 3}, {"math500": {"pass_at_1": 10**400}}, {"math500": {"pass_at_1": True}}]
    found = [{"step": step, "sets": sets} for step, sets in enumerate(hostile, start=1)]
    assert best_step(found, "math500/pass_at_1") is None
    assert best_step([{"step": 1, "pass_at_1": 10**400}, {"step": 2, "pass_at_1": 0.1}], "pass_at_1") == 2


def test_a_run_keeps_the_best_and_the_newest(tmp_path):
    """Steps 10 to 50, of which 20 is the best: at every moment the best and the newest two are there."""
    chosen = config(tmp_path, keep_checkpoints=2)
    passes = {"s0": 0.9, "s10": 0.3, "s20": 0.5, "s30": 0.4, "s40": 0.5, "s50": 0.1}
    left = []
    for count, step in enumerate((10, 20, 30, 40, 50), start=2):
        evaluations(tmp_path, **dict(list(passes.items())[:count]))
        assert best.is_best(chosen, step) == (step in (10, 20))
        best.tidy(chosen, save(tmp_path, step))
        left.append((step_of_best(tmp_path), names(tmp_path)))
        assert checkpoint.latest(tmp_path / "checkpoints").name == checkpoint.name(step)  # never `best`
    assert left == [
        (10, ["best", "step-000010"]),
        (20, ["best", "step-000010", "step-000020"]),
        (20, ["best", "step-000020", "step-000030"]),
        (20, ["best", "step-000030", "step-000040"]),
        (20, ["best", "step-000040", "step-000050"]),
    ]


def test_without_the_options_nothing_is_kept_or_deleted(tmp_path):
    evaluations(tmp_path, s10=0.3)
    chosen = config(tmp_path, metric=None)
    best.tidy(chosen, save(tmp_path, 10))
    assert names(tmp_path) == ["step-000010"]
    assert not best.is_best(chosen, 10)
    assert best.stopped(chosen, 10) is None


def test_a_best_that_a_crash_has_kept_from_being_copied_is_copied_after_resuming(tmp_path):
    chosen = config(tmp_path, keep_checkpoints=1)
    evaluations(tmp_path, s10=0.3)
    best.tidy(chosen, save(tmp_path, 10))
    evaluations(tmp_path, s10=0.3, s20=0.5)  # then a crash after the checkpoint of step 20
    saved = save(tmp_path, 20)
    best.tidy(chosen, saved)
    assert (step_of_best(tmp_path), names(tmp_path)) == (20, ["best", "step-000020"])


def test_a_step_that_is_made_again_replaces_its_best(tmp_path):
    """After resuming before it, the same step may have other numbers (max_staleness above 0)."""
    chosen = config(tmp_path)
    evaluations(tmp_path, s10=0.3)
    best.tidy(chosen, save(tmp_path, 10))
    with checkpoint.written_whole(tmp_path / "checkpoints" / "step-000010") as whole:
        (whole / "run_state.json").write_text('{"step": 10, "again": true}')
    best.tidy(chosen, tmp_path / "checkpoints" / "step-000010")
    assert "again" in (tmp_path / "checkpoints" / "best" / "run_state.json").read_text()


def test_a_damaged_checkpoint_never_becomes_the_best(tmp_path):
    """Copied, it would get checksums that fit."""
    chosen = config(tmp_path)
    evaluations(tmp_path, s10=0.3)
    best.tidy(chosen, save(tmp_path, 10))
    evaluations(tmp_path, s10=0.3, s20=0.5)
    saved = save(tmp_path, 20)
    (saved / "run_state.json").write_text('{"step": 21}')
    best.tidy(chosen, saved)
    assert (step_of_best(tmp_path), names(tmp_path)) == (10, ["best", "step-000010", "step-000020"])


def test_patience_counts_the_evaluations_since_the_best(tmp_path):
    chosen = config(tmp_path, patience=2)
    evaluations(tmp_path, s0=0.9, s10=0.3, s20=0.2, s30=0.4, s40=0.4, s50=0.1)
    assert [best.stopped(chosen, step) is not None for step in (0, 10, 20, 30, 40, 50)] == [False] * 5 + [True]
    assert best.stopped(chosen, 50) == (
        "stopped after step 50: 2 evaluations without a better pass_at_1, 0.400 at step 30 is the best (run.patience=2)"
    )
    assert best.stopped(config(tmp_path, patience=3), 50) is None


def test_patience_with_numbers_that_are_none(tmp_path):
    evaluations(tmp_path, s0=0.9, s10=math.nan, s20=math.nan)
    assert "2 evaluations without a better pass_at_1, none has one" in best.stopped(config(tmp_path, patience=2), 20)
    assert best.stopped(config(tmp_path, patience=2), 10) is None


@pytest.mark.parametrize("patience", [1, 2])
def test_a_record_of_a_later_step_does_not_count(tmp_path, patience):
    """A crash may come between an evaluation and its checkpoint; the run resumes before it."""
    evaluations(tmp_path, s10=0.3, s20=0.2)
    assert best.stopped(config(tmp_path, patience=patience), 10) is None
