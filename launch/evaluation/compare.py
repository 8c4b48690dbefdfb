"""Two evaluations of the same problems: what was gained and lost, with a paired test and interval."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.metrics import is_count, read_lines
from common.types import UserError
from launch.evaluation.statistics import mcnemar, mean_half_width, paired_interval

Record = Mapping[str, Any]  # measure.problem_record
Records = dict[str, dict[str, Record]]  # by set and problem


def compare(before: Path, after: Path) -> dict[str, Any]:
    """For each set that both files have, the differences after - before over the problems that both have.

    `num_gained` problems are correct only after, `num_lost` only before; `p_value` is McNemar's. Where both have
    samples, `mean_difference` is that of the fraction of correct samples. Raises UserError for files that no evaluation
    writes, and for two without a common problem.
    """
    first, second = read_problems(before), read_problems(after)
    found = {}
    for name in first.keys() & second.keys():
        if common := first[name].keys() & second[name].keys():
            pairs = [(first[name][problem], second[name][problem]) for problem in sorted(common)]
            num_unpaired = len(first[name].keys() ^ second[name].keys())
            found[name] = {**_of_pairs(pairs), "num_unpaired": num_unpaired}
    if not found:
        raise UserError(
            f"{before} and {after} have no problem in common; compare the same sets, asked with the same prompts"
        )
    return {name: found[name] for name in first if name in found}


def _of_pairs(pairs: list[tuple[Record, Record]]) -> dict[str, Any]:
    num = len(pairs)
    gained = sum(after["correct"] and not before["correct"] for before, after in pairs)
    lost = sum(before["correct"] and not after["correct"] for before, after in pairs)
    numbers = {
        "num_problems": num,
        "pass_at_1": [sum(record["correct"] for record in side) / num for side in zip(*pairs, strict=True)],
        "num_gained": gained,
        "num_lost": lost,
        "difference": (gained - lost) / num,
        "difference_95": list(paired_interval(gained, lost, num)),
        "p_value": mcnemar(gained, lost),
    }
    if all("num_samples" in record for pair in pairs for record in pair):
        differences = [_sampled(after) - _sampled(before) for before, after in pairs]
        numbers["mean_difference"] = math.fsum(differences) / num
        numbers["mean_difference_ci95"] = mean_half_width(differences)
    return numbers


def _sampled(record: Record) -> float:
    return record["num_samples_correct"] / record["num_samples"]


def lines(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line of text for each set of `compare`."""
    for name, each in found.items():
        low, high = each["difference_95"]
        before, after = each["pass_at_1"]
        unpaired = f", {each['num_unpaired']} in one file alone" if each["num_unpaired"] else ""
        sampled = ""
        if "mean_difference" in each:
            sampled = f"; mean of samples {each['mean_difference']:+.4f} ± {each['mean_difference_ci95']:.4f}"
        yield (
            f"{name}: Pass@1 {before:.3f} to {after:.3f}, difference {each['difference']:+.4f} "
            f"[{low:+.4f}, {high:+.4f}], {each['num_gained']} gained, {each['num_lost']} lost, "
            f"p {each['p_value']:.3g} (McNemar, exact), {each['num_problems']} problems{unpaired}{sampled}"
        )


def read_problems(path: Path) -> Records:
    """The records of a file. A problem that a set has twice counts once: its greedy completion is the same.

    Raises UserError for a file that no evaluation writes.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; name one of RUN/evaluations/ or of launch/evaluate.py --out")
    records: Records = {}
    for record in read_lines(path):
        if not _is_record(record):
            raise UserError(f"{path} has a line that is no problem of an evaluation; name one of RUN/evaluations/")
        records.setdefault(record["set"], {})[record["problem"]] = record
    return records


def _is_record(record: Record) -> bool:
    num, correct = record.get("num_samples", 1), record.get("num_samples_correct", 0)
    samples = is_count(num) and is_count(correct) and 0 <= correct <= num > 0
    names = isinstance(record.get("set"), str) and isinstance(record.get("problem"), str)
    return names and samples and isinstance(record.get("correct"), bool)
