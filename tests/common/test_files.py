"""Lines are whole or not there, whatever a disk does; links are not followed."""

import errno
import json
import math
import os

import pytest

from common import files
from common.files import Appended, NotWritten, check_own, write_whole
from common.metrics import JsonLines, MetricsWriter, keep_lines, read_lines
from common.types import UserError


@pytest.fixture
def disk(monkeypatch):
    """A function that sets how many bytes may still be written; beyond them the disk gives `error`."""
    write = os.write

    def disk(room: int, error: int = errno.ENOSPC) -> None:
        left = [room]

        def limited(file: int, data: bytes) -> int:
            if not left[0]:
                raise OSError(error, os.strerror(error))
            taken = write(file, bytes(data)[: left[0]])
            left[0] -= taken
            return taken

        monkeypatch.setattr(files.os, "write", limited)

    return disk


@pytest.mark.parametrize("room", [0, 1, 20, 30])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_line_is_whole_or_not_there(tmp_path, disk, room, error):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1})
    disk(room, error)
    with pytest.raises(
        NotWritten, match=rf"^{path} cannot be written \({os.strerror(error)}\); make room, then resume"
    ):
        lines.write({"step": 2, "text": "x" * 9}, {"step": 2})  # 38 and 12 bytes
    assert path.read_text() == '{"step": 1}\n'
    disk(10**6)
    lines.write({"step": 2})
    lines.close()
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    """As a signal may leave one."""
    write = os.write
    monkeypatch.setattr(files.os, "write", lambda file, data: write(file, bytes(data)[:3]))
    JsonLines(tmp_path / "x").write({"step": 1, "text": "ü\n"})
    assert read_lines(tmp_path / "x") == [{"step": 1, "text": "ü\n"}]


def test_a_disk_that_reports_only_when_it_is_flushed(tmp_path, monkeypatch):
    """As a network's file system may."""

    def flush(file: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", flush)
        with pytest.raises(NotWritten, match="Disk quota exceeded"):
            JsonLines(tmp_path / "x").write({"step": 1})
    assert read_lines(tmp_path / "x") == []
    assert (tmp_path / "x").read_bytes() == b""


def test_with_warn_a_failure_is_a_line(tmp_path, disk):
    problems = []
    lines = JsonLines(tmp_path / "rollouts.jsonl", problems.append)
    disk(5)
    lines.write({"step": 1})
    disk(10**6)
    lines.write({"step": 2})
    assert problems == [
        f"{tmp_path}/rollouts.jsonl cannot be written (No space left on device): a part of it is missing"
    ]
    assert read_lines(tmp_path / "rollouts.jsonl") == [{"step": 2}]


def test_a_text_that_is_no_unicode_is_written(tmp_path):
    JsonLines(tmp_path / "x").write({"step": 1, "text": "\ud800"})
    assert read_lines(tmp_path / "x") == [{"step": 1, "text": "?"}]


def test_a_rewritten_file_is_the_old_or_the_new_one(tmp_path, disk):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        JsonLines(path).write({"step": step})
    with path.open("a") as file:
        file.write('{"step": 4')  # cut off
    before = path.read_bytes()
    disk(15)
    with pytest.raises(NotWritten, match=r"metrics\.jsonl cannot be written"):
        keep_lines(path, lambda record: record["step"] < 3)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    disk(10**6)
    keep_lines(path, lambda record: record["step"] < 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("name", ["x", "x.partial"])
def test_links_are_not_followed(tmp_path, name):
    secret, link = tmp_path / "secret", tmp_path / name
    secret.write_text("secret")
    link.symlink_to(secret)
    write_whole(tmp_path / "x", "new")  # replaces the link itself
    assert (tmp_path / "x").read_text() == "new"
    (tmp_path / "y").symlink_to(secret)
    with pytest.raises(NotWritten, match="Too many levels of symbolic links"):
        Appended(tmp_path / "y").append(b"new")
    assert secret.read_text() == "secret"


def test_a_folder_of_ones_own(tmp_path):
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "latest").symlink_to("run")  # a tracker's own
    (tmp_path / "metrics.jsonl").touch()
    check_own(tmp_path)
    (tmp_path / "checkpoints" / "step-000001" / "x").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"^[^\n]*step-000001/x is a symbolic link or a special file[^\n]*$"):
        check_own(tmp_path)


def test_a_value_that_is_not_finite_is_null(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"a": float("nan"), "b": float("-inf"), "c": 0.5})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": None, "b": None, "c": 0.5}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_strict_reader_of_json_reads_any_record(tmp_path, value):
    """NaN and Infinity, which Python's json writes, are no JSON."""
    record = {"step": 1, "reward_mean": value, "sets": {"x": {"wilson95": [value, 1.0]}}, "tokens": (value, "NaN", 0)}
    JsonLines(tmp_path / "evaluations.jsonl").write(record, {"step": 2, "reward_mean": 1.5})
    first, second = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(first, parse_constant=pytest.fail) == {
        "step": 1,
        "reward_mean": None,
        "sets": {"x": {"wilson95": [None, 1.0]}},
        "tokens": [None, "NaN", 0],
    }
    assert second == '{"step": 2, "reward_mean": 1.5}'
