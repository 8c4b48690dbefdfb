"""10,000 inputs of every kind: each is accepted, or refused in one line with nothing written."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import fuzz
import local_run
import pytest
import run_folders
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_grid import GRID
from stranger import LAST, contents, seal

from launch import evaluate, experiment, report, run
from launch.evaluation.measure import Evaluation
from launch.planning import model_folder, plan
from learner import checkpoint

CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
QUESTION = {"question": "1 + 1?", "answer": "2 #### 2"}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a tiny model and a finished run; no command starts a process."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        local_run.install(patch)
        model = local_run.save_model(folder / "model")
        patch.chdir(folder)
        assert run.main(local_run.options(model, Path("finished"))) == 0
        patch.setattr(model_folder, "smollm2", lambda: model)  # the default's, which has 30 layers
        patch.setattr(plan.AutoTokenizer, "from_pretrained", lru_cache(plan.AutoTokenizer.from_pretrained))
        patch.setattr(run.workers, "start", started)
        patch.setattr(run, "train", lambda *_, **__: None)
        patch.setattr(run, "Buffer", lambda *_, **__: None)
        found = Evaluation(record={"step": 0, "seconds": 0.0}, problems=[])
        patch.setattr(evaluate.measure, "evaluate", lambda *_, **__: found)
        patch.setattr("builtins.input", lambda *_: pytest.fail("asked the terminal"))
        yield folder


KEPT = [  # what the fuzzing found
    ["--method.group_filter", "none", "a\nb"],
    ["--method.group_filter", "none", "\x8cX\x83"],
    ["--run.stepps\u2028", "3"],
    ["--run.steps", "9" * 50_000],
    ["--config", "a" * 300],
    ["--config", "\0"],
    ["--run.dir", "a" * 300],
    ["--run.dir", "no/" + "a" * 300],
    ["--run.dir", "\udcff"],
    ["--task.data", "a\0"],
    ["--model.path", "a" * 300],
    ["--task.gym_options", '{"a": null}'],
    ["--task.gym_options", '{"a": "\\ud800"}'],
    ["--model.lora_rank", "1000000000000"],
    ["--run.prompts_per_step", "1000000"],
    ["--run.gpu_memory_gib", "1e300"],
    ["--run.seed", "9" * 19],
    ["--task.num_train", "1000000"],
    ["--task.num_eval", "9" * 19],
]
KEPT_FILES = [
    b"x = " + b"9" * 5000,
    b"[x" + b".a" * 3000 + b"]",
    b"task.gym_options.x" + b".a" * 3000 + b" = 1",
    b"[task]\nname = '\xff'",
    b'base = "%s"' % (b"x" * 300),
    b'base = "\\u0000"',
    b'"a\\nb" = 1',
    b"[model]\nlora_targets = []",
]


@pytest.fixture
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.workers, "start", lambda *_, **__: pytest.fail("a model would have been loaded"))


@pytest.mark.usefixtures("_no_process")
@pytest.mark.parametrize("argv", KEPT, ids=lambda argv: ascii(argv[-1][:20]))
def test_kept_command_lines(argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fuzz.check(run.main, ["--run.dir", "new", *argv, "--dry-run"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_no_process")
@pytest.mark.parametrize("data", KEPT_FILES, ids=lambda data: ascii(data[:20]))
def test_kept_files(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("name.toml").write_bytes(data)
    assert fuzz.check(run.main, ["--run.dir", "new", "--config", "name.toml", "--dry-run"]) == 2
    assert not Path("new").exists()


KEPT_ARGUMENTS = [
    (report.main, ["a" * 300]),
    (report.main, ["a\0"]),
    (report.main, ["a", "--out", "\udcff.html"]),
    (report.main, ["a", "--export", "b\0"]),
    (report.main, ["a", "--foo\nbar"]),
    (evaluate.main, ["a" * 300]),
    (experiment.main, ["--config", "grid.toml", "--dir", "a" * 300, "--dry-run"]),
    (experiment.main, ["--config", "grid.toml", "--dir", "a\0", "--dry-run"]),
    (experiment.main, ["--config", "long.toml", "--dry-run"]),
]


@pytest.mark.parametrize(
    ("main", "argv"), KEPT_ARGUMENTS, ids=lambda each: ascii(each[-1][-20:]) if isinstance(each, list) else ""
)
def test_kept_arguments(main, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment.signal, "signal", lambda *_: None)
    Path("grid.toml").write_text(GRID)
    Path("long.toml").write_text(GRID.replace("torn", "t" * 300))
    assert fuzz.check(main, argv) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.toml", "long.toml"]


KEPT_QUESTIONS = [{"question": "\ud800", "answer": "#### 2"}, {"question": "1", "answer": "\ud800 #### 2"}]


@pytest.mark.parametrize("row", [*KEPT_QUESTIONS, None])
def test_kept_data(row: dict | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None: a pipe."""
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(json.dumps(row)) if row else os.mkfifo("train.jsonl")
    argv = ["--task.name", "gsm8k", "--task.data", ".", "--task.num_train", "1", "--run.dir", "new", "--dry-run"]
    assert fuzz.check(run.main, argv) == 2


@pytest.mark.parametrize("data", KEPT_FILES[:2], ids=["digits", "deep"])
def test_kept_settings_of_a_report(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(data)
    assert fuzz.check(report.main, [str(tmp_path)]) == 2


@contextlib.contextmanager
def started(checked: plan.Plan, *, note=None) -> Iterator[SimpleNamespace]:
    """In the place of launch.runtime.workers.start: what it reads, without a process."""
    if checked.resume_from is not None:
        checkpoint.load_state(checked.resume_from)
    yield SimpleNamespace(plan=checked, fleet=None, version=0)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=".") as name:
        yield Path(name)


def small(folder: Path) -> list[str]:
    return local_run.options(Path("model"), folder)


@pytest.mark.long
@settings(max_examples=5000, **CHECKS)
@given(fuzz.arguments([*fuzz.OPTIONS, "config", "dry-run", "methods", "help", "run", "run.resume", "task.gym_options"]))
def test_command_lines(here: Path, argv: list[str]) -> None:
    before = set(here.iterdir())
    fuzz.check(run.main, [*small(Path("new")), *argv, "--dry-run"])
    assert set(here.iterdir()) == before


@pytest.mark.long
@settings(max_examples=2500, **CHECKS)
@given(fuzz.tomls(), fuzz.tomls(), st.booleans())
def test_configuration_files(here: Path, data: bytes, other: bytes, based: bool) -> None:
    with scratch() as folder:
        (folder / "other.toml").write_bytes(other)
        (folder / "name.toml").write_bytes((b'base = "other.toml"\n' if based else b"") + data)
        argv = ["--config", str(folder / "name.toml"), *small(Path("new"))[:-2], "--dry-run"]
        fuzz.check(run.main, argv)
        assert not Path("new").exists()


rows = st.one_of(
    st.just(json.dumps(QUESTION).encode()),
    fuzz.mutated(json.dumps(QUESTION).encode()),
    st.tuples(fuzz.anything, fuzz.anything).map(
        lambda pair: json.dumps({"question": pair[0], "answer": pair[1]}).encode()
    ),
    fuzz.values.map(lambda text: json.dumps({"question": text, "answer": f"{text} #### 1"}).encode()),
    fuzz.values.map(lambda text: json.dumps({"question": "1", "answer": f"#### {text}"}).encode()),
    st.binary(max_size=30),
)
files = st.lists(rows, max_size=3).map(b"\n".join)


@pytest.mark.long
@settings(max_examples=1000, **CHECKS)
@given(files, files, st.booleans())
def test_task_data(here: Path, train: bytes, test: bytes, example: bool) -> None:
    with scratch() as folder:
        (folder / "train.jsonl").write_bytes(train)
        (folder / "test.jsonl").write_bytes(test)
        argv = ["--task.name", "gsm8k", "--task.data", str(folder), "--task.num_train", "1", "--task.num_eval", "1"]
        fuzz.check(run.main, [*small(Path("new")), *argv, "--task.example", str(example).lower(), "--dry-run"])


@pytest.mark.long
@settings(max_examples=1000, **CHECKS)
@given(st.data())
def test_run_folders_to_resume(here: Path, data: st.DataObject) -> None:
    with scratch() as folder:
        stranger = Path(shutil.copytree("finished", folder / "run"))
        names = sorted(contents(stranger))
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True), "files"):
            content = data.draw(fuzz.mutated((stranger / name).read_bytes()[:20_000]), name)
            (stranger / name).write_bytes(content)
        if data.draw(st.booleans(), "sealed"):
            seal(stranger / LAST)
        before = contents(stranger)
        if data.draw(st.booleans(), "evaluate"):
            status = fuzz.check(evaluate.main, [str(stranger / LAST)])
        else:
            named = data.draw(st.booleans(), "named by its config.toml")
            argv = ["--config", str(stranger / "config.toml")] if named else small(stranger)
            status = fuzz.check(run.main, [*argv, "--run.resume"])
        assert status == 0 or contents(stranger) == before


@pytest.mark.long
@settings(max_examples=700, **CHECKS)
@given(st.data())
def test_run_folders_to_report(here: Path, data: st.DataObject) -> None:
    with scratch() as folder:
        written = run_folders.write(folder / "run", passes={0: 0.2, 2: 0.5}, rewards=(1.0, 2.0), rollouts_per_step=4)
        for name in data.draw(
            st.lists(st.sampled_from(sorted(contents(written))), min_size=1, max_size=2, unique=True)
        ):
            (written / name).write_bytes(data.draw(fuzz.mutated((written / name).read_bytes()), name))
        fuzz.check(report.main, [str(written), "--out", str(folder / "out.html")])


@pytest.mark.long
@settings(max_examples=200, **CHECKS)
@given(fuzz.arguments(["out", "export", "help"]), st.booleans())
def test_arguments_of_a_report(here: Path, argv: list[str], named: bool) -> None:
    with scratch() as folder:
        written = run_folders.write(folder / "run")
        fuzz.check(report.main, [*([str(written)] if named else []), *argv])


@pytest.mark.long
@settings(max_examples=300, **CHECKS)
@given(fuzz.arguments([*fuzz.OPTIONS, "config", "help"]), fuzz.values | st.none())
def test_arguments_of_an_evaluation(here: Path, argv: list[str], named: str | None) -> None:
    before = contents(Path("finished"))
    fuzz.check(evaluate.main, [str("finished" / LAST) if named is None else named, *argv])
    assert contents(Path("finished")) == before


@pytest.mark.long
@settings(max_examples=600, **CHECKS)
@given(fuzz.mutated(GRID.encode(), [*fuzz.TOML, *fuzz.NASTY]), fuzz.arguments(["scale", "dir", "cores", "config"], 2))
def test_grids(here: Path, data: bytes, argv: list[str]) -> None:
    with scratch() as folder:
        (folder / "grid.toml").write_bytes(data)
        before = set(here.iterdir())
        fuzz.check(
            experiment.main, ["--config", str(folder / "grid.toml"), *small(Path("new"))[:-2], *argv, "--dry-run"]
        )
        assert set(here.iterdir()) == before
