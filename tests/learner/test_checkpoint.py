"""Checkpoint folders are complete or absent and run no code; resuming rewinds the files of a run."""

import os

import pytest
import torch

from common.metrics import JsonLines, read_lines
from common.types import UserError
from launch.runtime.recorder import rewind
from learner import checkpoint


def test_a_crash_while_writing_leaves_no_checkpoint(tmp_path):
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


def test_the_state_comes_back(tmp_path):
    moments = {"0.exp_avg": torch.randn(2, 3), "0.step": torch.tensor(7.0), "12.exp_avg": torch.randn(4)}
    checkpoint.save_state(tmp_path, {"step": 7, "entropy_bonus": 0.1 + 0.2, "optimizer": moments})
    state = checkpoint.load_state(tmp_path)
    assert (state["step"], state["entropy_bonus"]) == (7, 0.1 + 0.2)
    assert state["optimizer"].keys() == moments.keys()
    assert all(torch.equal(state["optimizer"][name], tensor) for name, tensor in moments.items())
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


class Exploit:
    """Makes the folder `trace` when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_pickled_state_is_rejected_and_not_run(tmp_path):
    folder, trace = tmp_path / "step-000030", tmp_path / "ran"
    folder.mkdir()
    torch.save({"learner": Exploit(trace)}, folder / "learner_state.pt")
    with pytest.raises(UserError, match=r"^[^\n]*step-000030 holds learner_state\.pt[^\n]*start the run again[^\n]*$"):
        checkpoint.load_state(folder)
    assert not trace.exists()


def test_rewind_removes_later_steps_and_torn_lines(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        lines.write({"step": step, "text": "ü\n"})
    lines.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "te')
    rewind(tmp_path, 2)
    assert [record["step"] for record in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
