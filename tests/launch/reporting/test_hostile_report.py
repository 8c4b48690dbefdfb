"""The report of a stranger's run folder: everything in it is text, and what no run writes is one line."""

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import run_folders

from launch import report
from launch.reporting.data.runs import read

EVIL = (
    "</script></title></style></svg><script>alert(1)</script><img src=x onerror=alert(1)>"
    "\"'><a href='javascript:alert(1)'>"
)
METRICS = ("reward/mean", "kl/mean", "time/step_seconds", "completion/length_mean", "entropy/normalized_mean")


def made(tmp_path: Path, capsys, *folders: Path) -> tuple[int, str]:
    """Exit status, and the page or the line on stderr."""
    capsys.readouterr()
    out = tmp_path / "out.html"
    status = report.main([*map(str, folders), "--out", str(out)])
    err = capsys.readouterr().err
    assert err.count("\n") == (1 if status else 0), err
    return status, err if status else out.read_text()


class Page(HTMLParser):
    """Collects what a browser would run or fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.active: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "img", "iframe", "object", "embed", "base", "link", "meta", "form"):
            self.active.append((tag, dict(attrs).get("id") or ""))
        for name, value in attrs:
            scheme = (value or "").strip().lower()
            if name.startswith("on") or (name in ("src", "href", "xlink:href", "action") and scheme[:1] != "#"):
                self.active.append((name, scheme[:10]))


def test_everything_is_text(tmp_path, capsys):
    """Names, settings, metrics, prompts, completions: the page has the same active parts as an innocent one."""
    pages = []
    for number, text in enumerate(("innocent", EVIL)):
        fields = {
            "task": {"name": text, "gym": text},
            "model": {"path": text},
            "cluster": {"layout": text},
            text[:9]: {},
        }
        folder = run_folders.write(
            tmp_path / str(number) / text.replace("/", "∕"),
            method=text,
            alpha=None,
            passes={0: 0.2, 4: 0.5},
            settings=fields | {"method": {"advantage": text, text: text}},
            metrics={text: [1.0] * 4},
        )
        rollouts = [run_folders.rollout(step, 0, index) for step in (1, 4) for index in range(4)]
        hostile = dict.fromkeys(("prompt", "answer", "text", "finish_reason", "reward_error"), text)
        hostile |= {"tokens": [text] * 3, "parts": {text: 1.0}}
        run_folders.lines(folder / "rollouts.jsonl", [rollout | hostile for rollout in rollouts])
        other = run_folders.write(tmp_path / str(number) / "plain", passes={0: 0.2, 4: 0.6})
        status, html = made(tmp_path, capsys, folder, other)
        assert status == 0, html
        pages.append(html)
    innocent, hostile = (Page(html) for html in pages)
    assert hostile.active == innocent.active
    assert "<script>alert" not in pages[1]
    assert "<img src=x" not in pages[1]


NUMBERS = [math.nan, math.inf, -math.inf, 1e308, -1e308, 1e99, -1e99, 1e-320, 10**299, True, None, 0]


@pytest.mark.parametrize("value", NUMBERS, ids=str)
def test_any_number_gives_a_page(tmp_path, capsys, value):
    folder = run_folders.write(tmp_path / "run", passes={0: 0.2, 4: 0.5}, rollouts_per_step=4)
    records = [{"step": step} | dict.fromkeys(METRICS, value) for step in (1, 2, 3, 4)]
    records[1]["reward/mean"] = 1.0
    run_folders.lines(folder / "metrics.jsonl", records)
    rollouts = [
        run_folders.rollout(1, 0, i) | {"reward": value, "weights": [value], "advantage": value} for i in (0, 1)
    ]
    run_folders.lines(folder / "rollouts.jsonl", rollouts)
    status, html = made(tmp_path, capsys, folder, run_folders.write(tmp_path / "other", seed=2))
    assert status == 0, html
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)
    assert data and json.loads(data[1], parse_constant=pytest.fail)  # NaN is no JSON: the page's script would end


BAD_LINES = {
    "metrics": [
        *('{"step": "1"}', '{"step": -1}', '{"step": 1.5}', '{"step": NaN}', '{"step": 1e999}', '{"step": true}'),
        *('{"step": %s}' % ("1" * 5000), '{"step": 99999999999}', '{"step": null}', "[1]", "1", "{}", "[" * 100_000),
        *('{"step": 1, "reward/mean": "<b>"}', '{"step": 1, "x": {}}', '{"step": 1, "x": [1]}'),
        '{"step": 1, "x": %s}' % ("1" * 400),
    ],
    "evaluations": [
        *('{"step": 1}', '{"step": 1, "pass_at_1": "1", "num_problems": 4}', '{"step": 1, "pass_at_1": 0.5}'),
        '{"step": 1, "pass_at_1": 2, "num_problems": 4}',
        '{"step": 1, "pass_at_1": NaN, "num_problems": 4}',
        '{"step": 1, "pass_at_1": 0.5, "num_problems": -4}',
        '{"step": 1, "pass_at_1": 0.5, "num_problems": 1e9}',
    ],
    "timeline": [
        '{"step": 1}',
        '{"step": 1, "start_seconds": -1e308, "end_seconds": 1e308, "idle_fractions": [0], "spans": [{"worker": "w", '
        '"work": "learn", "device": 0, "start_seconds": 0, "end_seconds": 1}]}',
    ],
    "rollouts": [
        *('{"step": 1, "prompt_index": 0, "x"}', '{"step": 1, "prompt_index": 0, "x": %s}' % ("[" * 100_000)),
        *('{"step": 1, "prompt_index": 0, "tokens": "abc"}', '{"step": 1, "prompt_index": 0, "tokens": [[]]}'),
        '{"step": 1, "prompt_index": 0, "tokens": [], "parts": []}',
        '{"step": 1, "prompt_index": 0, "tokens": [], "text": {"x": 1}}',
        '{"step": 1, "prompt_index": 0, "tokens": [], "weights": ["1"]}',
        '{"step": 1, "prompt_index": 0, "tokens": [], "entropies": 3}',
        '{"step": 1, "prompt_index": 0, "tokens": [], "reward": "1"}',
        '{"step": 1, "prompt_index": 0, "tokens": [], "reward": %s}' % ("1" * 4000),
    ],
}


@pytest.mark.parametrize(
    ("name", "line"), [(name, line) for name, lines in BAD_LINES.items() for line in lines], ids=lambda text: text[:40]
)
def test_lines_that_no_run_writes_are_one_line(tmp_path, capsys, name, line):
    folder = run_folders.write(tmp_path / "run", passes={0: 0.2}, rollouts_per_step=4)
    (folder / f"{name}.jsonl").write_text(line + "\n")
    status, err = made(tmp_path, capsys, folder)
    assert (status, err[: len(str(folder))]) == (2, str(folder))
    assert f"{name}.jsonl is damaged (" in err
    assert len(err) < 500


BAD_CONFIGS = [
    *('[run]\nseed = "1"', "[run]\nseed = -1", "[run]\nsteps = nan", "[run]\nsteps = inf", "[run]\nseed = 1.5"),
    *("[run]\nsteps = 99999999999999999999", "[method]\nalpha = inf", "[method]\nalpha = [1]", "x = " + "[" * 100_000),
    *("\x00", "[run]\nseed = true", "[run]\nsteps = {}"),
]


@pytest.mark.parametrize("text", BAD_CONFIGS, ids=lambda text: text[:30])
def test_a_configuration_that_no_run_writes_is_one_line(tmp_path, capsys, text):
    folder = run_folders.write(tmp_path / "run")
    (folder / "config.toml").write_text(text)
    status, err = made(tmp_path, capsys, folder)
    assert status == 2
    assert f"{folder}/config.toml" in err
    assert len(err) < 500


@pytest.mark.parametrize(
    "text", ["run = 3\nmodel = []", '[model]\npath = ["x"]\n[method]\nname = {}', "[[run]]\nx = 1"]
)
def test_other_kinds_of_settings_are_shown(tmp_path, capsys, text):
    folder = run_folders.write(tmp_path / "run", passes={0: 0.2})
    (folder / "config.toml").write_text(text)
    assert made(tmp_path, capsys, folder)[0] == 0


def test_a_line_of_100_megabytes(tmp_path, capsys):
    """The page does not become as large as the file."""
    folder = run_folders.write(tmp_path / "run", rollouts_per_step=4)
    large = run_folders.rollout(1, 9, 0) | {"text": "x" * 100_000_000}
    with (folder / "rollouts.jsonl").open("a") as file:
        file.write(json.dumps(large) + "\n")
    status, html = made(tmp_path, capsys, folder)
    assert status == 0
    assert len(html) < 6_000_000
    run_folders.lines(folder / "rollouts.jsonl", [large])
    status, html = made(tmp_path, capsys, folder)
    assert status == 0
    assert len(html) < 6_000_000


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl"])
def test_a_link_does_not_show_another_file(tmp_path, capsys, name):
    folder = run_folders.write(tmp_path / "run", rollouts_per_step=4)
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    status, err = made(tmp_path, capsys, folder)
    assert status == 2
    assert f"{folder / name} is a symbolic link" in err


@pytest.mark.parametrize("grid", [False, True])
def test_the_report_is_not_written_through_a_link(tmp_path, capsys, grid):
    folder = run_folders.write(tmp_path / "grid" / "run")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    named = folder.parent if grid else folder
    (named / "report.html").symlink_to(secret)
    assert report.main([str(named)]) == 2
    assert "report.html is a symbolic link; remove it, or name a file with --out" in capsys.readouterr().err
    assert secret.read_text() == "secret"
    assert report.main([str(named), "--out", str(tmp_path / "mine.html")]) == 0


def test_a_pipe_is_no_file(tmp_path, capsys):
    folder = run_folders.write(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    assert made(tmp_path, capsys, folder)[0] == 0
    assert read(folder).num_steps == 0
