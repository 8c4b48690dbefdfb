"""Fixtures of the trackers' tests."""

import os
from pathlib import Path

import pytest
import tracked


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, in which the libraries keep what they keep of themselves."""
    monkeypatch.chdir(tmp_path)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # of the reader
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def stub(here: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that puts a library in W&B's place, which does what it is told; returns the file that it logs to."""

    def stub(**what: str) -> Path:
        tracked.install(here / "stub", **what)
        monkeypatch.setenv("PYTHONPATH", str(here / "stub"), prepend=os.pathsep)
        monkeypatch.setenv("STUB_LOG", str(here / "logged"))
        return here / "logged"

    return stub
