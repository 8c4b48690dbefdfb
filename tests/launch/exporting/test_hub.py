"""--push against a stand-in of the hub: every file arrives, errors are one line, the token is nowhere."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import hub_server
import local_run
import pytest
import trained_run
from huggingface_hub import ModelCard, constants

from launch import export

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pushed")
    return trained_run.write(folder / "run", local_run.save_model(folder / "tiny"))


@pytest.fixture
def hub(monkeypatch):
    with hub_server.serve() as served:
        hub_server.connect(monkeypatch, served.address)
        yield served


def pushed(run: Path, out: Path, name: str = "ada/tiny-rl") -> int:
    return export.main([str(trained_run.saved(run)), "--out", str(out), "--push", name])


def test_every_file_arrives_as_it_is(run, tmp_path, hub, capfd):
    assert pushed(run, tmp_path / "out", "tiny-rl") == 0
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files == {"ada/tiny-rl": local}
    assert set(hub.objects.values()) == {local["adapter_model.safetensors"]}
    assert hub.commits == ["Step 4 of a Horizon run"]
    made = hub.repositories["ada/tiny-rl"]
    assert "private" not in made and "visibility" not in made  # the owner's default
    output = capfd.readouterr()
    assert output.out.splitlines()[-1] == f"pushed to {hub.address}/ada/tiny-rl (public)"
    assert hub_server.TOKEN not in output.out + output.err
    assert all(hub_server.TOKEN.encode() not in content for content in local.values())
    card = ModelCard(local["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 0.5


def test_the_visibility_is_what_the_hub_says(run, tmp_path, hub, capsys):
    """An organisation may make new repositories private; an existing one keeps its own."""
    hub.private.add("lab/tiny-rl")
    assert pushed(run, tmp_path / "out", "lab/tiny-rl") == 0
    assert hub.repositories["lab/tiny-rl"]["organization"] == "lab"
    assert capsys.readouterr().out.splitlines()[-1] == f"pushed to {hub.address}/lab/tiny-rl (private)"


def one_line(capfd) -> str:
    err = capfd.readouterr().err
    assert err.count("\n") == 1, err
    assert hub_server.TOKEN not in err
    return err


@pytest.mark.parametrize("name", ["a/b/c", "ada/with space", "ada/x--y", "-", "ada/" + "x" * 100])
def test_a_name_that_the_hub_does_not_take_is_refused_before_anything_is_written(run, tmp_path, hub, capfd, name):
    assert pushed(run, tmp_path / "out", name) == 2
    assert one_line(capfd).endswith("log in with `hf auth login` or set HF_TOKEN, and name OWNER/NAME\n")
    assert list(tmp_path.iterdir()) == []
    assert hub.repositories == {}


def test_an_unknown_token_is_refused_before_anything_is_written(run, tmp_path, hub, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert pushed(run, tmp_path / "out") == 2
    err = one_line(capfd)
    assert "Invalid user token" in err and "hf_another" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_token_is_not_in_the_error(run, tmp_path, hub, monkeypatch, capfd):
    """The transport's message quotes the header."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\x0bpart")
    assert pushed(run, tmp_path / "out") == 2
    err = one_line(capfd)
    assert "Illegal header" in err and "secret" not in err and "part" not in err


def test_no_token_is_one_line(run, tmp_path, hub, monkeypatch, capfd):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert pushed(run, tmp_path / "out") == 2
    assert "Token is required" in one_line(capfd)


def test_a_hub_that_is_not_there_is_one_line(run, tmp_path, hub, monkeypatch, capfd):
    hub_server.connect(monkeypatch, "http://127.0.0.1:1")
    assert pushed(run, tmp_path / "out") == 2
    assert "Connection refused" in one_line(capfd)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pushed(run, tmp_path / "out") == 2
    assert "offline mode is enabled" in one_line(capfd)


@pytest.mark.parametrize(
    "path",
    ["/api/repos/create", "/api/models/ada/tiny-rl/preupload/main", "/api/models/ada/tiny-rl/commit/main"],
)
def test_a_refusal_after_the_export_leaves_the_folder_complete(run, tmp_path, hub, capfd, path):
    hub.refuse[path] = 403
    out = tmp_path / "out"
    assert pushed(run, out) == 2
    err = one_line(capfd)
    assert err.startswith("--push ada/tiny-rl: ") and "403" in err and "the stand-in refuses" in err
    assert err.endswith(f"{out} is complete; upload it later: hf upload ada/tiny-rl {out}\n")
    assert (out / "README.md").is_file() and (out / "adapter_model.safetensors").is_file()


def test_a_failed_upload_of_a_file_says_why(run, tmp_path, hub, capfd):
    digest = hashlib.sha256((trained_run.saved(run) / "adapter_model.safetensors").read_bytes()).hexdigest()
    hub.refuse[f"/lfs/{digest}"] = 403
    assert pushed(run, tmp_path / "out") == 2
    assert "403" in one_line(capfd)


@pytest.mark.slow
def test_the_command_takes_the_hub_from_its_environment(run, tmp_path):
    """HF_ENDPOINT and HF_TOKEN, in a process of its own."""
    with hub_server.serve() as served:
        environment = os.environ | {
            "HF_ENDPOINT": served.address,
            "HF_TOKEN": hub_server.TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "launch/export.py", str(trained_run.saved(run)), "--out", str(tmp_path / "out")]
        done = subprocess.run(
            [*command, "--push", "tiny-rl"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"wrote {tmp_path / 'out'}", f"pushed to {served.address}/ada/tiny-rl (public)"]
    assert set(served.files["ada/tiny-rl"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert hub_server.TOKEN not in done.stdout + done.stderr
