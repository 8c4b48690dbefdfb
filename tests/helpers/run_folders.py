"""Run folders as launch/run.py writes them, with chosen numbers: for tests of the report."""

import json
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from launch import report


def write(
    folder: Path,
    *,
    method: str = "sa-ah-grpo",
    alpha: float | None = 0.5,
    seed: int = 1,
    rewards: Sequence[float | None] = (1.0, 2.0, 3.0, 5.0),
    passes: dict[int, float] | None = None,
    steps: int | None = None,
    model: str = "smollm2-135m-instruct",
    metrics: dict[str, Sequence[float | None]] | None = None,
    rollouts_per_step: int = 0,
    settings: dict[str, dict] | None = None,
    separate: bool = False,
) -> Path:
    """A run with one mean reward per step; it is finished unless it was to make more `steps`.

    `separate`: learner and actor overlap on two devices; else they take turns on one.
    """
    folder.mkdir(parents=True)
    fields = {"name": method} | ({} if alpha is None else {"alpha": alpha})
    planned = len(rewards) if steps is None else steps
    config = {"run": {"dir": str(folder), "seed": seed, "steps": planned}, "model": {"path": model}, "method": fields}
    for section, table in (settings or {}).items():
        config[section] = config.get(section, {}) | table
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    columns = {"reward/mean": rewards, **steady(len(rewards), OVERLAPPING if separate else {}), **(metrics or {})}
    lines(
        folder / "metrics.jsonl", [{"step": i + 1} | {k: v[i] for k, v in columns.items()} for i in range(len(rewards))]
    )
    evaluations = [{"step": step, "pass_at_1": p, "num_problems": 64} for step, p in (passes or {}).items()]
    lines(folder / "evaluations.jsonl", evaluations)
    rollouts = [rollout(i + 1, j // 4, j) for i in range(len(rewards)) for j in range(rollouts_per_step)]
    lines(folder / "rollouts.jsonl", rollouts)
    worked = overlapping_work if separate else alternating_work
    lines(folder / "timeline.jsonl", [worked(i + 1) for i in range(len(rewards))])
    return folder


OVERLAPPING = {
    "time/wait_seconds": 0.0,
    "time/ahead_seconds": 1.5,
    "time/step_seconds": 6.5,
    "idle/learner_fraction": 0.3077,
    "idle/actor_fraction": 0.0769,
    "idle/mean_fraction": 0.1923,
}


def steady(steps: int, others: dict[str, float]) -> dict[str, list[float]]:
    """Metrics that do not change from step to step."""
    values = {
        "reward/std": 0.5,
        "kl/mean": 0.01,
        "entropy/normalized_mean": 0.05,
        "weight/mean": 0.9,
        "weight/negative_mean": 0.7,
        "advantage/negative_fraction": 0.5,
        "completion/length_mean": 30.0,
        "time/rollout_seconds": 2.0,
        "time/reward_seconds": 0.5,
        "time/wait_seconds": 2.5,
        "time/learn_seconds": 4.0,
        "time/ahead_seconds": 0.0,
        "time/publish_seconds": 1.0,
        "time/step_seconds": 7.5,
        "idle/learner_fraction": 0.0667,
        "idle/actor_fraction": 0.0667,
        "idle/mean_fraction": 0.0667,
    }
    return {name: [value] * steps for name, value in (values | others).items()}


def alternating_work(step: int) -> dict:
    """A step of 7.5 s, half a second after the one before: sample 2 s, score .5, learn 4, publish .5, load .5."""
    start = 8.0 * (step - 1)
    spans = [
        _span(0, "actor 0", "sample", start, start + 2, num_prompts=4, version=step - 1),
        _span(0, "actor 0", "score", start + 2, start + 2.5, num_prompts=4, version=step - 1),
        _span(0, "learner 0", "learn", start + 2.5, start + 6.5),
        _span(0, "learner 0", "publish", start + 6.5, start + 7, version=step),
        _span(0, "actor 0", "load", start + 7, start + 7.5, version=step),
    ]
    return _worked(step, start, start + 7.5, [0.0667], spans)


def overlapping_work(step: int) -> dict:
    """A step of 6.5 s, half a second after the one before: learn 4 s, drain 1.5, publish .5, load .5; sample 5.25 s.

    The actor begins a quarter of a second before the step, and evaluates for a quarter of a second after it.
    """
    start = 7.0 * (step - 1)
    spans = [
        _span(1, "actor 0", "sample", start - 0.25, start + 2.5, num_prompts=2, version=step - 1),
        _span(0, "learner 0", "learn", start, start + 4),
        _span(1, "actor 0", "sample", start + 2.5, start + 5.5, num_prompts=2, version=step - 1),
        _span(0, "learner 0", "publish", start + 5.5, start + 6, version=step),
        _span(1, "actor 0", "load", start + 6, start + 6.5, version=step),
        _span(1, "actor 0", "evaluate", start + 6.5, start + 6.75, num_prompts=8, version=step),
    ]
    return _worked(step, start, start + 6.5, [0.3077, 0.0769], spans)


def _worked(step: int, start: float, end: float, idle: list[float], spans: list[dict]) -> dict:
    return {"step": step, "start_seconds": start, "end_seconds": end, "idle_fractions": idle, "spans": spans}


def _span(device: int, worker: str, work: str, start: float, end: float, **more: int) -> dict:
    return {"device": device, "worker": worker, "work": work, "start_seconds": start, "end_seconds": end, **more}


def rollout(step: int, prompt: int, index: int) -> dict:
    """The fourth of each group is correct; the others have weights that fall below a half at their fourth token."""
    correct = index % 4 == 3
    tokens = ["The", " sum", " is", "\n", str(index), ".", "</", "S", ">", "<|im_end|>"] * 3
    count = len(tokens)
    return {
        "step": step,
        "prompt_index": prompt,
        "prompt": "1 + 1 =",
        "answer": "2",
        "version": step - 1,
        "text": "".join(tokens),
        "finish_reason": "stop",
        "reward_error": None,
        "tokens": tokens,
        "reward": 4.1 if correct else 0.1,
        "correct": correct,
        "parts": {"correct": 4.0 * correct, "format": 0.0, "present": 0.0, "steps": 0.1},
        "advantage": 1.73 if correct else -0.58,
        "entropies": [0.25] * count,
        "weights": [1.0] * count if correct else [round(0.8 ** (i + 1), 4) for i in range(count)],
    }


def lines(path: Path, records: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def report_of(*folders: Path) -> str:
    """The page that launch/report.py writes of them."""
    out = folders[0].parent / "out.html"
    assert report.main([*map(str, folders), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")
