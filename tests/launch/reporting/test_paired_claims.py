"""What a claim says of paired seeds: the difference, its p-value, the seeds needed, and the seeds left out."""

import math
from dataclasses import replace

import pytest
import run_folders
import tiny

from common.types import Prompt
from launch.evaluation.measure import problem_record
from launch.planning.prompts import OWN
from launch.recording.recorder import EVALUATIONS
from launch.reporting.data.groups import group, settings_of
from launch.reporting.data.runs import read_all
from launch.reporting.paper.claims import CLAIMS
from launch.reporting.paper.verdicts import INCONCLUSIVE, judge
from learner import checkpoint


def verdict(tmp_path, finals, words):
    """Runs of GRPO and SA-AH-GRPO whose final Pass@1 per seed is given."""
    for alpha, of_seeds in finals.items():
        for seed, value in of_seeds.items():
            run_folders.write(tmp_path / f"{alpha}-{seed}", alpha=alpha, seed=seed, passes={0: 0.4, 4: value})
    ((setting, groups),) = settings_of(group(read_all([tmp_path]))).items()
    return judge(next(claim for claim in CLAIMS if claim.words == words), setting, groups)


HIGHER = "SA-AH-GRPO ends with a higher Pass@1 than GRPO"


def test_pairs_see_what_welch_does_not(tmp_path):
    """Seeds far apart, differences .01, .02, .03: mean .02, deviation .01, t(2) 4.3027."""
    finals = {0.0: {1: 0.3, 2: 0.5, 3: 0.7, 9: 0.5}, 0.5: {1: 0.31, 2: 0.52, 3: 0.73}}
    found = verdict(tmp_path, finals, HIGHER)
    half = 4.3027 * 0.01 / math.sqrt(3)
    assert found.verdict == INCONCLUSIVE  # Welch
    assert found.paired == f"0.020 [{0.02 - half:.3f}, {0.02 + half:.3f}]"
    assert found.p_value == "0.25"  # 2 of 8 flips
    assert found.needed == "4"  # .026 of .01: d 2.6, whose power is .65 with 3 pairs and .92 with 4
    assert found.reason.endswith("without a pair: seeds 9")


@pytest.mark.parametrize("finals", [{0.0: {1: 0.3, 2: 0.5}, 0.5: {3: 0.3, 4: 0.6}}, {0.0: {1: 0.3}, 0.5: {1: 0.4}}])
def test_without_two_pairs_nothing_is_said_of_pairs(tmp_path, finals):
    found = verdict(tmp_path, finals, HIGHER)
    assert (found.paired, found.p_value, found.needed) == ("-", "-", "-")


def solve(folder, step, solved):
    """The record of an evaluation of as many problems as `solved` has letters: y, n."""
    records = []
    for number, letter in enumerate(solved):
        prompt = Prompt(messages=({"role": "user", "content": f"Say {number}."},), answer=str(number))
        greedy = replace(tiny.group(number, [1], [4.0 if letter == "y" else 0.0]), prompt=prompt)
        records.append(problem_record(step, OWN, greedy, None))
    (folder / EVALUATIONS).mkdir(exist_ok=True)
    run_folders.lines(folder / EVALUATIONS / f"{checkpoint.name(step)}.jsonl", records)


def written(tmp_path, answers):
    """Runs of two seeds whose last evaluation solved these problems; the base model solved the first alone."""
    folders = {}
    for (alpha, seed), solved in answers.items():
        folder = run_folders.write(
            tmp_path / f"{alpha}-{seed}", alpha=alpha, seed=seed, passes={0: 0.2, 4: 0.4 + seed / 10}
        )
        solve(folder, 0, "ynnnn")
        solve(folder, 4, solved)
        folders[alpha, seed] = folder
    return folders


def reason(tmp_path, words):
    ((setting, groups),) = settings_of(group(read_all([tmp_path]))).items()
    return judge(next(claim for claim in CLAIMS if claim.words == words), setting, groups).reason


ANSWERS = {(0.0, 1): "yyynn", (0.5, 1): "yynyn", (0.0, 2): "nnnny", (0.5, 2): "yynny"}


def test_problems_are_paired_by_mcnemar(tmp_path):
    """Seed 1: one gained, one lost; seed 2: two gained. Of four changes 3 to 1: 2 (1 + 4) / 16 = .625."""
    written(tmp_path, ANSWERS)
    assert reason(tmp_path, HIGHER).endswith("; by problem: 3 gained, 1 lost, p 0.62 (McNemar, of these checkpoints)")


def test_the_base_model_is_paired_by_problem(tmp_path):
    """SA-AH-GRPO: seed 1 gains two, seed 2 gains two, and none is lost: 2 / 16."""
    written(tmp_path, ANSWERS)
    assert "; by problem: 4 gained, 0 lost, p 0.12 (" in reason(tmp_path, "SA-AH-GRPO improves on the base model")


def test_runs_without_records_of_problems_say_nothing_of_them(tmp_path):
    folders = written(tmp_path, ANSWERS)
    (folders[0.5, 2] / "evaluations" / "step-000004.jsonl").unlink()
    assert "by problem" not in reason(tmp_path, HIGHER)


def test_a_link_to_records_is_not_followed(tmp_path):
    folders = written(tmp_path / "runs", ANSWERS)
    records = folders[0.5, 2] / "evaluations"
    records.rename(tmp_path / "elsewhere")
    records.symlink_to(tmp_path / "elsewhere")
    assert "by problem" not in reason(tmp_path / "runs", HIGHER)


def test_without_a_number_of_the_paper_the_effect_found_is_what_seeds_would_find(tmp_path):
    """Largest reward std .1, .2, .3 against .25: a mean of -.05 at a deviation of .1, d 1/2, which takes 34 pairs."""
    for seed, value in enumerate((0.1, 0.2, 0.3)):
        run_folders.write(tmp_path / str(seed), seed=seed, metrics={"reward/std": [value] * 4})
    words = "The standard deviation of a step's rewards stays below 0.25 in later training"
    ((setting, groups),) = settings_of(group(read_all([tmp_path]))).items()
    found = judge(next(claim for claim in CLAIMS if claim.words == words), setting, groups)
    assert (found.verdict, found.needed) == (INCONCLUSIVE, "34 (for the effect found)")
