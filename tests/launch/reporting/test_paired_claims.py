"""What a claim says of paired seeds: the difference, its p-value, the seeds needed, and the seeds left out."""

import math

import pytest
import run_folders

from launch.reporting.data.groups import group, settings_of
from launch.reporting.data.runs import read_all
from launch.reporting.paper.claims import CLAIMS
from launch.reporting.paper.verdicts import INCONCLUSIVE, judge


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
