"""A worker that is killed at any point is replaced; the numbers are those of a run without losses, to the last bit."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import faults
import pytest
from local_run import comparable
from small_model import save_model

from launch import run
from launch.runtime import recovery, workers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Run = Callable[..., tuple[list[dict[str, float]], str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    save_model(folder)
    return folder


@pytest.fixture
def train(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs with the points armed; returns the metrics and what was printed."""
    path = [str(Path(faults.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))  # of the workers
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv(faults.VARIABLE, str(tmp_path))
    monkeypatch.setattr(workers, "Actor", faults.FaultyActor)
    monkeypatch.setattr(workers, "start", partial(workers.start, learner_class=faults.FaultyLearner))

    def train(name: str, points: Sequence[str], *more: str, steps: int = 4) -> tuple[list[dict[str, float]], str]:
        faults.arm(tmp_path, points)
        options = [
            *("--model.path", str(model), "--model.dtype", "float32", "--model.lora_dropout", "0.3"),
            *("--task.name", "letters", "--task.num_train", "8", "--task.num_eval", "2", "--run.steps", str(steps)),
            *("--run.prompts_per_step", "2", "--run.evaluate_every", "2", "--run.checkpoint_every", "2"),
            *("--run.sample_every", "0", "--learner.learning_rate", "1e-3", "--actor.group_size", "2"),
            *("--actor.max_tokens", "8", "--actor.part_prompts", "1", "--run.dir", str(tmp_path / name), *more),
        ]
        capsys.readouterr()
        assert run.main(options) == 0
        assert not [point for point in points if (tmp_path / point).exists()], "every point was reached"
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [comparable(json.loads(line)) for line in lines], capsys.readouterr().out

    return train


def equal(got: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        numbers = {name: value for name, value in ours.items() if not name.startswith("recovery/")}
        assert numbers == pytest.approx(
            {name: value for name, value in theirs.items() if not name.startswith("recovery/")},
            rel=0,
            abs=0,
            nan_ok=True,
        )


def test_a_killed_learner_and_a_killed_actor_change_no_number(train: Run) -> None:
    expected, _ = train("whole", [], steps=3)
    got, printed = train("broken", ["reduced-1-0", "score-2"], steps=3)
    equal(got, expected)
    assert [line["recovery/learner"] for line in got] == [0, 1, 0]
    assert sum(line["recovery/actor"] for line in got) == 1
    assert "the learner was lost (ActorDiedError); replaced in" in printed
    assert "actor 0 was lost (ActorDiedError); replaced in" in printed


POINTS = {
    "learner": ["update-0-0", "reduce-1-0", "reduced-2-0", "snapshot-3", "publish-4-0", "update-4-0", "restore-0"],
    "actor": ["sample-0", "load-1", "loaded-2", "score-3", "sample-4", "sample-5"],
    "one of two ranks": ["update-0-1", "reduce-1-0", "reduced-2-1", "snapshot-3", "publish-4-0", "update-4-1"],
}


@pytest.mark.long
@pytest.mark.parametrize("side", POINTS)
def test_every_point_of_either_side(train: Run, side: str) -> None:
    more = ["--learner.num_ranks", "2", "--learner.gradient_accumulation", "2"] if "ranks" in side else []
    expected, _ = train("whole", [], *more, steps=6)
    got, _ = train("broken", POINTS[side], *more, steps=6)
    equal(got, expected)
    assert sum(line["recovery/learner"] + line["recovery/actor"] for line in got) >= len(POINTS[side]) - 1


@pytest.mark.long
@pytest.mark.parametrize("points", [["reduced-2-0"], ["sample-2"]])
def test_a_worker_that_stops_is_replaced_after_a_limit_that_follows_from_the_steps(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: list[str]
) -> None:
    monkeypatch.setattr(recovery, "SPARE_SECONDS", 5.0)
    expected, _ = train("whole", [], steps=4)
    arm = faults.arm
    monkeypatch.setattr(faults, "arm", lambda folder, points: arm(folder, points, faults.STOP))
    got, printed = train("broken", points, steps=4)
    equal(got, expected)
    assert "was lost (GetTimeoutError); replaced in" in printed
