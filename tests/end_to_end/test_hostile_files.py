"""A run folder from a stranger: no code in it runs, nothing is written outside of it, and bad contents are one line."""

import hashlib
import json
import os
import pickle
import shutil
import tomllib
from pathlib import Path

import local_run
import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file

from common.files import user_module
from launch import evaluate, run
from launch.planning import plan

pytestmark = pytest.mark.slow
LAST = Path("checkpoints") / "step-000004"
SECRET = "the owner's\n"


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_run.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        local_run.install(patch)
        assert run.main(local_run.options(model, folder)) == 0
    return folder


@pytest.fixture
def stranger(finished: Path, tmp_path: Path) -> Path:
    """The folder of a run that the tests change."""
    return shutil.copytree(finished, tmp_path / "runs" / "x")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file of the owner, beside the run folder."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.jsonl").write_text(SECRET)
    return folder / "secret.jsonl"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path):
    """A function that resumes the run in a folder; returns status and stderr."""
    local_run.install(monkeypatch)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the terminal"))

    def start(folder: Path, *more: str) -> tuple[int, str]:
        capsys.readouterr()
        status = run.main(local_run.options(model, folder, "--run.resume", *more))
        return status, capsys.readouterr().err

    return start


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function that evaluates a checkpoint; returns status, stdout and stderr."""
    local_run.install(monkeypatch)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the terminal"))

    def evaluated(checkpoint: Path) -> tuple[int, str, str]:
        capsys.readouterr()
        return (evaluate.main([str(checkpoint)]), *capsys.readouterr())

    return evaluated


def seal(checkpoint: Path) -> None:
    """Write the checksums that belong to the files: a stranger can."""
    files = [path for path in checkpoint.iterdir() if path.name != "checksums.json"]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(folder: Path, **tables: dict) -> None:
    """Change options in a folder's config.toml."""
    config = tomllib.loads((folder / "config.toml").read_text())
    for section, table in tables.items():
        config[section] |= table
    (folder / "config.toml").write_text(tomli_w.dumps(config))


LINKS = [
    *("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl", "timeline.jsonl", "config.toml"),
    *("metrics.jsonl.partial", "config.toml.partial", "checkpoints", "tensorboard", "tensorboard/events.out.x"),
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


def state(**changed: object):
    """A change of run_state.json."""

    def change(checkpoint: Path, trace: Path) -> None:
        path = checkpoint / "run_state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def text(name: str, content: str):
    return lambda checkpoint, trace: (checkpoint / name).write_text(content)


def tensors(name: str, change):
    def changed(checkpoint: Path, trace: Path) -> None:
        save_file(change(load_file(checkpoint / name)), checkpoint / name)

    return changed


def pickled(name: str):
    return lambda checkpoint, trace: (checkpoint / name).write_bytes(pickle.dumps(Exploit(trace)))


def without_first(found: dict) -> dict:
    return dict(list(found.items())[1:])


def of_other_shape(found: dict) -> dict:
    return found | {name: torch.zeros(3, 3) for name in list(found)[:1]}


CONTENTS = {
    "a step that is a text": state(step="4"),
    "a negative step": state(step=-4),
    "a step of another checkpoint": state(step=2),
    "a step that is not finite": state(step=float("nan")),
    "a step that is true": state(step=True),
    "a huge step": text("run_state.json", '{"step": 1e999, "prompt_cursor": 8}'),
    "a step of many digits": text("run_state.json", f'{{"step": {"4" * 5000}, "prompt_cursor": 8}}'),
    "a cursor that is a list": state(prompt_cursor=[8]),
    "a negative cursor": state(prompt_cursor=-1),
    "a position of no object": text("run_state.json", "[4, 8]"),
    "a position nested deeply": text("run_state.json", "[" * 100_000),
    "a position of many bytes": text("run_state.json", " " * 2**21),
    "a learner's step that is a text": text("learner_state.json", '{"step": "4", "entropy_bonus": 0.0}'),
    "an entropy bonus that is not finite": text("learner_state.json", '{"step": 4, "entropy_bonus": Infinity}'),
    "a pickled adapter": pickled("adapter_model.safetensors"),
    "a pickled adapter of PEFT's other name": pickled("adapter_model.bin"),
    "a pickled optimizer": pickled("learner_state.safetensors"),
    "a pickle beside all": pickled("learner_state.pt"),
    "a header of 2^60 bytes": lambda checkpoint, trace: (checkpoint / "adapter_model.safetensors").write_bytes(
        (2**60).to_bytes(8, "little") + b"{}"
    ),
    "an adapter without a module": tensors("adapter_model.safetensors", without_first),
    "an adapter of another shape": tensors("adapter_model.safetensors", of_other_shape),
    "an adapter with more": tensors("adapter_model.safetensors", lambda found: found | {"more": torch.zeros(1)}),
    "moments of another shape": tensors("learner_state.safetensors", of_other_shape),
    "moments of no parameter": tensors("learner_state.safetensors", lambda found: {"999.exp_avg": torch.zeros(1)}),
    "moments of another name": tensors("learner_state.safetensors", lambda found: {"__class__": torch.zeros(1)}),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_contents_that_no_run_writes_are_one_line(stranger, outside, start, evaluated, what):
    """With the checksums that belong to them."""
    trace = outside.parent / "ran"
    CONTENTS[what](stranger / LAST, trace)
    seal(stranger / LAST)
    shutil.rmtree(stranger / "checkpoints" / "step-000002")
    status, err = start(stranger)
    assert (status, err.count("\n")) == (2, 1), err
    assert "Traceback" not in err and "checkpoint" in err
    assert contents(outside.parent) == {"secret.jsonl": SECRET.encode()}
    assert not trace.exists()


@pytest.mark.parametrize("what", [what for what in CONTENTS if "position" not in what and "step" not in what][:9])
def test_evaluating_a_strangers_checkpoint_writes_nothing(stranger, outside, evaluated, what):
    trace = outside.parent / "ran"
    CONTENTS[what](stranger / LAST, trace)
    seal(stranger / LAST)
    before = contents(stranger)
    status, _, err = evaluated(stranger / LAST)
    if "cursor" not in what:  # of the prompts: an evaluation does not read it
        assert (status, err.count("\n")) == (2, 1), err
        assert "checkpoint" in err
    assert contents(stranger) == before
    assert not trace.exists()


def test_an_evaluation_writes_nothing_wherever_its_run_was(stranger, outside, evaluated):
    rewrite(stranger, run={"dir": str(outside.parent), "resume": True})
    before = contents(stranger.parent.parent)
    status, out, err = evaluated(stranger / LAST)
    assert (status, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["step"] == 4
    assert contents(stranger.parent.parent) == before


HOSTILE_ADAPTER = {
    "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
    "base_model_name_or_path": "../../evil",
    "custom_module": "evil",
    "peft_type": "EVIL",
    "r": 10**30,
    "target_modules": {"x": [[[[]]]]},
}


@pytest.mark.parametrize(
    "content", [json.dumps(HOSTILE_ADAPTER), "[" * 100_000, '{"r": "many", "lora_alpha": NaN}', ""]
)
def test_pefts_own_configuration_is_not_read(stranger, start, content):
    """The run's config.toml has what the adapter is."""
    (stranger / LAST / "adapter_config.json").write_text(content)
    seal(stranger / LAST)
    assert start(stranger) == (0, "")


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
