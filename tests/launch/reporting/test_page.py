"""The report as a command: what it shows in which order, nothing is fetched, and any run folder is read."""

import json
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_folders
import tiny

from common.metrics import JsonLines
from common.types import UpdateResult
from launch import report
from launch.recording.recorder import rollout_records
from launch.reporting.data.runs import read_all
from launch.reporting.figure import empty, panels
from launch.reporting.page import ASSETS
from launch.reporting.samples import all_samples, choose
from launch.reporting.style import COLOURS

PASSES = {0: 0.2, 2: 0.4, 4: 0.5}


def refuse(capsys, *options: object) -> str:
    """The one line on stderr."""
    assert report.main([str(option) for option in options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def data_of(html: str) -> dict:
    """What the page's script reads."""
    return json.loads(html.split('<script id="data" type="application/json">')[1].split("</script>")[0])


def test_nothing_is_fetched(tmp_path):
    html = run_folders.report_of(run_folders.write(tmp_path / "run", passes=PASSES, rollouts_per_step=4))
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w./-]*", html))
    assert addresses <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}  # names, not addresses
    for attribute in re.findall(r'(?:src|href|action)="([^"]*)"', html):
        assert attribute.startswith(("#", "data:,")), attribute
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\((?!#)", html)


def brightness(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read_in_both_themes():
    css = (ASSETS / "report.css").read_text()
    found = {name: pair for name, *pair in re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", css)}
    for theme in (0, 1):
        for name, pair in COLOURS.items():
            assert contrast(pair[theme], found["ground"][theme]) >= 4.5, name  # titles are written in them
        for heat in ("entropy", "weight", "negative"):
            assert contrast(found["ink"][theme], found[heat][theme]) >= 4.5, heat


def test_ids_are_unique(tmp_path):
    found = re.findall(r'\sid="([^"]+)"', run_folders.report_of(run_folders.write(tmp_path / "run", passes=PASSES)))
    assert len(found) == len(set(found))


def test_what_a_model_writes_is_text(tmp_path):
    folder = run_folders.write(tmp_path / "run")
    evil = {"prompt": "</script><script>alert(1)</script>", "tokens": ["<!--", "\u2028"]}
    run_folders.lines(folder / "rollouts.jsonl", [run_folders.rollout(1, 0, 0) | evil])
    html = run_folders.report_of(folder)
    assert "<script>alert" not in html
    assert data_of(html)["runs"][0]["groups"][0][0].items() >= evil.items()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_hardly_begun(tmp_path, steps):
    folder = run_folders.write(tmp_path / "run", rewards=[1.0] * steps, steps=30)
    html = run_folders.report_of(folder)
    assert f"{steps} of 30" in html
    assert "not finished" in html


def test_a_run_without_any_file_but_its_config(tmp_path):
    folder = run_folders.write(tmp_path / "run")
    for name in ("metrics", "evaluations", "rollouts"):
        (folder / f"{name}.jsonl").unlink()
    assert "0 of 4" in run_folders.report_of(folder)


def test_torn_last_lines_and_missing_values(tmp_path):
    """A reward that failed has no score, a rollout that the learner left out has no values, and JSON has no NaN."""
    folder = run_folders.write(tmp_path / "run", passes=PASSES, rollouts_per_step=4)
    bare = run_folders.rollout(5, 0, 0) | {"weights": [float("nan")], "reward_error": "timeout"}
    for name in ("reward", "correct", "parts", "advantage", "entropies"):
        del bare[name]
    for name, whole in (("metrics", {"step": 5, "kl/mean": None}), ("rollouts", bare), ("evaluations", None)):
        with (folder / f"{name}.jsonl").open("ab") as file:
            file.write((json.dumps(whole) + "\n" if whole else "").encode() + b'{"step": 6, "prompt_index": 0, "\xe2')
    (run,) = read_all([folder])
    assert (run.steps.tolist(), list(run.pass_at_1())) == ([1, 2, 3, 4, 5], list(PASSES))
    (samples,) = all_samples([run])
    assert [group[0]["step"] for group in samples.groups] == [1, 2, 3, 4, 5]
    shown = data_of(run_folders.report_of(folder))["runs"][0]["groups"][-1][0]
    assert (shown["reward"], shown["parts"], shown["entropies"], shown["weights"]) == (None, {}, [], [None])


def test_samples_are_what_the_recorder_writes(tmp_path):
    """Of a run's first step: a rollout that was scored, and one whose reward failed."""
    group = tiny.group(7, [2, 3], [2.0, None])
    result = UpdateResult(metrics={}, tokens=(None, None))
    records = rollout_records(1, [group], result, SimpleNamespace(decode=str))
    lines = JsonLines(tmp_path / "rollouts.jsonl")
    for record in records:
        lines.write(record)
    lines.close()
    ((scored, failed),) = choose(tmp_path / "rollouts.jsonl", 10_000).groups
    assert (scored["step"], scored["reward"], scored["parts"]) == (1, 2.0, {"correct": 2.0})
    assert (scored["prompt"], scored["finish_reason"], scored["tokens"]) == ("?", "stop", records[0]["tokens"])
    assert (failed["reward"], failed["reward_error"]) == (None, "it raised")


def test_a_group_that_is_too_large_does_not_end_the_choice(tmp_path):
    records = [run_folders.rollout(step, 0, 0) for step in (1, 2, 3, 4, 5)]
    records[4]["text"] = "x" * 100_000
    run_folders.lines(tmp_path / "rollouts.jsonl", records)
    assert [group[0]["step"] for group in choose(tmp_path / "rollouts.jsonl", 50_000).groups] == [1, 2, 3, 4]


@pytest.mark.parametrize(("method", "expected"), [("sa-ah-grpo", True), ("arca", False), ("my_weights", True)])
def test_only_a_discount_closes_the_horizon(tmp_path, monkeypatch, method, expected):
    """Residual weights below a half are not a horizon; a user's own method may have one."""
    (tmp_path / "my_weights.py").write_text("from common.methods import METHODS\nMETHOD = METHODS['ah-grpo']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = run_folders.write(tmp_path / "run", method=method, alpha=None, rollouts_per_step=4)
    assert data_of(run_folders.report_of(folder))["runs"][0]["horizon"] is expected


def test_a_grids_folder_is_its_runs(capsys, tmp_path):
    folders = [run_folders.write(tmp_path / "grid" / f"run-{seed}", seed=seed) for seed in (1, 2)]
    (tmp_path / "grid" / "run-1.log").write_text("")
    (tmp_path / "grid" / "notes").mkdir()
    assert [run.folder for run in read_all([tmp_path / "grid", folders[0]])] == folders
    assert report.main([str(tmp_path / "grid")]) == 0
    assert (tmp_path / "grid" / "report.html").is_file()
    assert "is not a run folder" in refuse(capsys, tmp_path / "grid" / "notes")


def test_an_empty_panel_leaves_the_ticks_of_the_others():
    _, (one, other) = panels(2, sharex=True, sharey=True)
    one.plot([0, 1], [0, 1])
    empty(other, "nothing yet")
    assert len(one.get_xticks()) > 1 and len(one.get_yticks()) > 1


def test_labels_are_not_formulas(tmp_path):
    folder = run_folders.write(tmp_path / "run", method="a$b$c", alpha=None, passes=PASSES)
    assert re.search(r">a\$b\$c[^<]*</text>", run_folders.report_of(folder))


def test_a_step_written_twice_counts_once(tmp_path):
    folder = run_folders.write(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/mean": 8.0}\n')
    (run,) = read_all([folder])
    assert run.series("reward/mean").tolist() == [1.0, 2.0, 3.0, 8.0]


def test_a_method_that_this_version_does_not_have(tmp_path):
    folder = run_folders.write(tmp_path / "run", method="my.own", alpha=None, passes=PASSES)
    assert "my.own" in run_folders.report_of(folder)


def test_the_same_folder_twice_is_one_run(tmp_path):
    folder = run_folders.write(tmp_path / "run")
    twin = run_folders.write(tmp_path / "other" / "run", seed=2)
    assert [run.name for run in read_all([folder, folder, twin])] == [f"{tmp_path.name}/run", "other/run"]


@pytest.mark.parametrize("kind", ["nothing", "empty", "file", "broken", "foreign"])
def test_a_folder_that_is_not_a_run(capsys, tmp_path, kind):
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("")
    elif kind != "nothing":
        path.mkdir()
    if kind == "broken":
        (path / "config.toml").write_text("[run\n")
    if kind == "foreign":
        (path / "config.toml").write_text('[run]\nseed = "one"\n')
    assert str(path) in refuse(capsys, path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}'])
def test_a_damaged_file_is_named_in_one_line(capsys, tmp_path, line):
    folder = run_folders.write(tmp_path / "run")
    file = folder / "metrics.jsonl"
    file.write_text(line + "\n" + file.read_text())
    assert f"{file} is damaged" in refuse(capsys, folder)


def test_bad_options(capsys, tmp_path):
    folder = run_folders.write(tmp_path / "run")
    assert "RUN" in refuse(capsys)
    assert "--wach" in refuse(capsys, folder, "--wach")
    assert "many" in refuse(capsys, folder, "--watch", "many")
    assert "cannot be written" in refuse(capsys, folder, "--out", folder)
    (tmp_path / "file").write_text("")
    assert "--export" in refuse(capsys, folder, "--export", tmp_path / "file")
    assert "--watch 99999" in refuse(capsys, folder, "--watch", "99999")


def test_the_same_runs_give_the_same_report(tmp_path):
    folder = run_folders.write(tmp_path / "run", passes=PASSES, rollouts_per_step=8)
    assert run_folders.report_of(folder) == run_folders.report_of(folder)


def test_fifty_thousand_rollouts(tmp_path):
    """Read line by line and sampled over all steps: whole groups, and the page stays small."""
    folder = run_folders.write(tmp_path / "run", rewards=[1.0] * 3125)
    with (folder / "rollouts.jsonl").open("w") as file:
        for step in range(1, 3126):
            records = [run_folders.rollout(step, index // 4, index) for index in range(16)]
            file.write("".join(json.dumps(record) + "\n" for record in records))
    started = time.perf_counter()
    samples = choose(folder / "rollouts.jsonl", 1_000_000)
    assert time.perf_counter() - started < 20
    assert samples.num_recorded == 50_000
    assert 500 < sum(map(len, samples.groups)) < 2_000
    assert {len(group) for group in samples.groups} == {4}
    steps = [group[0]["step"] for group in samples.groups]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (1, 3125)
    assert max(b - a for a, b in pairwise(steps)) < 40
    html = run_folders.report_of(folder)
    assert data_of(html)["runs"][0]["recorded"] == 50_000
    assert len(html.encode()) < 6_000_000


def test_as_a_script(tmp_path):
    folder = run_folders.write(tmp_path / "run")
    script = Path(report.__file__)
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, cwd=tmp_path, timeout=400)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"wrote {folder / 'report.html'}"
