"""A finished run of a tiny model, its copy that a stranger may have changed, and the commands that read it."""

import shutil
from pathlib import Path

import local_run
import pytest
from stranger import SECRET

from launch import evaluate, run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_run.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
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
