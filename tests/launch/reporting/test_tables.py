"""The report's tables: numbers of the runs, and the paper's own."""

import run_folders

from launch.reporting.data.groups import group
from launch.reporting.data.runs import read_all
from launch.reporting.paper import numbers, tables
from launch.reporting.paper.claims import CLAIMS


def test_table_2_has_the_numbers_of_the_runs_and_of_the_paper(tmp_path):
    folders = [
        run_folders.write(tmp_path / str(seed), seed=seed, rewards=rewards, passes={0: 0.875, 2: 0.75, 4: final})
        for seed, rewards, final in ((1, (0, 0, 1.0, 3.0), 0.5), (2, (0, 0, 2.0, 6.0), 0.625))
    ]
    table = tables.summary(group(read_all(folders)))
    base, run, *published = [[cell.text for cell in row.cells] for row in table.rows]
    assert base[:2] + base[4:5] == ["smollm2-135m-instruct", "base (zero-shot)", "0.875 ± 0.081"]
    assert run[1:] == [
        *("sa-ah-grpo, α 0.5", "4", "2", "0.562 [0.500, 0.625]", "0.750 ± 0.106"),
        *("2.5000 [1.0000, 4.0000]", "-", "0.01000"),
    ]
    assert published[3] == [
        "Qwen2.5-3B",
        "SA-AH-GRPO, α 0.5",
        "180",
        "1",
        "0.846 ± 0.032",
        "0.858 ± 0.031",
        "0.0246",
        "-",
        "0.00785",
    ]


def test_an_unfinished_run_is_marked_and_eq_2_is_not_in_the_sweep(tmp_path):
    """Table 5 is one loss at several alphas, its 0 first; the mean within each completion first is another loss."""
    for method, alpha in (("ah-grpo", -0.25), ("sa-ah-grpo", 0.0), ("grpo", None)):
        run_folders.write(tmp_path / f"{method}", method=method, alpha=alpha, steps=9)
    groups = group(read_all([tmp_path]))
    assert {row.cells[3].text for row in tables.summary(groups).rows[1:4]} == {"1 (not finished)"}
    ours = [[cell.text for cell in row.cells[1:3]] for row in tables.ablation(groups).rows if not row.of_paper]
    assert ours == [["sa-ah-grpo, α 0", "0"], ["ah-grpo, α -0.25", "-0.25"]]


def test_every_footnote_marks_a_number(tmp_path):
    run_folders.write(tmp_path / "run")
    made = tables.all_tables(group(read_all([tmp_path / "run"])))
    marked = {cell.note for table in made for row in table.rows if row.of_paper for cell in row.cells}
    assert marked == {"", *numbers.FOOTNOTES}
    cells = [cell for row in made[0].rows for cell in row.cells]
    assert [cell.text for cell in cells if cell.note == "repeated"] == ["0.0885", "0.00537", "0.0630", "0.00512"]
    assert [cell.text for cell in cells if cell.note == "base"] == ["0.831 ± 0.033", "0.637 ± 0.042"]
    assert [cell.text for cell in cells if cell.note == "one-seed"] == ["0.0246"]


def test_the_papers_numbers_agree_with_one_another():
    """Peak and final of Table 2 are those of Tables 3 to 5, and Tables 6 and 7 repeat the SA-AH rows."""
    assert [r.peak for r in numbers.RESULTS["Qwen2.5-1.5B"][1:]] == [0.668, 0.676, 0.686]
    assert [r.final for r in numbers.RESULTS["Qwen2.5-3B"][1:]] == [0.846, 0.848, 0.846]
    for model, rows in numbers.DIAGNOSTICS.items():
        assert tuple(row[1] for row in rows[1:]) == numbers.RESULTS[model][3].pass_at_1
    assert numbers.ABLATION_SELECTIVE.pass_at_1[:5] == (0.648, 0.644, 0.664, 0.682, 0.670)
    last = [cell.text.split(" ")[0] for cell in tables.ablation([]).rows[-1].cells]
    assert last[1:] == ["SA-AH-GRPO", "0.5", "0.648", "0.644", "0.664", "0.682", "0.670", "0.686", "0.686"]
    assert numbers.ABLATION[0.0] == numbers.RESULTS["Qwen2.5-1.5B"][1].pass_at_1


def test_the_quoted_range_of_reward_std_is_that_of_tables_6_and_7_from_step_90():
    (claim,) = [each for each in CLAIMS if "stays below 0.25" in each.words]
    second_half = {model: {row[0]: row[3] for row in rows[3:]} for model, rows in numbers.DIAGNOSTICS.items()}
    large, small = second_half["Qwen2.5-3B"], second_half["Qwen2.5-1.5B"]
    at_120 = large.pop(120)
    ends = [f"{x:.3f}".lstrip("0") for x in (min(large.values()), max(large.values()), at_120, min(small.values()))]
    expected = "3B: {} to {} from step 90 on, but {} at step 120; 1.5B: {} to " + f"{max(small.values()):.3f}"
    assert (min(large), claim.paper) == (90, expected.format(*ends))
