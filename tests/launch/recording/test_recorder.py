"""The metrics of the rollouts alone: a task's own parts of the reward are metrics, whatever their names are."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import tiny

from common.types import Group, Score, TokenTargets, UpdateResult
from launch.recording import recorder
from launch.recording.console import Display
from launch.recording.recorder import Recorder, group_metrics, rollout_records
from launch.runtime.resize import Resized


def group_of(*parts: dict[str, float]) -> Group:
    """One rollout with each of these parts, which sum to its reward."""
    group = tiny.group(1, [2] * len(parts), [0.0] * len(parts))
    scores = [Score(total=sum(each.values()), correct=False, parts=each) for each in parts]
    rollouts = zip(group.rollouts, scores, strict=True)
    return replace(group, rollouts=tuple(replace(rollout, score=score) for rollout, score in rollouts))


def test_any_part_is_a_metric_and_none_overwrites_another():
    metrics = group_metrics([group_of({"mean": 7.0, "brevity": 1.0}), group_of({"mean": 3.0, "brevity": -2.0})], 1)
    assert metrics["reward/parts/mean"] == 5.0
    assert metrics["reward/parts/brevity"] == -0.5
    assert metrics["reward/mean"] == 4.5
    assert metrics["reward/std"] == 3.5


def test_a_part_that_some_scores_lack_is_averaged_over_the_others():
    metrics = group_metrics([group_of({"a": 1.0}, {"a": 2.0, "b": 4.0}, {"b": 5.0})], 1)
    assert metrics["reward/parts/a"] == 1.5
    assert metrics["reward/parts/b"] == 4.5
    assert metrics["reward/mean"] == pytest.approx(4.0)


def test_a_failed_reward_has_no_part():
    metrics = group_metrics([tiny.group(1, [2, 3], [None, None])], 1)
    assert metrics["reward/num_failed"] == 2.0
    assert not [name for name in metrics if name.startswith("reward/parts/")]


def test_staleness_counts_the_versions_that_came_since():
    """The adapter before the step, version 6, has staleness 0; rollouts of 6, 5, 5 and 3."""
    group = tiny.group(1, [2, 3, 4, 5], [0.0] * 4)
    versions = zip(group.rollouts, (6, 5, 5, 3), strict=True)
    stale = replace(group, rollouts=tuple(replace(rollout, version=version) for rollout, version in versions))
    metrics = group_metrics([stale], 7)
    assert (metrics["staleness/mean"], metrics["staleness/max"]) == (1.25, 3.0)


def test_openers_and_lengths_count_forced_tokens_as_the_completions() -> None:
    """Two forced tokens, which all completions share, then openers of which two are equal."""
    group = tiny.forced(tiny.group(1, [4, 5, 6, 9], [0.0] * 4), 2)
    openers = zip(group.rollouts, (3, 4, 3, 5), strict=True)
    rollouts = tuple(replace(r, token_ids=np.insert(np.delete(r.token_ids, 7), 7, opener)) for r, opener in openers)
    metrics = group_metrics([replace(group, rollouts=rollouts)], 1)
    assert metrics["completion/distinct_openers"] == 3.0
    assert (metrics["completion/length_mean"], metrics["completion/length_max"]) == (6.0, 9.0)


def test_the_recorded_tokens_of_a_rollout_are_those_of_its_weights() -> None:
    """Of a completion with two forced tokens; its text is whole."""
    group = tiny.forced(tiny.group(1, [4], [0.0]), 2)
    group = replace(group, rollouts=(replace(group.rollouts[0], text="abcd"),))
    ids = group.rollouts[0].token_ids
    targets = TokenTargets(advantage=0.5, entropies=np.array([0.25, 0.75]), weights=np.array([1.0, 0.5]))
    result = UpdateResult(metrics={}, tokens=(targets,))
    [record] = rollout_records(1, [group], result, Named())
    assert record["tokens"] == [f"{ids[7]}", f"{ids[8]}"]
    assert (record["entropies"], record["weights"], record["text"]) == ([0.25, 0.75], [1.0, 0.5], "abcd")


class Named:
    """A tokenizer that writes a token as its number."""

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


class Tracker:
    """Records how it is ended."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def end(self, *, complete: bool) -> None:
        self.calls.append(complete)

    def close(self) -> None:
        self.calls.append("waited")


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (None, [True, "waited"]),
        (RuntimeError(), [False, "waited"]),
        (Resized("it goes on"), [True, "waited"]),  # no failed run: it is continued
        (KeyboardInterrupt(), [False]),  # Ray leaves a driver that is stopped 15 s
        (SystemExit(143), [False]),
    ],
)
def test_how_a_run_ends_is_told_to_its_trackers(tmp_path, monkeypatch, error, calls):
    tracker = Tracker()
    monkeypatch.setattr(recorder.trackers, "start", lambda *_, **__: [tracker])
    display = Display("test", steps=1)
    expected = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with expected, Recorder(tmp_path, None, display, tiny.config()):
        if error:
            raise error
    assert tracker.calls == calls
