"""The benchmarks that need no Ray: what they print, and what they refuse."""

import json

import pytest
import tiny
import torch

from launch import benchmark
from launch.benchmarks import profile, update


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_head_times_what_is_installed_and_tells_rounding_from_none(capsys):
    sizes = ["--rows", "24", "--hidden", "16", "--vocab", "700", "--repeats", "2"]
    assert benchmark.main(["head", *sizes, "--backends", "torch", "trl", "trl/float32"]) == 0
    result = last_line(capsys)
    rows = {row["backend"]: row for row in result["measured"]}
    assert list(rows) == ["torch", "trl", "trl/float32"]
    assert result["failed"] == {}
    assert all(len(row["both_seconds"]) == 2 and min(row["both_seconds"]) > 0 for row in rows.values())
    assert rows["torch"]["logprob_max"] < 2e-5 < 1e-3 < rows["trl"]["logprob_max"]
    assert rows["trl/float32"]["logprob_max"] < 2e-5
    assert rows["torch"]["gradient_median"] < 3e-3


def test_learn_compares_methods_in_one_learner(capsys, tmp_path):
    folder = tiny.save_model(tmp_path / "model")
    options = ["--pairs", "1", "--prompt-tokens", "5", "--model.path", str(folder), "--actor.max_tokens", "6"]
    assert benchmark.main(["learn", *options]) == 0
    result = last_line(capsys)
    assert set(result["seconds"]) == set(update.CONTENDERS)
    assert result["completion_tokens"] == 4 * 4 * 6
    assert result["sa_ah_over_grpo"] == result["seconds"]["sa-ah-grpo"][0] / result["seconds"]["grpo"][0]


def test_profile_ranks_operations_by_their_own_time(capsys):
    a = torch.randn(400, 400)
    seconds = profile.operations(lambda: [a @ a for _ in range(20)] and a.sum(), "work", top=1)
    assert next(iter(seconds)) == "aten::mm" and seconds["aten::sum"] < seconds["aten::mm"]
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
    printed = capsys.readouterr().out
    assert "work" in printed and "aten::mm" in printed and "aten::sum" not in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a benchmark: train, learn, head, scaling, profile"),
        (["sleep"], "name a benchmark: train, learn, head, scaling, profile"),
        (["head", "--rows", "0"], "--rows 0 measures nothing"),
        (["learn", "--pairs", "0"], "--pairs 0: give 1 or more"),
        (["learn", "--method.alpha", "x"], "method.alpha='x'"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    assert benchmark.main(arguments) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert words in line
