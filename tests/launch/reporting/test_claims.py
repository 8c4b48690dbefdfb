"""Which runs are compared, what the tables show of them, and when a claim of the paper holds."""

import pytest
import run_folders

from launch.planning import memory_fit
from launch.reporting.data.groups import group, settings_of
from launch.reporting.data.runs import OF_ONE_RUN, read_all
from launch.reporting.paper import tables
from launch.reporting.paper.claims import CLAIMS, verdicts
from launch.reporting.paper.verdicts import FAILS, HOLDS, INCONCLUSIVE, decided, judge

QUIET, WILD = (1.0, 1.0, 2.0, 2.2), (1.0, 1.0, 2.0, 6.0)


def grid(folder, rewards_of, seeds=(1, 2, 3), **options):
    """Runs of the three methods; `rewards_of` maps a method and a seed to its step rewards."""
    cells = [("sa-ah-grpo", 0.0), ("ah-grpo", 0.5), ("sa-ah-grpo", 0.5)]
    names = {("sa-ah-grpo", 0.0): "GRPO", ("ah-grpo", 0.5): "AH-GRPO", ("sa-ah-grpo", 0.5): "SA-AH-GRPO"}
    return read_all(
        [
            run_folders.write(
                folder / f"{method}-{alpha}-{seed}",
                method=method,
                alpha=alpha,
                seed=seed,
                rewards=[reward * (1 + 0.01 * seed) for reward in rewards_of(names[method, alpha])],
                **options,
            )
            for method, alpha in cells
            for seed in seeds
        ]
    )


def verdict(runs, words):
    ((setting, groups),) = settings_of(group(runs)).items()
    claim = min((each for each in CLAIMS if words in each.words), key=lambda each: len(each.words))
    return judge(claim, setting, groups)


LESS = "less variance than GRPO"


def test_a_composition_is_none_of_the_papers_methods_and_its_label_has_the_fields(tmp_path):
    asymmetric = {"method": {"advantage": "asymmetric", "beta_pos": 0.9}}
    for seed in (1, 2, 3):
        run_folders.write(tmp_path / f"composed-{seed}", seed=seed, passes={0: 0.1, 4: 0.9}, settings=asymmetric)
    (alone,) = group(read_all([tmp_path]))
    assert (alone.role, alone.label) == ("", "sa-ah-grpo, α 0.5, advantage=asymmetric")
    run_folders.write(tmp_path / "plain", passes={0: 0.5, 4: 0.5})
    run_folders.write(tmp_path / "a falling alpha", settings={"method": {"alpha_end": 0.0}})
    runs = read_all([tmp_path])
    assert sorted(g.role for g in group(runs)) == ["", "", "SA-AH-GRPO"]
    assert "one seed" in verdict(runs, "SA-AH-GRPO improves on the base").reason  # of the plain one alone


def test_both_of_the_papers_reductions_are_grpo(tmp_path):
    run_folders.write(tmp_path / "grpo", method="grpo", alpha=None, settings={"method": {"normaliser": "token-mean"}})
    run_folders.write(tmp_path / "clip", method="ah-grpo", settings={"method": {"clip_high": 0.3, "beta": 0.0}})
    assert [g.role for g in group(read_all([tmp_path]))] == ["GRPO", "AH-GRPO"]


def test_only_settings_that_decide_a_claim_are_kept_and_its_decided_claims_come_first(tmp_path):
    grid(tmp_path, lambda name: QUIET if name == "SA-AH-GRPO" else WILD)
    for seed in (1, 2, 3):  # another setting, with a method that the paper does not have
        other = {"learner": {"inner_updates": 2}}
        run_folders.write(tmp_path / f"holder-{seed}", method="holder", alpha=None, seed=seed, settings=other)
    found = verdicts(settings_of(group(read_all([tmp_path]))))
    assert len(found) == 2 * len(CLAIMS)
    ((setting, kept),) = decided(found).items()
    assert "inner_updates=1" in setting
    words = [each.verdict for each in kept]
    num_decided = len(CLAIMS) - words.count(INCONCLUSIVE)
    assert 0 < num_decided < len(CLAIMS)
    assert INCONCLUSIVE not in words[:num_decided]
    assert decided([each for each in found if each.setting != setting]) == {}


def test_a_claim_holds(tmp_path):
    found = verdict(grid(tmp_path, lambda name: QUIET if name == "SA-AH-GRPO" else WILD), LESS)
    assert found.verdict == HOLDS
    assert "sa-ah-grpo, α 0 / sa-ah-grpo, α 0.5: 400.00" in found.reason  # standard deviations 2 and 0.1
    assert "lies above 1 (3 seeds)" in found.reason


def test_a_claim_does_not_hold(tmp_path):
    found = verdict(grid(tmp_path, lambda name: WILD if name == "SA-AH-GRPO" else QUIET), LESS)
    assert found.verdict == FAILS
    assert "lies below 1" in found.reason


def test_overlapping_seeds_are_inconclusive(tmp_path):
    """GRPO's variance is larger in the mean, but the seeds differ so much that this may be chance."""

    def scaled(rewards):
        return lambda name: [reward * (0.9 if name == "SA-AH-GRPO" else 1) for reward in rewards]

    runs = grid(tmp_path / "a", scaled(QUIET)) + grid(tmp_path / "b", scaled(WILD), seeds=(4, 5, 6))
    found = verdict(runs, LESS)
    assert found.verdict == INCONCLUSIVE
    assert ": 1.23, 95 % [" in found.reason
    assert "contains 1 (6 seeds)" in found.reason


@pytest.mark.parametrize("seeds", [(1,), (7,)])
def test_one_seed_decides_nothing(tmp_path, seeds):
    runs = grid(tmp_path, lambda name: QUIET if name == "SA-AH-GRPO" else WILD, seeds=seeds, passes={0: 0.2, 4: 0.6})
    found = verdicts(settings_of(group(runs)))
    assert {each.verdict for each in found} == {INCONCLUSIVE}
    assert decided(found) == {}


def test_repeats_of_a_seed_are_one_seed(tmp_path):
    runs = [
        run
        for part in ("a", "b", "c")
        for run in grid(tmp_path / part, lambda name: QUIET if name == "SA-AH-GRPO" else WILD, seeds=(1,))
    ]
    assert verdict(runs, LESS).verdict == INCONCLUSIVE


def test_unfinished_runs_decide_nothing(tmp_path):
    found = verdict(grid(tmp_path, lambda name: QUIET if name == "SA-AH-GRPO" else WILD, steps=9), LESS)
    assert (found.verdict, found.reason) == (INCONCLUSIVE, "no finished run of GRPO")


def test_other_settings_are_not_compared(tmp_path):
    """Three seeds of SA-AH on one model and of GRPO on another make two settings, and no comparison."""
    folders = [
        run_folders.write(tmp_path / f"{alpha}-{seed}", alpha=alpha, seed=seed, model=model)
        for alpha, model in ((0.0, "small"), (0.5, "large"))
        for seed in (1, 2, 3)
    ]
    found = [each for each in verdicts(settings_of(group(read_all(folders)))) if LESS in each.claim]
    assert [(each.setting, each.verdict) for each in found] == [("large", INCONCLUSIVE), ("small", INCONCLUSIVE)]


def test_the_baseline_keeps_the_reduction(tmp_path):
    """If both are there, alpha 0 (a token mean, as the two others) is GRPO, not Eq. 2."""
    runs = grid(tmp_path, lambda name: QUIET)
    eq2 = read_all([run_folders.write(tmp_path / f"eq2-{s}", method="grpo", alpha=None, seed=s) for s in (1, 2, 3)])
    assert "sa-ah-grpo, α 0 / sa-ah-grpo" in verdict(runs + eq2, LESS).reason
    without = [run for run in runs if run.settings["method.alpha"]] + eq2
    assert "grpo (Eq. 2, another reduction) / sa-ah-grpo" in verdict(without, LESS).reason


def test_peaks_of_different_checkpoints_do_not_compare(tmp_path):
    folders = [
        run_folders.write(tmp_path / f"{alpha}-{seed}", alpha=alpha, seed=seed, passes=passes)
        for alpha, passes in ((0.0, {2: 0.5, 4: 0.6}), (0.5, {4: 0.9}))
        for seed in (1, 2, 3)
    ]
    assert "same steps" in verdict(read_all(folders), "no peak accuracy").reason


def test_a_bound_from_above(tmp_path):
    low = {"kl/mean": [0.001] * 4}
    runs = grid(tmp_path / "low", lambda name: QUIET, metrics=low)
    assert verdict(runs, "KL stays below").verdict == INCONCLUSIVE  # seeds that do not differ have no interval
    folders = [
        run_folders.write(tmp_path / f"{seed}", seed=seed, metrics={"kl/mean": [level * (1 + seed / 100)] * 4})
        for seed, level in ((1, 0.001), (2, 0.001), (3, 0.001))
    ]
    assert verdict(read_all(folders), "KL stays below").verdict == HOLDS


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (
            {"ah-grpo": (0.0062, 0.0065, 0.0068), "sa-ah-grpo": (0.0065, 0.008, 0.0095)},
            INCONCLUSIVE,
        ),
        ({"ah-grpo": (0.0062, 0.0065, 0.0068), "sa-ah-grpo": (0.004, 0.0041, 0.0042)}, HOLDS),
        ({"ah-grpo": (0.0062, 0.0065, 0.0068), "sa-ah-grpo": (0.012, 0.0121, 0.0122)}, FAILS),
        ({"ah-grpo": (0.001, 0.001, 0.001), "sa-ah-grpo": (0.012, 0.0121, 0.0122)}, FAILS),
        ({"ah-grpo": (0.001, 0.001, 0.001), "sa-ah-grpo": (0.004, 0.0041, 0.0042)}, INCONCLUSIVE),  # the first has none
    ],
)
def test_a_bound_on_every_method_is_that_of_the_least_certain(tmp_path, levels, expected):
    folders = [
        run_folders.write(tmp_path / f"{name}-{seed}", method=name, seed=seed, metrics={"kl/mean": [level] * 4})
        for name, of_seeds in levels.items()
        for seed, level in enumerate(of_seeds)
    ]
    assert verdict(read_all(folders), "KL stays below").verdict == expected


def test_a_negative_alpha_against_the_model_before(tmp_path):
    """A seed's value is the mean over the negative alphas: .2 and .1 below its base."""
    folders = [
        run_folders.write(
            tmp_path / f"{alpha}-{seed}",
            method="ah-grpo",
            alpha=alpha,
            seed=seed,
            passes={0: 0.5, 4: end + seed / 1000},
        )
        for alpha, end in ((-0.5, 0.3), (-0.25, 0.4), (0.5, 0.9))
        for seed in (1, 2, 3)
    ]
    found = verdict(read_all(folders), "negative α ends below the base")
    assert found.verdict == HOLDS
    assert "AH-GRPO with α < 0: -0.148" in found.reason
    assert verdict(read_all(folders[6:]), "negative α ends below the base").verdict == INCONCLUSIVE
    assert verdict(read_all(folders[6:]), "AH-GRPO improves on the base").verdict == HOLDS


@pytest.mark.parametrize(("late", "expected"), [(0.2, HOLDS), (0.4, FAILS)])
def test_the_standard_deviation_of_rewards_counts_in_the_later_half(tmp_path, late, expected):
    folders = [
        run_folders.write(tmp_path / str(seed), seed=seed, metrics={"reward/std": [2.0, 2.0, 0.1, late + seed / 1000]})
        for seed in (1, 2, 3)
    ]
    found = verdict(read_all(folders), "stays below 0.25")
    assert (found.verdict, f"second half, sa-ah-grpo, α 0.5: {late + 0.002:.3f}" in found.reason) == (expected, True)


def test_methods_that_differ_in_more_are_not_compared(tmp_path):
    folders = [
        run_folders.write(tmp_path / f"{beta}-{seed}", alpha=alpha, seed=seed, settings={"method": {"beta": beta}})
        for alpha, beta in ((0.0, 0.01), (0.5, 0.04))
        for seed in (1, 2, 3)
    ]
    found = verdict(read_all(folders), LESS)
    assert (found.verdict, "also differ in method.beta" in found.reason) == (INCONCLUSIVE, True)
    folders += [run_folders.write(tmp_path / f"fair-{seed}", alpha=0.0, seed=seed) for seed in (1, 2, 3)]
    assert verdict(read_all(folders), LESS).reason.startswith("training variance, ")


def test_no_other_alpha_stands_for_the_papers(tmp_path):
    folders = [
        run_folders.write(tmp_path / f"{alpha}-{seed}", alpha=alpha, seed=seed) for alpha in (0, 0.1) for seed in (1, 2)
    ]
    assert verdict(read_all(folders), LESS).reason == "no finished run of SA-AH-GRPO at the paper's α 0.5"


def test_a_seed_that_still_runs_does_not_void_the_others(tmp_path):
    runs = grid(tmp_path / "done", lambda name: QUIET if name == "SA-AH-GRPO" else WILD)
    cut = {"rewards": QUIET[:2], "settings": {"run": {"steps": 4}}}
    late = read_all([run_folders.write(tmp_path / f"late-{a}", alpha=a, seed=9, **cut) for a in (0.0, 0.5)])
    found = verdict(runs + late, LESS)
    assert (found.verdict, found.reason) == (HOLDS, verdict(runs, LESS).reason)


def test_a_seed_without_variance_is_not_left_out_silently(tmp_path):
    def flat_in_one(name, seed):
        return [1.0] * 4 if (name, seed) == (0.5, 3) else [x * (1 + seed / 100) for x in WILD]

    folders = [
        run_folders.write(tmp_path / f"{alpha}-{seed}", alpha=alpha, seed=seed, rewards=flat_in_one(alpha, seed))
        for alpha in (0.0, 0.5)
        for seed in (1, 2, 3)
    ]
    found = verdict(read_all(folders), LESS)
    assert found.verdict == INCONCLUSIVE
    assert "a seed of sa-ah-grpo, α 0.5 has a training variance of 0" in found.reason


def test_the_final_accuracy_is_that_after_the_last_step(tmp_path):
    """A run has recorded its last step, but not yet its last evaluation."""
    folders = [
        run_folders.write(tmp_path / f"{alpha}-{seed}", alpha=alpha, seed=seed, passes={0: 0.2, 2: 0.4 + seed / 100})
        for alpha in (0.0, 0.5)
        for seed in (1, 2, 3)
    ]
    runs = read_all(folders)
    assert "not recorded" in verdict(runs, "ends with a higher Pass@1 than GRPO").reason
    columns = tables.summary(group(runs)).columns
    assert tables.summary(group(runs)).rows[1].cells[columns.index("Pass@1 final ↑")].text == "-"


def test_seeds_that_differ_in_the_memory_plan_are_one_experiment(tmp_path):
    assert {*memory_fit.UNSET, memory_fit.GPU} <= OF_ONE_RUN
    plans = [
        {"learner": {"recompute": "none", "micro_batch_tokens": 16384}, "actor": {"num_sequences": 256}},
        {"learner": {"recompute": "layer", "micro_batch_tokens": 8192}, "actor": {"kv_cache_gib": 2.5}},
        {"run": {"gpu_memory_gib": 24.0}, "actor": {"gpu_memory_fraction": 0.31}},
    ]
    folders = [run_folders.write(tmp_path / str(i), seed=i, settings=plan) for i, plan in enumerate(plans)]
    (found,) = group(read_all(folders))
    assert found.seeds == (0, 1, 2)


def test_labels_name_what_differs(tmp_path):
    folders = [
        run_folders.write(tmp_path / f"{alpha}-{seed}", alpha=alpha, seed=seed)
        for alpha in (0.5, 0.25)
        for seed in (1, 2)
    ]
    folders.append(run_folders.write(tmp_path / "default", alpha=None, seed=3))  # the method's default alpha is 0.5
    folders += [
        run_folders.write(tmp_path / f"zero-{seed}", alpha=zero, seed=seed) for seed, zero in ((1, 0), (2, 0.0))
    ]
    found = {each.label: each.seeds for each in group(read_all(folders))}
    assert found == {"sa-ah-grpo, α 0": (1, 2), "sa-ah-grpo, α 0.25": (1, 2), "sa-ah-grpo, α 0.5": (1, 2, 3)}
