"""Checkpoint folders are whole or not there; run files are rewound on resuming."""

import pytest

from common.metrics import JsonLines, read_lines
from launch.runtime.recorder import rewind
from learner import checkpoint


def test_crash_on_the_way_leaves_no_checkpoint(tmp_path):
    target = tmp_path / checkpoint.name(30)

    def write_half():
        with checkpoint.written_whole(target) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert not target.exists()
    assert checkpoint.latest(tmp_path) is None
    with checkpoint.written_whole(target) as folder:
        (folder / "whole").write_text("y")
    assert [p.name for p in target.iterdir()] == ["whole"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-000030"]


def test_latest_is_by_number(tmp_path):
    for name in ("step-000009", "step-000100", "step-000020.partial", "step-x"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path).name == "step-000100"


def test_rewind_forgets_later_steps_and_torn_lines(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        lines.write({"step": step, "text": "ü\n"})
    lines.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "te')
    rewind(tmp_path, 2)
    assert [record["step"] for record in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
