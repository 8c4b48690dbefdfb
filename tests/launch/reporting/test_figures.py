"""The report's figures hold the numbers of the runs: read back from what was drawn."""

import numpy as np
import pytest
import run_folders

from launch.reporting import curves
from launch.reporting.data.groups import group
from launch.reporting.data.runs import read_all
from launch.reporting.paper import figures_accuracy, figures_training, tables


@pytest.fixture
def groups(tmp_path):
    """Two seeds of GRPO's baseline and of SA-AH-GRPO, with numbers that differ."""
    for seed in (1, 2):
        for alpha, gain in ((0.0, 0.0), (0.5, 0.1)):
            run_folders.write(
                tmp_path / f"{alpha}-{seed}",
                alpha=alpha,
                seed=seed,
                rewards=[seed + 10 * gain, 2.0 * seed, 3.0 * seed, 5.0 * seed],
                passes={0: 0.2, 1: 0.3 * seed, 2: 0.1 * seed + gain, 4: 0.2 * seed + gain},
            )
    return group(read_all([tmp_path]))


def line(axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [each for each in axes.lines if each.get_label() == label]
    return list(found.get_xdata()), pytest.approx(list(found.get_ydata()))


def test_pass_at_1_over_steps(groups):
    for drawn, label, values in (
        (figures_accuracy.figure_1(groups), "sa-ah-grpo, α 0", [0.45, 0.15, 0.3]),
        (figures_accuracy.figures_2_3(groups), "sa-ah-grpo, α 0.5", [0.45, 0.25, 0.4]),
        (figures_accuracy.all_methods(groups), "sa-ah-grpo, α 0.5", [0.45, 0.25, 0.4]),
    ):
        axes = drawn.figure.axes[0]
        assert line(axes, label) == ([1, 2, 4], values)
        (base,) = [each for each in axes.lines if each.get_label() == "base model (zero-shot)"]
        assert set(base.get_ydata()) == {0.2}


def test_peak_and_final_over_alpha(groups):
    axes = figures_accuracy.both_ablations(groups).figure.axes[1]
    assert axes.get_title() == "smollm2-135m-instruct: SA-AH-GRPO"
    drawn = [[round(float(y), 3) for y in each.get_ydata()] for each in axes.lines]
    assert drawn.index([0.45, 0.45]) < drawn.index([0.3, 0.4])  # over alpha 0 and 0.5: peak, then final


def test_rewards_of_each_method(groups):
    baseline, selective = figures_training.rewards(groups).figure.axes
    for axes, mean in ((baseline, [1.5, 3.0, 4.5, 7.5]), (selective, [2.5, 3.0, 4.5, 7.5])):
        curves = [list(each.get_ydata()) for each in axes.lines]
        assert mean in curves
        assert sum(len(curve) == 4 for curve in curves) == 3  # two thin seeds and their mean


def test_learning_curves_are_means_over_seeds_and_accuracy_starts_with_the_base_model(groups):
    (drawn,) = curves.learning_curves(groups)
    reward, accuracy, *others = drawn.figure.axes
    assert [axes.get_title() for axes in drawn.figure.axes] == list(curves.METRICS)
    assert line(reward, "sa-ah-grpo, α 0.5") == ([1, 2, 3, 4], [2.5, 3.0, 4.5, 7.5])
    low, high = reward.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == (1.0, 10.0)  # of the first group's two seeds
    assert line(accuracy, "sa-ah-grpo, α 0.5") == ([0, 1, 2, 4], [0.2, 0.45, 0.25, 0.4])
    assert all(len(axes.lines) == 2 for axes in others)


def test_every_setting_has_learning_curves_of_its_own(tmp_path):
    for model in ("small", "large"):
        run_folders.write(tmp_path / model, model=model)
    drawn = curves.learning_curves(group(read_all([tmp_path])))
    assert [each.title for each in drawn] == ["Learning curves: large", "Learning curves: small"]
    assert len({each.key for each in drawn}) == 2


def test_smoothing_is_a_centred_mean_over_a_tenth_of_the_steps():
    values = np.arange(40.0)
    values[20] = np.nan
    found = curves.smoothed(values)  # five steps wide
    assert found[[0, 1, 10, 20, 22]] == pytest.approx([1.0, 1.5, 10.0, 20.0, (21 + 22 + 23 + 24) / 4])
    assert list(curves.smoothed(values[:19])) == list(values[:19])
    assert np.isnan(curves.smoothed(np.full(40, np.nan))).all()


def test_a_seed_without_variance_counts_in_the_figures_mean_as_in_the_tables(tmp_path):
    for seed, last in ((1, 3.0), (2, 5.0), (3, 5.0)):  # variances 0, 1, 1
        run_folders.write(tmp_path / str(seed), seed=seed, rewards=(1.0, 1.0, 3.0, last))
    groups = group(read_all([tmp_path]))
    (diamond,) = [each for each in figures_training.variances(groups).figure.axes[0].lines if each.get_marker() == "D"]
    assert np.array(diamond.get_xdata()) == pytest.approx([2 / 3])
    assert tables.summary(groups).rows[1].cells[6].text.startswith("0.6667")
