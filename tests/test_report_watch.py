"""--watch: the report of a running job on loopback, new when the job has written, ended cleanly by Ctrl-C."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import run_folders

from launch import report
from launch.reporting.watch import Server


@contextlib.contextmanager
def serving(folder: Path):
    """A server of one run's report, and the versions that it rendered."""
    rendered = []

    def render(version: str) -> str:
        rendered.append(version)
        return report.write([folder], folder / "report.html", version=version).html

    with Server([folder], render, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", rendered
        server.shutdown()
        thread.join()


def get(address: str, host: str | None = None) -> str:
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def test_it_is_made_anew_when_the_run_has_written(tmp_path):
    folder = run_folders.write(tmp_path / "run", rewards=[1.0] * 3, steps=4)
    with serving(folder) as (address, rendered):
        first = get(address + "/")
        assert "3 of 4" in first
        version = get(address + "/version")
        assert f'data-version="{version}"' in first
        assert get(address + "/") == first
        assert rendered == [version]  # nothing was written in between: nothing is made anew
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 4, "reward/mean": 9.0}) + "\n")
        newer = get(address + "/version")
        assert newer != version
        second = get(address + "/")
        assert "4 of 4" in second
        assert f'data-version="{newer}"' in second
        assert (folder / "report.html").read_text(encoding="utf-8") == second


def test_it_serves_nothing_else_and_no_foreign_name(tmp_path):
    folder = run_folders.write(tmp_path / "run")
    with serving(folder) as (address, rendered):
        for path, host, status in (("/config.toml", None, 404), ("/../", None, 404), ("/", "evil.example", 403)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(address + path, host)
            assert refused.value.code == status
        assert not rendered


def test_a_run_that_is_deleted_is_said(tmp_path):
    folder = run_folders.write(tmp_path / "run")
    with serving(folder) as (address, _):
        get(address + "/")
        (folder / "config.toml").unlink()
        with pytest.raises(urllib.error.HTTPError) as failed:
            get(address + "/")
        assert "is no run folder" in failed.value.read().decode()


def test_a_taken_port_is_one_line(tmp_path, capsys):
    folder = run_folders.write(tmp_path / "run")
    with serving(folder) as (address, _):
        port = address.rsplit(":", 1)[1]
        assert report.main([str(folder), "--watch", port]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--watch {port}" in line


def test_ctrl_c_ends_it_cleanly(tmp_path):
    folder = run_folders.write(tmp_path / "run")
    command = [sys.executable, "-u", report.__file__, str(folder), "--watch", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("wrote ")
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line
        assert "watching" in get(line.split()[2])
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out.strip(), err) == (0, "ended", "")
