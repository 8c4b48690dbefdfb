"""--watch: the report of a running job on loopback, current when the job has written, ended cleanly by Ctrl-C."""

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
    """A server of one run's report, and the pages that it rendered."""
    rendered = []

    def render() -> str:
        rendered.append(report.write([folder], folder / "report.html").html)
        return rendered[-1]

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


def test_it_is_rendered_again_when_the_run_has_written(tmp_path):
    folder = run_folders.write(tmp_path / "run", rewards=[1.0] * 3, steps=4)
    with serving(folder) as (address, rendered):
        first = get(address + "/")
        assert "3 of 4" in first
        version = get(address + "/version")
        assert f'data-version="{version}"' in first
        assert get(address + "/") == first
        assert len(rendered) == 1  # nothing was written in between: not rendered again
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 4, "reward/mean": 9.0}) + "\n")
        newer = get(address + "/version")
        assert newer != version
        second = get(address + "/")
        assert "4 of 4" in second
        assert f'data-version="{newer}"' in second
        on_disk = (folder / "report.html").read_text(encoding="utf-8")
        assert "data-version" not in on_disk  # opened as a file it has no server to ask
        assert on_disk == second.replace(f' data-version="{newer}"', "")


def test_it_serves_nothing_else_and_no_foreign_name(tmp_path):
    folder = run_folders.write(tmp_path / "run")
    with serving(folder) as (address, rendered):
        for path, host, status in (("/config.toml", None, 404), ("/../", None, 404), ("/", "evil.example", 403)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(address + path, host)
            assert refused.value.code == status
        assert not rendered


def test_a_tunnel_may_have_another_port(tmp_path):
    folder = run_folders.write(tmp_path / "run")
    with serving(folder) as (address, _):
        for host in ("localhost:9", "127.0.0.1"):
            assert "1 run of 1 experiment" in get(address + "/", host)


def test_an_error_asks_again(tmp_path):
    folder = run_folders.write(tmp_path / "run")
    written = (folder / "config.toml").read_text()
    with serving(folder) as (address, _):
        version = get(address + "/version")
        (folder / "config.toml").unlink()
        assert get(address + "/version") != version  # an open page reloads
        with pytest.raises(urllib.error.HTTPError) as failed:
            get(address + "/")
        page = failed.value.read().decode()
        assert "is not a run folder" in page and 'http-equiv="refresh"' in page
        (folder / "config.toml").write_text(written)
        assert "1 run of 1 experiment" in get(address + "/")


def test_a_grids_new_runs_join(tmp_path):
    run_folders.write(tmp_path / "grid" / "one")
    with serving(tmp_path / "grid") as (address, _):
        assert "1 run of" in get(address + "/")
        run_folders.write(tmp_path / "grid" / "two", seed=2)
        assert "2 runs of" in get(address + "/")


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
        out, err = process.communicate(timeout=100)
    assert (process.returncode, out.strip(), err) == (0, "ended", "")
