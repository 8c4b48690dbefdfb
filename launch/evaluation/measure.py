"""Evaluation: greedy Pass@1 with its intervals, mean@n and pass@k by sampling, of the task's problems and of sets."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from actor.rollout import Sampling
from common.config import Config, EvaluationConfig
from common.metrics import mean
from common.types import Group, Prompt, Rollout
from launch.evaluation.statistics import half_width, mean_half_width, pass_at_k, wilson
from launch.planning.prompts import OWN
from launch.runtime.fleet import Fleet

Problems = Mapping[str, Sequence[Prompt]]  # by the name of their set


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found."""

    record: dict[str, Any]  # one line of evaluations.jsonl: the task's own numbers, those of each set in "sets"
    problems: list[dict[str, Any]]  # one object per problem (`problem_record`)


def evaluate(fleet: Fleet, problems: Problems, config: Config, *, step: int) -> Evaluation:
    """Evaluate the adapter that the fleet holds.

    A problem whose reward fails counts as incorrect; the mean reward is over the others.
    """
    started = time.perf_counter()
    numbers, details = {}, []
    for name, prompts in problems.items():
        greedy, sampled = _sampled(fleet, prompts, config)
        numbers[name] = summary(greedy, sampled, config.evaluation)
        details += [problem_record(step, name, *groups) for groups in zip_longest(greedy, sampled)]
    record = {"step": step} | numbers.pop(OWN, {})
    if numbers:
        record["sets"] = numbers
    return Evaluation(record=record | {"seconds": time.perf_counter() - started}, problems=details)


def _sampled(fleet: Fleet, prompts: Sequence[Prompt], config: Config) -> tuple[list[Group], list[Group]]:
    """A greedy completion of each prompt, and evaluation.num_samples sampled ones (no groups if that is 0)."""
    # Sampling seeds derive from the index. A task alone grades: a judge of task.rewards may fail, and takes time.
    own = config.task.name
    prompts = [replace(prompt, index=index, task=prompt.task or own) for index, prompt in enumerate(prompts)]
    sampling = replace(Sampling.of(config), fixed_length=False, opening=None)
    greedy = fleet.sample(prompts, replace(sampling, group_size=1, temperature=0.0), work="evaluate")
    num = config.evaluation.num_samples
    return greedy, fleet.sample(prompts, replace(sampling, group_size=num), work="evaluate") if num else []


def summary(greedy: Sequence[Group], sampled: Sequence[Group], evaluation: EvaluationConfig) -> dict[str, Any]:
    """The numbers of one set. Fractions are from 0 to 1, lengths in tokens; `_ci95` is half of a 95 % interval."""
    firsts = [group.rollouts[0] for group in greedy]
    num_correct = sum(map(_is_correct, firsts))
    pass_at_1 = num_correct / len(firsts)
    numbers = {
        "pass_at_1": pass_at_1,
        "ci95": half_width(pass_at_1, len(firsts)),
        "wilson95": list(wilson(num_correct, len(firsts))),
        "num_problems": len(firsts),
        "reward_mean": mean(rollout.score.total for rollout in firsts if rollout.score is not None),
        "length_mean": mean(rollout.num_completion_tokens for rollout in firsts),
        "num_failed_rewards": sum(rollout.score is None for rollout in firsts),
        "num_truncated": sum(map(_is_truncated, firsts)),
    }
    if sampled:
        n = evaluation.num_samples
        corrects = [sum(map(_is_correct, group.rollouts)) for group in sampled]
        numbers |= {"k": n, "pass_at_k": mean(pass_at_k(n, correct, n) for correct in corrects)}
        numbers |= _with_interval(f"mean_at_{n}", (correct / n for correct in corrects))
        for k in evaluation.ks:
            numbers |= _with_interval(f"pass_at_{k}", (pass_at_k(n, correct, k) for correct in corrects))
        numbers["num_truncated_samples"] = sum(_is_truncated(r) for group in sampled for r in group.rollouts)
    return numbers


def _with_interval(name: str, values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {name: mean(values), f"{name}_ci95": mean_half_width(values)}


def problem_record(step: int, name: str, greedy: Group, sampled: Group | None) -> dict[str, Any]:
    """What became of one problem: its greedy completion, and how many of the sampled ones are correct.

    `problem` identifies it in other evaluations: it follows from all messages and the answer.
    """
    prompt, first = greedy.prompt, greedy.rollouts[0]
    asked = "\n".join(message["content"] for message in prompt.messages)
    record = {
        "step": step,
        "set": name,
        "problem": hashlib.sha256(f"{asked}\n{prompt.answer}".encode()).hexdigest()[:16],
        "question": prompt.messages[-1]["content"],
        "answer": prompt.answer,
        "correct": _is_correct(first),
        "truncated": _is_truncated(first),
        "text": first.text,
        "reward_error": first.reward_error,
    }
    if sampled is not None:
        record |= {
            "num_samples": len(sampled.rollouts),
            "num_samples_correct": sum(map(_is_correct, sampled.rollouts)),
            "num_samples_truncated": sum(map(_is_truncated, sampled.rollouts)),
        }
    return record


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """A line of text for the task's own problems, and one for each set."""
    step, seconds = record["step"], f"{record['seconds']:.1f} s"
    if "pass_at_1" in record:
        yield f"evaluation at step {step}: {_line(record)}, {seconds}"
    for name, numbers in record.get("sets", {}).items():
        yield f"evaluation at step {step}, {name}: {_line(numbers)}"


def _line(numbers: Mapping[str, Any]) -> str:
    low, high = numbers["wilson95"]
    parts = [f"Pass@1 {numbers['pass_at_1']:.3f} ± {numbers['ci95']:.3f} [{low:.3f}, {high:.3f}]"]
    for name, value in numbers.items():
        if (half := numbers.get(f"{name}_ci95")) is not None:
            parts.append(f"{name.replace('_at_', '@')} {value:.3f} ± {half:.3f}")
    parts += [f"reward {numbers['reward_mean']:.3f}", f"{numbers['num_problems']} problems"]
    return ", ".join([*parts, *([f"{numbers['num_truncated']} truncated"] if numbers["num_truncated"] else [])])


def _is_correct(rollout: Rollout) -> bool:
    return rollout.score is not None and rollout.score.correct


def _is_truncated(rollout: Rollout) -> bool:
    return rollout.finish_reason == "length"
