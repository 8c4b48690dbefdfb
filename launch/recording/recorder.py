"""Records each step: metrics, rollouts, timeline and evaluations in the run folder, and a line on the display."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from common.config import Config
from common.files import NotWritten, remove
from common.metrics import JsonLines, MetricsWriter, keep_lines, mean, read_lines
from common.types import Group, Score, UpdateResult
from launch.evaluation.measure import Evaluation
from launch.recording import trackers
from launch.recording.console import PART, Display
from launch.recording.timeline import StepTimes, Timeline
from launch.runtime.channel import Published
from launch.runtime.fleet import Span
from launch.runtime.resize import Resized
from learner import checkpoint

EVALUATIONS = "evaluations"  # the folder with a file for each evaluation: what became of each problem


class Recorder:
    """Writes the files of a run folder, feeds the trackers and updates the display. A run that leaves its `with` block
    without an exception is complete."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, display: Display, config: Config) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.display = display
        self.sample_every = config.run.sample_every
        self.trackers = trackers.start(config, folder, warn=self._warn, note=display.note)
        self.metrics = MetricsWriter(folder / "metrics.jsonl")
        self.rollouts = JsonLines(folder / "rollouts.jsonl", self._warn)
        self.timeline = Timeline(folder / "timeline.jsonl", config, self._warn)
        self._evaluated = {record["step"] for record in read_lines(folder / "evaluations.jsonl")}
        self.evaluations = JsonLines(folder / "evaluations.jsonl")

    def step(
        self,
        step: int,
        groups: Sequence[Group],
        result: UpdateResult,
        published: Published,
        times: StepTimes,
        sampled: Sequence[Span],
        lost: Mapping[str, float],
        *,
        num_discarded: int = 0,
    ) -> None:
        """Record optimizer step `step` (from 1 on).

        `sampled` is the work of the actors since the last step (Fleet.worked), `lost` counts what was replaced since
        then (Losses.metrics).
        `num_discarded` groups were sampled for it and replaced, because the method's group filter dropped them.
        """
        metrics = {
            **group_metrics(groups, published.version),
            **result.metrics,
            "groups/discarded": float(num_discarded),
            "update/skipped": float(result.skipped is not None),
            "adapter/version": float(published.version),
            "adapter/canary_version": float(published.canary_version),
            "adapter/canary_difference": published.canary_difference,
            "adapter/canary_signal": published.canary_signal,
            **times.seconds(),
            "time/load_seconds": published.load_seconds,
            **lost,
            **self.timeline.step(step, times, published, sampled),
            "throughput/tokens_per_second": num_completion_tokens(groups) / (times.ended - times.started),
        }
        self.metrics.write(step, metrics)
        rollouts = rollout_records(step, groups, result, self.tokenizer)
        self.rollouts.write(*rollouts)
        for tracker in self.trackers:
            tracker.step(step, metrics, rollouts)
        self.display.step(step, metrics)
        if result.skipped:
            self.display.note(f"step {step} skipped: {result.skipped}")
        for error in {r.reward_error for group in groups for r in group.rollouts if r.reward_error}:
            self.display.note(f"step {step}: a reward failed: {error}")
        if self.sample_every and step % self.sample_every == 0:
            self.display.sample(step, groups[0])

    def has_evaluated(self, step: int) -> bool:
        """Whether the run folder has the evaluation of a step, from before this process."""
        return step in self._evaluated

    def evaluation(self, found: Evaluation) -> None:
        """Record an evaluation, each problem of it in a file of its own."""
        record = found.record
        path = self.folder / EVALUATIONS / f"{checkpoint.name(record['step'])}.jsonl"
        with contextlib.suppress(OSError):  # which the write below reports
            remove(path)  # of a run that was cut off between this file and the record
        problems = JsonLines(path, self._warn)
        problems.write(*found.problems)
        problems.close()
        self.evaluations.write(record)
        for tracker in self.trackers:
            tracker.evaluation(record)
        self.display.evaluation(record)

    def _warn(self, problem: str) -> None:
        self.display.note(f"warning: {problem}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close(complete=kind is None or issubclass(kind, Resized), wait=not stopped)

    def close(self, *, complete: bool = False, wait: bool = True) -> None:
        """Close the files, and wait for the trackers to send the rest; those that nobody waits for do so alone."""
        self.metrics.close()
        self.rollouts.close()
        self.evaluations.close()
        self.timeline.close()
        for tracker in self.trackers:
            tracker.end(complete=complete)
        for tracker in self.trackers if wait else ():
            tracker.close()


def rewind(folder: Path, step: int) -> None:
    """Remove the records of steps after `step` from a run folder: a resumed run writes them again."""
    paths = [folder / name for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl", "timeline.jsonl")]
    for path in paths:
        read_lines(path)  # if one is damaged, all stay as they are
    for path in paths:
        keep_lines(path, lambda record: record["step"] <= step)
    for path in (folder / EVALUATIONS).glob("*.jsonl"):
        if checkpoint.step_of(path.with_suffix("")) > step:
            try:
                remove(path)
            except OSError as error:
                raise NotWritten(path, error) from None


def num_completion_tokens(groups: Sequence[Group]) -> int:
    return sum(rollout.num_completion_tokens for group in groups for rollout in group.rollouts)


def group_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """The metrics of the rollouts alone. `version` is the adapter after the step: the one before it has staleness 0.

    reward/std is the population standard deviation over all rollouts of the step; reward/group_std is the mean over
    groups of the standard deviation within each. groups/signal_fraction is the share of groups whose rewards differ.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [rollout.score for rollout in rollouts if rollout.score is not None]
    lengths = [rollout.num_completion_tokens for rollout in rollouts]
    staleness = [version - 1 - rollout.version for rollout in rollouts]
    return {
        "reward/mean": mean(score.total for score in scores),
        "reward/std": _std([score.total for score in scores]),
        "reward/group_std": mean(_std([r.score.total for r in group.rollouts if r.score]) for group in groups),
        "reward/correct_fraction": mean(float(score.correct) for score in scores),
        "reward/num_failed": float(len(rollouts) - len(scores)),
        **part_metrics(scores),
        "groups/signal_fraction": mean(float(len({r.score.total for r in g.rollouts if r.score}) > 1) for g in groups),
        "completion/length_mean": mean(lengths),
        "completion/length_max": float(max(lengths)),
        "completion/distinct_openers": mean(
            len({r.token_ids[r.num_prompt_tokens + r.num_forced_tokens] for r in group.rollouts}) for group in groups
        ),
        "completion/truncated_fraction": mean(float(r.finish_reason == "length") for r in rollouts),
        "staleness/mean": mean(staleness),
        "staleness/max": float(max(staleness)),
        "time/rollout_seconds": max(group.rollout_seconds for group in groups),
        "time/reward_seconds": max(group.reward_seconds for group in groups),
    }


def part_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """reward/parts/<name>: the mean of each part of the reward, over the scores that have it."""
    names = dict.fromkeys(name for score in scores for name in score.parts)
    return {PART + name: mean(s.parts[name] for s in scores if name in s.parts) for name in names}


def rollout_records(
    step: int, groups: Sequence[Group], result: UpdateResult, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """One JSON object per rollout: text, reward and its parts, and the learner's values per token."""
    records = []
    rollouts = [(group, rollout) for group in groups for rollout in group.rollouts]
    for (group, rollout), tokens in zip(rollouts, result.tokens, strict=True):
        record = {
            "step": step,
            "prompt_index": group.prompt.index,
            "prompt": group.prompt.messages[-1]["content"],
            "answer": group.prompt.answer,
            "version": rollout.version,
            "text": rollout.text,
            "finish_reason": rollout.finish_reason,
            "reward_error": rollout.reward_error,
            "tokens": [tokenizer.decode([t]) for t in rollout.token_ids[rollout.mask].tolist()],
        }
        if rollout.score is not None:
            record |= {
                "reward": rollout.score.total,
                "correct": rollout.score.correct,
                "parts": dict(rollout.score.parts),
            }
        if tokens is not None:
            record |= {
                "advantage": tokens.advantage,
                "entropies": [round(float(e), 4) for e in tokens.entropies],
                "weights": [round(float(w), 4) for w in tokens.weights],
            }
        records.append(record)
    return records


def _std(values: Sequence[float]) -> float:
    centre = mean(values)
    return math.sqrt(mean((value - centre) ** 2 for value in values)) if values else math.nan
