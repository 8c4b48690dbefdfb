"""The timeline of a run: what is drawn of whom, read back from the figure; and a step's spans for the page."""

from pathlib import Path

import pytest
import run_folders
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from common.types import UserError
from launch.reporting import timeline
from launch.reporting.data.groups import group
from launch.reporting.data.runs import read_all


def drawn(*folders: Path) -> list[Figure]:
    return [each.figure for each in timeline.timelines(group(read_all(folders)))]


def bars(axes: Axes) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """(work, lane) -> start and end of each bar."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for each in axes.collections:
        assert isinstance(each, PolyCollection)
        boxes = [path.get_extents() for path in each.get_paths()]
        lane = round((boxes[0].y0 + boxes[0].y1) / 2)
        found[str(each.get_label()), lane] = [(round(box.x0, 6), round(box.x1, 6)) for box in boxes]
    return found


def words(axes: Axes) -> list[str]:
    return [each.get_text() for each in axes.texts]


def test_two_devices_overlap(tmp_path):
    """Three steps from 0, 7 and 14 s on; the first part is cut at the window's start, the last evaluation left out."""
    (figure,) = drawn(run_folders.write(tmp_path / "run", rewards=[1.0] * 3, separate=True))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["device 0: learner 0", "device 1: actor 0"]
    assert axes.yaxis_inverted()  # the first lane above
    assert axes.get_xlim() == (0, 20.5)
    assert bars(axes) == {
        ("learn", 0): [(0, 4), (7, 11), (14, 18)],
        ("publish", 0): [(5.5, 6), (12.5, 13), (19.5, 20)],
        ("sample", 1): [(0, 2.5), (2.5, 5.5), (6.75, 9.5), (9.5, 12.5), (13.75, 16.5), (16.5, 19.5)],
        ("load", 1): [(6, 6.5), (13, 13.5), (20, 20.5)],
        ("evaluate", 1): [(6.5, 6.75), (13.5, 13.75)],
    }
    assert sorted(words(axes)) == ["idle 31 %", "idle 8 %", "step 1", "step 2", "step 3", "v0", "v1", "v2"]
    at = {each.get_text(): each.get_position() for each in axes.texts if each.get_text().startswith("v")}
    assert at == {"v0": (2.75, 1), "v1": (9.625, 1), "v2": (16.625, 1)}


def test_one_device_has_a_lane_for_each_of_its_workers(tmp_path):
    (figure,) = drawn(run_folders.write(tmp_path / "run", rewards=[1.0] * 2))
    above, below = figure.axes
    assert [label.get_text() for label in above.get_yticklabels()] == ["device 0: learner 0", "device 0: actor 0"]
    assert bars(above)["score", 1] == [(2, 2.5), (10, 10.5)]
    assert words(above).count("idle 7 %") == 2
    (line,) = below.lines  # of the device, which both sides share
    assert list(line.get_ydata()) == [0.0667, 0.0667]


def test_the_idle_share_of_each_side_over_the_steps(tmp_path):
    shares = {"learner": [0.1, 0.2, 0.3], "actor": [0.9, 0.8, 0.7]}
    metrics = {f"idle/{side}_fraction": values for side, values in shares.items()}
    (figure,) = drawn(run_folders.write(tmp_path / "run", rewards=[1.0] * 3, separate=True, metrics=metrics))
    found = {str(line.get_label()): list(line.get_ydata()) for line in figure.axes[1].lines}
    assert found == {"idle, learners' devices": shares["learner"], "idle, actors' devices": shares["actor"]}


def test_a_long_run_shows_steps_of_its_middle(tmp_path):
    (figure,) = drawn(run_folders.write(tmp_path / "run", rewards=[1.0] * 20, separate=True))
    above, below = figure.axes
    steps = [each.removeprefix("step ") for each in words(above) if each.startswith("step")]
    assert steps == ["7", "8", "9", "10", "11", "12", "13", "14"]
    assert above.get_xlim() == (42, 7 * 13 + 6.5)
    assert len(bars(above)["learn", 0]) == 8
    assert bars(above)["evaluate", 1][0] == (48.5, 48.75)  # after step 7
    assert list(below.lines[0].get_xdata()) == list(range(1, 21))


def test_the_idle_share_of_several_steps_weighs_their_lengths(tmp_path):
    """0 of 5 s, then .6 of 15 s: 9 of 20 s."""
    folder = run_folders.write(tmp_path / "run", rewards=[1.0] * 2)
    records = [
        run_folders.alternating_work(1) | {"start_seconds": 0, "end_seconds": 5, "idle_fractions": [0.0]},
        run_folders.alternating_work(2) | {"start_seconds": 5, "end_seconds": 20, "idle_fractions": [0.6]},
    ]
    run_folders.lines(folder / "timeline.jsonl", records)
    (figure,) = drawn(folder)
    assert words(figure.axes[0]).count("idle 45 %") == 2


def test_one_run_of_each_experiment_and_none_of_a_run_without_a_timeline(tmp_path):
    folders = [run_folders.write(tmp_path / f"{a}-{seed}", alpha=a, seed=seed) for a in (0.1, 0.2) for seed in (1, 2)]
    found = timeline.timelines(group(read_all(folders)))
    assert [each.title for each in found] == [
        "Who worked when: sa-ah-grpo, α 0.1, run 0.1-1",
        "Who worked when: sa-ah-grpo, α 0.2, run 0.2-1",
    ]
    assert len({each.key for each in found}) == 2
    for folder in folders[:3]:
        (folder / "timeline.jsonl").unlink()
    (only,) = timeline.timelines(group(read_all(folders)))
    assert only.title.endswith("run 0.2-2")
    (folders[3] / "timeline.jsonl").unlink()
    assert drawn(*folders) == []


def test_a_step_alone_is_cut_to_its_time():
    assert timeline.of_step(run_folders.overlapping_work(2)) == {
        "seconds": 6.5,
        "idle": [0.3077, 0.0769],
        "spans": [
            ["actor 0", "sample", 0.0, 2.5],
            ["learner 0", "learn", 0.0, 4.0],
            ["actor 0", "sample", 2.5, 5.5],
            ["learner 0", "publish", 5.5, 6.0],
            ["actor 0", "load", 6.0, 6.5],
        ],
    }


def test_learner_ranks_come_first_on_each_device(tmp_path):
    folder = run_folders.write(tmp_path / "run", rewards=[1.0])
    spans = [
        {"device": device, "worker": worker, "work": "learn", "start_seconds": 0.0, "end_seconds": 1.0}
        for worker, device in (("actor 0", 0), ("actor 1", 1), ("learner 1", 1), ("actor 2", 2), ("learner 0", 0))
    ]
    run_folders.lines(
        folder / "timeline.jsonl", [run_folders.alternating_work(1) | {"spans": spans, "idle_fractions": [0.0] * 3}]
    )
    (run,) = read_all([folder])
    assert list(timeline.lanes(run).items()) == [
        *(("learner 0", 0), ("actor 0", 0), ("learner 1", 1), ("actor 1", 1), ("actor 2", 2))
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"spans": None},
        {"spans": []},
        {"spans": [{"worker": "learner 0"}]},
        {"idle_fractions": None},
        {"idle_fractions": ["none"]},
        {"idle_fractions": [1.5]},
        {"idle_fractions": [float("nan")]},  # which JSON does not have, and the page's data neither
        {"idle_fractions": []},  # and spans of device 0
        {"end_seconds": None},
        {"end_seconds": 0.0},  # no longer than nothing
        {"end_seconds": float("inf")},
    ],
)
def test_a_damaged_timeline_is_named_in_one_line(tmp_path, changes):
    folder = run_folders.write(tmp_path / "run", rewards=[1.0])
    run_folders.lines(folder / "timeline.jsonl", [run_folders.alternating_work(1) | changes])
    with pytest.raises(UserError, match=r"timeline.jsonl is damaged \(step 1 .*; restore it, or leave the run out"):
        read_all([folder])


def test_a_run_resumed_on_other_devices_is_drawn(tmp_path):
    folder = run_folders.write(tmp_path / "run", rewards=[1.0] * 2)
    run_folders.lines(folder / "timeline.jsonl", [run_folders.alternating_work(1), run_folders.overlapping_work(2)])
    (figure,) = drawn(folder)
    assert "idle 8 %" in words(figure.axes[0])  # of the second device, in the second step alone
