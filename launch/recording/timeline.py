"""Who worked when: the spans of work of each learner rank and actor, and the idle share of each device."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Config
from common.files import Warn
from common.metrics import JsonLines, mean, read_lines
from launch.runtime.channel import Published
from launch.runtime.fleet import ACTOR, SCORE, Span
from launch.runtime.placement import devices_by_bundle

LEARNER = "learner"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """When each phase of a step ended, in seconds of the driver's time.perf_counter."""

    started: float
    taken: float  # the step's groups
    learned: float
    drained: float  # the parts that were being sampled when the update ended (run.max_staleness)
    loaded: float  # published to every actor, and verified
    ended: float  # the learner's state is with the driver

    def seconds(self) -> dict[str, float]:
        """The durations of the phases, as metrics."""
        return {
            "time/wait_seconds": self.taken - self.started,
            "time/learn_seconds": self.learned - self.taken,
            "time/ahead_seconds": self.drained - self.learned,
            "time/publish_seconds": self.loaded - self.drained,
            "time/commit_seconds": self.ended - self.loaded,
            "time/step_seconds": self.ended - self.started,
        }


class Timeline:
    """Writes timeline.jsonl: one object per step, with the spans that ended since the object before it.

    Its times are seconds since the loop began. Those of a resumed run begin where the last object ends: the time
    between two processes is left out. `idle_fractions` has one number per device: without work of a worker that is
    placed on it, of the time from `start_seconds` to `end_seconds`. Colocated, learner i and actor i share device i;
    separate, the learner ranks have the first devices. Those of a tensor-parallel actor are one here.

    The driver measures, so a span contains the way of its arguments and its result. An update is a span of every rank,
    in which they wait for one another; a load is drawn as late as possible, and as long as that of the slowest actor.
    """

    def __init__(self, path: Path, config: Config, warn: Warn | None = None) -> None:
        num_ranks, num_actors = config.learner.num_ranks, config.actor.num_actors
        first_actor = num_ranks if config.cluster.layout == "separate" else 0
        self.devices = {LEARNER: range(num_ranks), ACTOR: range(first_actor, first_actor + num_actors)}
        self.bundles = devices_by_bundle(config)
        recorded = read_lines(path)
        self._zero = time.perf_counter() - (_end(recorded[-1]) if recorded else 0.0)
        self.lines = JsonLines(path, warn)

    def step(self, step: int, times: StepTimes, published: Published, sampled: Sequence[Span]) -> dict[str, float]:
        """Write what was done for a step; `sampled` is what the actors have sampled since the last one.

        Returns the step's metrics: the mean idle share of the devices with a learner rank, of those with an actor, and
        of all, each GPU of a tensor-parallel actor counted.
        Evaluations, records and checkpoints lie between two steps.
        """
        spans = sorted([*sampled, *self._learned(times, published)], key=lambda span: span.start)
        idle = self._idle(spans, times)
        record = {
            "step": step,
            "start_seconds": self._seconds(times.started),
            "end_seconds": self._seconds(times.ended),
            "idle_fractions": [round(fraction, 4) for fraction in idle],
            "spans": [self._record(span) for span in spans],
        }
        self.lines.write(record)
        sides = {side: mean(idle[device] for device in devices) for side, devices in self.devices.items()}
        whole = sum(number * share for number, share in zip(self.bundles, idle, strict=True)) / sum(self.bundles)
        return {f"idle/{side}_fraction": share for side, share in sides.items()} | {"idle/mean_fraction": whole}

    def close(self) -> None:
        self.lines.close()

    def _learned(self, times: StepTimes, published: Published) -> list[Span]:
        """The work that the loop has timed: the update of every rank, rank 0's publish, the load of every actor."""
        loading, version = times.loaded - published.load_seconds, published.version
        return [
            *(
                Span(side=LEARNER, index=rank, work="learn", start=times.taken, end=times.learned)
                for rank in range(len(self.devices[LEARNER]))
            ),
            Span(side=LEARNER, index=0, work="publish", start=times.drained, end=loading, version=version),
            *(
                Span(side=ACTOR, index=index, work="load", start=loading, end=times.loaded, version=version)
                for index in range(len(self.devices[ACTOR]))
            ),
        ]

    def _idle(self, spans: Sequence[Span], times: StepTimes) -> list[float]:
        """The idle share of each device during the step."""
        busy: list[list[tuple[float, float]]] = [[] for _ in self.bundles]
        for span in spans:
            if span.work != SCORE:
                busy[self.devices[span.side][span.index]].append((span.start, span.end))
        return [idle_fraction(intervals, times.started, times.ended) for intervals in busy]

    def _record(self, span: Span) -> dict[str, Any]:
        known = {"num_prompts": span.num_prompts, "version": span.version}
        return {
            "device": self.devices[span.side][span.index],
            "worker": f"{span.side} {span.index}",
            "work": span.work,
            "start_seconds": self._seconds(span.start),
            "end_seconds": self._seconds(span.end),
        } | {name: value for name, value in known.items() if value is not None}

    def _seconds(self, moment: float) -> float:
        return round(moment - self._zero, 4)


def idle_fraction(busy: Iterable[tuple[float, float]], start: float, end: float) -> float:
    """The share of the window from `start` to `end` that lies in none of the intervals; they may overlap."""
    idle, reached = 0.0, start
    for begin, finish in sorted(busy):
        idle += max(0.0, min(begin, end) - reached)
        reached = max(reached, finish)
    return (idle + max(0.0, end - reached)) / (end - start)


def _end(record: dict[str, Any]) -> float:
    """When a record's last work ended: an evaluation or a prefetched part may end after the step."""
    return max([record["end_seconds"], *(span["end_seconds"] for span in record["spans"])])
