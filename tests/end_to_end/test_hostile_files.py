"""A run folder from a stranger: no code in it runs, nothing is written outside of it, and bad contents are one line."""

import json
import os
import shutil

import local_run
import pytest
from stranger import LAST, SECRET, contents, rewrite

from common.files import user_module
from launch import run
from launch.planning import plan

pytestmark = pytest.mark.slow

LINKS = [
    *("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl", "timeline.jsonl", "config.toml"),
    *("metrics.jsonl.partial", "config.toml.partial", "checkpoints", "tensorboard", "tensorboard/events.out.x"),
    *("evaluations", "evaluations/step-000004.jsonl"),
    *("checkpoints/step-000004", "checkpoints/step-000006.partial", "checkpoints/step-000002/run_state.json"),
]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("to", ["file", *(pytest.param(to, marks=pytest.mark.long) for to in ("folder", "nothing"))])
def test_a_link_in_a_run_folder_is_refused(stranger, outside, start, name, to):
    path = stranger / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to({"file": outside, "folder": outside.parent, "nothing": outside.with_name("new")}[to])
    status, err = start(stranger)
    assert status == 2
    assert err.count("\n") == 1
    assert "is a symbolic link" in err or "has no run to resume" in err  # a config.toml that leads to nothing
    assert contents(outside.parent) == {"secret.jsonl": SECRET.encode()}


def test_a_pipe_in_a_run_folder_is_refused(stranger, start):
    """Opening one waits for whoever reads it."""
    (stranger / "metrics.jsonl").unlink()
    os.mkfifo(stranger / "metrics.jsonl")
    status, err = start(stranger)
    assert (status, err.count("\n")) == (2, 1)
    assert "metrics.jsonl is a symbolic link or a special file" in err


def test_a_run_folder_may_itself_be_a_link(stranger, start, tmp_path):
    """The user's own, to a larger disk."""
    (tmp_path / "mine").symlink_to(stranger)
    assert start(tmp_path / "mine") == (0, "")


def test_a_run_is_resumed_where_its_config_is_not_where_that_says(stranger, finished, tmp_path, monkeypatch, capsys):
    victim = shutil.copytree(finished, tmp_path / "victim")
    before = contents(victim)
    rewrite(stranger, run={"dir": str(victim)})
    (stranger / "metrics.jsonl").write_text('{"step": 9}\n')
    local_run.install(monkeypatch)
    assert run.main(["--config", str(stranger / "config.toml"), "--run.resume"]) == 0
    assert contents(victim) == before
    assert (stranger / "metrics.jsonl").read_text() == ""  # rewound: it was this folder that was resumed


EVIL = "import os\nos.mkdir({trace!r})\ndef load(*_): ...\nreward = advantage = load\n"
NAMES = {"task": {"name": "runs.x.evil"}, "method": {"advantage": "runs.x.evil.advantage"}}


@pytest.mark.parametrize("package", [True, False])
@pytest.mark.parametrize("section", NAMES)
def test_a_config_cannot_name_the_code_beside_it(stranger, outside, evaluated, monkeypatch, capsys, section, package):
    """`runs` lies in the checkout, from which Python imports."""
    trace = outside.parent / "ran"
    monkeypatch.syspath_prepend(stranger.parent.parent)
    (stranger / "evil.py").write_text(EVIL.format(trace=str(trace)))
    if package:
        (stranger / "__init__.py").write_text(EVIL.format(trace=str(trace)))
    rewrite(stranger, **{section: NAMES[section]})
    resumed = run.main(["--config", str(stranger / "config.toml"), "--run.resume"]), capsys.readouterr().err
    for status, err in (resumed, evaluated(stranger / LAST)[::2]):
        assert (status, err.count("\n")) == (2, 1), err
        assert "is a run folder, from which no code is imported" in err
    assert not trace.exists()


def test_a_method_cannot_be_the_code_in_a_run_folder(stranger, outside, monkeypatch, capsys):
    monkeypatch.syspath_prepend(stranger.parent.parent)
    (stranger / "evil.py").write_text(EVIL.format(trace=str(outside.parent / "ran")))
    assert run.main(["--method.name", "runs.x.evil", "--run.dir", str(outside.parent / "run"), "--dry-run"]) == 2
    assert "is a run folder, from which no code is imported" in capsys.readouterr().err
    assert not (outside.parent / "ran").exists()


def test_a_users_own_module_is_imported(stranger, monkeypatch, tmp_path):
    """Also from a folder without __init__.py, beside run folders."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.py").write_text("number = 7")
    assert user_module("tasks.mine").number == 7
    assert user_module("json.decoder").JSONDecoder


@pytest.mark.parametrize("below", [".", "checkpoints", "checkpoints/step-000004"])
def test_nothing_starts_within_a_run_folder(stranger, start, evaluated, monkeypatch, below):
    """Python and Ray would import from there, before the standard library even."""
    monkeypatch.chdir(stranger / below)
    for status, err in (start(stranger), evaluated(stranger / LAST)[::2]):
        assert (status, err.count("\n")) == (2, 1), err
        assert "is a run folder, whose files would be imported as code" in err


def test_a_model_in_the_folder_cannot_bring_code(stranger, outside, start, evaluated):
    trace = outside.parent / "ran"
    folder = stranger / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(EVIL.format(trace=str(trace)))
    maps = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": maps}))
    rewrite(stranger, model={"path": str(folder)})
    status, err = start(stranger, "--model.path", str(folder))
    assert (status, err.count("\n")) == (2, 1), err
    status, _, err = evaluated(stranger / LAST)
    assert (status, err.count("\n")) == (2, 1), err
    assert f"model.path={folder} is not a causal language model" in err
    assert not trace.exists()


@pytest.mark.parametrize(
    "content", ["x = " + "[" * 100_000, "\x00", "[run]\nsteps = 'many'", "run = 3", "[task]\nx = 1"]
)
def test_a_configuration_that_no_run_writes_is_one_line(stranger, start, evaluated, content):
    (stranger / "config.toml").write_text(content)
    for status, err in (start(stranger), evaluated(stranger / LAST)[::2]):
        assert (status, err.count("\n")) == (2, 1), err


@pytest.mark.parametrize(
    "line", ["[]", "{}", '{"step": "1"}', '{"step": -1}', '{"step": 1e999}', "[" * 100_000, "\x00"]
)
def test_lines_that_no_run_writes_are_one_line(stranger, start, line):
    path = stranger / "metrics.jsonl"
    before = line + "\n" + path.read_text()
    path.write_text(before)
    status, err = start(stranger)
    assert (status, err.count("\n")) == (2, 1), err
    assert f"{path} is damaged (line 1: " in err
    assert path.read_text() == before


def test_the_plan_reads_only(stranger):
    """What --dry-run and a grid's check do with a folder."""
    before = contents(stranger)
    config = plan.build(plan.read(stranger / "config.toml"))
    assert plan.run_folder(plan.with_values(config, {"run.dir": stranger, "run.resume": True})) == stranger / LAST
    assert contents(stranger) == before
