"""The throughput benchmark: what it makes of measured steps by hand, and one real run of it."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from common.config import Config
from launch import benchmark
from launch.benchmarks import step_results
from launch.benchmarks.roofline import Rates

OURS = {"rollout": 4.0, "learn": 5.0, "publish": 1.0, "rollout_roofline": 1.0, "learn_roofline": 2.0}


def row(step: float, **others: float) -> dict[str, float]:
    return {"step": step, "tokens": 1000.0, "learner_peak_bytes": 2e9} | others


MEASURED = {
    "sa-ah-grpo": [row(10.0, **OURS), row(12.0, **OURS), row(11.0, **OURS)],
    "grpo": [row(10.0, **OURS), row(10.0, **OURS), row(10.0, **OURS)],
    "trl": [row(40.0, rollout=20.0, learn=20.0), row(36.0, rollout=1, learn=1), row(55.0, rollout=30.0, learn=25.0)],
}


def test_ratios_are_of_rounds_and_their_median_counts():
    rates = Rates(operations_per_second=1e9, bytes_per_second=1e9)
    planned = SimpleNamespace(config=Config(), memory=None)
    result = step_results.summary(planned, "a model", rates, MEASURED, {})
    assert result["sa_ah_over_grpo_by_round"] == pytest.approx([1.0, 1.2, 1.1])
    assert result["sa_ah_over_grpo"] == pytest.approx(1.1)
    assert result["speedup_over_trl_by_round"] == pytest.approx([4.0, 3.0, 5.0])
    assert result["speedup_over_trl"] == pytest.approx(4.0)
    assert result["cost_exponent"] is None
    alone = step_results.summary(planned, "a model", rates, {k: v for k, v in MEASURED.items() if k != "trl"}, {})
    assert alone["speedup_over_trl"] is None


@pytest.mark.parametrize("power", [1.0, 0.8, 1.5])
def test_exponent(power):
    batches = {n: row(3.0 * n**power) | {"tokens": 100.0 * n} for n in (1, 2, 4, 8)}
    assert step_results.exponent(batches) == pytest.approx(power)


def test_table_and_chart_show_every_contender_and_its_rooflines():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(step_results.table(MEASURED))
    lines = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "│" in line]
    cells = {cell[0].strip(): [c.strip() for c in cell[1:]] for cell in lines}
    assert cells["sa-ah-grpo"] == ["4.00", "25", "5.00", "40", "1.00", "11.00", "10.00-12.00", "91", "2.0"]
    assert cells["trl"] == ["20.00", "-", "20.00", "-", "-", "40.00", "36.00-55.00", "25", "2.0"]
    figure = step_results.chart(MEASURED)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([4, 5, 1, 4, 5, 1, 20, 20])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(MEASURED)
    rooflines = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert rooflines == pytest.approx([1, 4 + 2, 1, 4 + 2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpus_plan_is_not_measured_on_a_cpu(capsys):
    assert benchmark.main(["train", "--steps", "1", "--peer", "trl", "--run.gpu_memory_gib", "40"]) == 2
    line = capsys.readouterr().err
    assert (line.count("\n"), "run.gpu_memory_gib=40.0 plans for a GPU" in line) == (1, True)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_real_interleaved_steps(tmp_path, capsys):
    options = ["--methods", "reft", "--actor.max_tokens", "8", "--run.prompts_per_step", "1", "--task.num_train", "8"]
    assert benchmark.main(["train", "--steps", "1", "--batches", "2", "--out", str(tmp_path), *options]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result == json.loads((tmp_path / "benchmark.json").read_text())
    assert (tmp_path / "benchmark.svg").stat().st_size > 1000
    assert list(result["measured"]) == ["sa-ah-grpo", "alpha 0", "grpo", "reft"]
    for [each] in result["measured"].values():
        assert each["tokens"] == 4 * 8
        phases = each["rollout"] + each["learn"] + each["publish"]
        assert phases == pytest.approx(each["step"], abs=0.05)
        assert 0 < each["rollout_roofline"] < each["rollout"] and 0 < each["learn_roofline"] < each["learn"]
        assert each["load"] < each["publish"]
    assert result["batches"]["2"]["tokens"] == 2 * 4 * 8
    assert set(result["batches"]) == {"1", "2"}
    assert np.isfinite(result["cost_exponent"])
    assert result["sa_ah_over_grpo"] > 0 and result["speedup_over_trl"] is None
