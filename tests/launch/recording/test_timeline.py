"""Who worked when, and how idle each device was: by hand, and against a count of small cells of time."""

import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from common.config import Config
from common.metrics import read_lines
from launch.recording.recorder import rewind
from launch.recording.timeline import ACTOR, SCORE, Span, StepTimes, Timeline, idle_fraction
from launch.runtime.channel import Published

PUBLISHED = Published(version=7, load_seconds=0.5, canary_version=7, canary_difference=0.0, canary_signal=0.0)
TIMES = StepTimes(started=100.0, taken=104.0, learned=107.0, drained=108.0, loaded=110.0, ended=110.0)


def config(layout: str, *, ranks: int = 1, actors: int = 1, tensor_parallel: int = 1) -> Config:
    made = tiny.config(num_ranks=ranks)
    changes = {
        "cluster": made.cluster.model_copy(update={"layout": layout}),
        "actor": made.actor.model_copy(update={"num_actors": actors, "tensor_parallel": tensor_parallel}),
    }
    return made.model_copy(update=changes)


def span(work: str, start: float, end: float, *, index: int = 0) -> Span:
    return Span(side=ACTOR, index=index, work=work, start=start, end=end, num_prompts=2, version=6)


def at(moment: float) -> StepTimes:
    """A step of ten seconds that begins at this moment."""
    return StepTimes(
        started=moment, taken=moment + 4, learned=moment + 7, drained=moment + 8, loaded=moment + 10, ended=moment + 10
    )


@pytest.mark.parametrize(
    ("busy", "idle"),
    [
        ([], 1.0),
        ([(10, 20)], 0.0),
        ([(0, 99)], 0.0),
        ([(0, 10), (20, 30)], 1.0),  # around the window
        ([(8, 12), (11, 14), (13, 13.5), (16, 17), (19, 25), (30, 40)], 0.4),  # busy 10-14, 16-17, 19-20
        ([(30, 40), (19, 25), (13, 13.5), (11, 14), (16, 17), (8, 12)], 0.4),  # in any order
        ([(12, 18), (13, 14), (15, 16)], 0.4),  # within one another
        ([(12, 18), (12, 18)], 0.4),  # twice the same
    ],
)
def test_the_idle_share_is_what_no_interval_covers(busy: list[tuple[float, float]], idle: float) -> None:
    assert idle_fraction(busy, 10, 20) == pytest.approx(idle)


INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)).map(lambda pair: (pair[0], sum(pair))))


@given(INTERVALS, st.integers(0, 30), st.integers(1, 20))
def test_the_idle_share_counts_the_cells_that_nobody_covers(busy, start, length) -> None:
    cells = np.zeros(100, dtype=bool)
    for begin, end in busy:
        cells[begin:end] = True
    assert idle_fraction(busy, start, start + length) == pytest.approx(1 - cells[start : start + length].mean())


def test_by_hand_each_side_on_its_own_device(tmp_path: Path) -> None:
    """Learner busy 104-107 and 108-109.5; actor busy 98-103 (from 100 on) and 109.5-110; scoring is no work of it."""
    timeline = Timeline(tmp_path / "timeline.jsonl", config("separate"))
    metrics = timeline.step(1, TIMES, PUBLISHED, [span("sample", 98, 103), span(SCORE, 103, 104)])
    assert metrics == pytest.approx(
        {"idle/learner_fraction": 0.55, "idle/actor_fraction": 0.65, "idle/mean_fraction": 0.6}
    )
    (record,) = read_lines(tmp_path / "timeline.jsonl")
    assert record["idle_fractions"] == pytest.approx([0.55, 0.65])
    zero = record["start_seconds"] - 100
    assert [
        (each["device"], each["worker"], each["work"], each["start_seconds"] - zero, each["end_seconds"] - zero)
        for each in record["spans"]
    ] == [
        (1, "actor 0", "sample", pytest.approx(98), pytest.approx(103)),
        (1, "actor 0", "score", pytest.approx(103), pytest.approx(104)),
        (0, "learner 0", "learn", pytest.approx(104), pytest.approx(107)),
        (0, "learner 0", "publish", pytest.approx(108), pytest.approx(109.5)),
        (1, "actor 0", "load", pytest.approx(109.5), pytest.approx(110)),
    ]
    assert [each.get("version") for each in record["spans"]] == [6, 6, None, 7, 7]
    assert [each.get("num_prompts") for each in record["spans"]] == [2, 2, None, None, None]


def test_by_hand_both_sides_on_one_device(tmp_path: Path) -> None:
    """Busy 100-103, 104-107 and 108-110, whoever works."""
    timeline = Timeline(tmp_path / "timeline.jsonl", config("colocated"))
    metrics = timeline.step(1, TIMES, PUBLISHED, [span("sample", 98, 103)])
    assert metrics == pytest.approx(
        {"idle/learner_fraction": 0.2, "idle/actor_fraction": 0.2, "idle/mean_fraction": 0.2}
    )
    overlapping = timeline.step(2, TIMES, PUBLISHED, [span("sample", 98, 108)])
    assert overlapping["idle/mean_fraction"] == 0.0


@pytest.mark.parametrize(
    ("layout", "idle", "learner", "actor"),
    [
        # 104-107 and 108-109.5 by rank 0, 104-107 by rank 1; 109.5-110 by each actor; 100-102 by the third actor.
        ("separate", [0.55, 0.7, 0.95, 0.95, 0.75], 0.625, (0.95 + 0.95 + 0.75) / 3),
        ("colocated", [0.5, 0.65, 0.75], 0.575, (0.5 + 0.65 + 0.75) / 3),
    ],
)
def test_several_ranks_and_actors(tmp_path: Path, layout: str, idle: list[float], learner: float, actor: float) -> None:
    timeline = Timeline(tmp_path / "timeline.jsonl", config(layout, ranks=2, actors=3))
    metrics = timeline.step(1, TIMES, PUBLISHED, [span("sample", 100, 102, index=2)])
    (record,) = read_lines(tmp_path / "timeline.jsonl")
    assert record["idle_fractions"] == pytest.approx(idle)
    assert metrics["idle/learner_fraction"] == pytest.approx(learner)
    assert metrics["idle/actor_fraction"] == pytest.approx(actor)
    assert metrics["idle/mean_fraction"] == pytest.approx(sum(idle) / len(idle))
    lanes = {each["worker"]: each["device"] for each in record["spans"]}
    first = 2 if layout == "separate" else 0
    assert lanes == {"learner 0": 0, "learner 1": 1, **{f"actor {i}": first + i for i in range(3)}}


def test_every_gpu_of_a_tensor_parallel_actor_counts(tmp_path: Path) -> None:
    """One GPU is idle for .55 of the step, three for .65."""
    timeline = Timeline(tmp_path / "timeline.jsonl", config("separate", tensor_parallel=3))
    metrics = timeline.step(1, TIMES, PUBLISHED, [span("sample", 98, 103)])
    assert metrics["idle/actor_fraction"] == pytest.approx(0.65)
    assert metrics["idle/mean_fraction"] == pytest.approx(0.625)


def test_a_resumed_runs_times_begin_where_the_last_record_ends(tmp_path: Path) -> None:
    """What ended after the step counts too, an evaluation here; the records of the steps that are done again do not."""
    path = tmp_path / "timeline.jsonl"
    now = time.perf_counter()
    first = Timeline(path, config("separate"))
    first.step(1, at(now), PUBLISHED, [span("evaluate", now + 10, now + 15)])
    first.step(2, at(now + 15), PUBLISHED, [])
    first.close()
    rewind(tmp_path, 1)
    resumed = Timeline(path, config("separate"))
    begun = time.perf_counter()
    resumed.step(2, at(begun), PUBLISHED, [span("sample", begun, begun + 3)])
    one, two = read_lines(path)
    assert (one["step"], two["step"]) == (1, 2)
    assert one["start_seconds"] == pytest.approx(0, abs=0.5)
    assert one["end_seconds"] == pytest.approx(one["start_seconds"] + 10, abs=0.001)
    assert two["start_seconds"] == pytest.approx(one["start_seconds"] + 15, abs=0.5)
    assert two["start_seconds"] >= max(each["end_seconds"] for each in one["spans"])
