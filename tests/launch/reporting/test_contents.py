"""What is on the page in which order, the paper's claims only where the runs decide one; and what is exported."""

import csv
import re

import pytest
import run_folders

from launch import report
from launch.reporting.page import ASSETS

CURVES, TIMELINE = "learning-curves", "timeline-steps"
TABLES = ["table-2", "tables-3-4", "table-5", "tables-6-7"]
FIGURES = ["figure-1", "figures-2-3", "figure-4", "training-variance", *(f"figure-a{i}" for i in (1, 2, 3, 4, 5))]
PASSES = {0: 0.2, 2: 0.4, 4: 0.5}


def shown(html: str) -> str:
    """The page without its style, its script and the data of that."""
    return html.split("<body>")[1].split('<script id="data"')[0]


def test_it_opens_on_the_run_then_curves_samples_tables_settings(tmp_path):
    """And without a word of the paper's claims, of which one run decides none."""
    rewards = [1.0] * 5 + [2.0] * 5 + [3.0] * 5
    metrics = {"time/step_seconds": [7.5] * 14 + [15.0]}
    folder = run_folders.write(tmp_path / "run", rewards=rewards, passes={0: 0.25, 15: 0.5}, metrics=metrics)
    html = shown(run_folders.report_of(folder))
    first = ["sa-ah-grpo, α 0.5 on smollm2-135m-instruct", "chain_sum", "1.00 → 3.00", "0.250 → 0.500"]
    first += ["± 0.106 → ± 0.123", "64 problems", "<dd>15</dd>", "2 min 0 s", "7.5 s/step"]
    first += ["devices idle 7 %"]
    parts = [
        *first,
        '"learning-curves"',
        "Samples</h2>",
        "Timeline</h2>",
        TIMELINE,
        "One step</h3>",
        "Tables</h2>",
        "Settings</h2>",
    ]
    at = [html.index(part) for part in (*parts, "Notes</h2>")]
    assert at == sorted(at)
    for part in ("claim", 'class="verdict"', 'class="paper"', 'id="paper"', "inconclusive", "figure-1", "Qwen"):
        assert part not in html, part
    assert re.findall(r"<th scope=\"col\">(step \d+)", html) == ["step 0", "step 15"]  # none of the paper's


def test_many_runs_are_one_table_of_experiments_first(tmp_path):
    for alpha, end in ((0.0, 0.5), (0.5, 0.75)):
        for seed in (1, 2):
            passes = {0: 0.25, 4: end + seed / 8}
            run_folders.write(tmp_path / f"{alpha}-{seed}", alpha=alpha, seed=seed, passes=passes)
    html = shown(run_folders.report_of(*sorted(tmp_path.iterdir())))
    table = html[html.index('<table id="overview">') : html.index('"learning-curves"')]
    assert "2 experiments on smollm2-135m-instruct" in html[: html.index(table)]
    rows = re.findall(r'<th scope="row">.*?</tr>', table)
    assert ["α 0<" in row for row in rows] == [True, False]
    assert "0.250 → 0.688<small>± 0.106 → [0.625, 0.750] · step 4, 64 problems" in rows[0]


def test_a_run_without_evaluations_shows_how_many_of_its_rollouts_were_correct(tmp_path):
    folder = run_folders.write(tmp_path / "run", metrics={"reward/correct_fraction": [0.0, 0.5, 0.5, 1.0]})
    assert re.search(
        r"<dd>0.250 → 0.750</dd><dd class=.note.>of training rollouts: no evaluation", run_folders.report_of(folder)
    )


def test_every_table_and_figure_of_the_paper_is_in_one_closed_section_if_a_claim_is_decided(tmp_path):
    folders = [
        run_folders.write(
            *(tmp_path / f"{method}-{alpha}-{seed}",),
            method=method,
            alpha=alpha,
            seed=seed,
            passes=PASSES | {4: 0.5 + seed / 100},
            rollouts_per_step=4,
        )
        for method, alpha in (("grpo", None), ("ah-grpo", -0.25), ("ah-grpo", 0.5), ("sa-ah-grpo", 0.5), ("dapo", None))
        for seed in (1, 2)
    ]
    html = run_folders.report_of(*folders)
    before, paper = html.split('<section id="paper"')
    paper, notes = paper.split("</section>", 1)
    assert paper.count("<details") == paper.count("</details>") == 1
    assert re.search(r"<details [^>]*open", paper) is None
    assert "Notes</h2>" in notes and "Settings</h2>" in before
    for key in TABLES:
        assert f'<table id="paper-{key}">' in paper
    for key in FIGURES:
        assert re.search(rf'<figure id="{key}">.*?<svg [^>]*role="img" aria-label="[^"]+"', paper, re.DOTALL), key
    for number in ("0.0246", "0.00785", "0.676 ± 0.041", "6.933"):  # the paper's, of Tables 2, 5 and 6
        assert number in paper and number not in before
    assert paper.count('class="verdict"') == 19
    assert "GRPO improves" in paper and "GRPO improves" not in before


def test_cannot_be_told_is_no_word_of_the_report(tmp_path):
    for path in ASSETS.parent.rglob("*.*"):
        if path.suffix in (".py", ".j2", ".js", ".md"):
            assert "be told" not in path.read_text(encoding="utf-8"), path


def test_export(tmp_path):
    folder = run_folders.write(tmp_path / "run", passes=PASSES)
    out = tmp_path / "new" / "export"
    assert report.main([str(folder), "--export", str(out)]) == 0
    assert (folder / "report.html").is_file()
    assert {path.name for path in out.iterdir()} == {
        *(f"{key}.csv" for key in (*TABLES, "claims", "settings")),
        *(f"{key}.{kind}" for key in (CURVES, TIMELINE, *FIGURES) for kind in ("svg", "png")),
    }
    base, run, *published = csv.DictReader((out / "table-2.csv").open(encoding="utf-8"))
    assert (base["source"], base["method"]) == ("runs", "base (zero-shot)")
    assert (run["method"], run["Pass@1 final ↑"], run["train variance ↓"]) == ("sa-ah-grpo, α 0.5", "0.5", "1.0")
    assert float(run["Pass@1 final ↑, low"]) == pytest.approx(0.5 - 1.96 * (0.25 / 64) ** 0.5)
    assert {row["source"] for row in published} == {"paper"}
    verdicts = [row["verdict"] for row in csv.DictReader((out / "claims.csv").open(encoding="utf-8"))]
    assert verdicts == 19 * ["inconclusive"]
    assert (out / "figure-1.png").read_bytes().startswith(b"\x89PNG")
    assert ">optimizer step</text>" in (out / "figure-1.svg").read_text()  # text as text
