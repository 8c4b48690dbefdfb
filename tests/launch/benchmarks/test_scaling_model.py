"""The cost model of scaling: hand numbers, known machines recovered from their steps, and what is printed of them."""

import io
import json
from collections.abc import Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from common.config import Config
from launch import benchmark
from launch.benchmarks import scaling, scaling_model, scaling_results
from launch.benchmarks.scaling_measured import Measured, Part, Point, Publish, Rank, Step, Sum
from launch.benchmarks.scaling_model import Work

PARAMETERS, COLUMNS = 1000, (1, 2)  # of the adapter; of the two exchanges
LENGTHS = (60, 10, 20, 30, 40)  # a prompt, and its four completions: 100 sampled tokens, the longest 40
NOTHING = 1e-9
PERFECT: dict[str, Sequence[float]] = {  # all work is shared out, and nothing else takes time
    "sample": (0.0, 0.01),
    "learn": (0.0, 0.02),
    "targets": (NOTHING, 0.0),
    "sums": (NOTHING, 0.0),
    "publish": (NOTHING, 0.0),
    "load": (NOTHING, 0.0),
    "driver": (NOTHING, 0.0, 0.0),
}
REAL = PERFECT | {
    "sample": (0.02, 0.01),
    "learn": (0.3, 0.02),
    "targets": (0.01, 0.0004),
    "sums": (0.001, 2e-6),
    "publish": (0.05, 0.004),
    "load": (0.06, 0.03),
    "driver": (0.01, 0.0001, 0.002),
}


class Machine:
    """Stands in for a machine: the steps that these coefficients make, with log-normal noise."""

    def __init__(self, truth: dict[str, Sequence[float]], noise: float = 0.0, seed: int = 0) -> None:
        self.truth, self.noise, self.generator = truth, noise, np.random.default_rng(seed)

    def seconds(self, name: str, *columns: float) -> float:
        return float(np.dot(self.truth[name], columns) * np.exp(self.noise * self.generator.standard_normal()))

    def sum(self, ranks: int, what: str, num_bytes: int) -> Sum:
        messages, sent = 2 * (ranks - 1), 2 * (ranks - 1) / ranks * num_bytes
        return Sum(what=what, bytes=num_bytes, wait_seconds=0.0, seconds=self.seconds("sums", messages, sent))

    def publish(self, actors: int, sharing: int = 1) -> Publish:
        load = self.seconds("load", 1, sharing - 1)
        seconds = load + self.seconds("publish", 1, actors)
        return Publish(actors=actors, seconds=seconds, load_seconds=load, sharing=sharing)

    def rank(self, point: Point) -> Rank:
        packed, tokens = 160 * point.prompts // point.ranks, 100 * point.prompts
        own, targets = self.seconds("learn", 1, packed), self.seconds("targets", 1, tokens)
        sums = [self.sum(point.ranks, "exchange", 4 * columns * tokens) for columns in COLUMNS]
        sums = [*sums, self.sum(point.ranks, "reduce", 4 * PARAMETERS)] if point.ranks > 1 else []
        seconds = own + targets + sum(each.seconds for each in sums)
        return Rank(seconds=seconds, own_seconds=own, packed_tokens=packed, sums=tuple(sums))

    def step(self, ranks: int, actors: int, prompts: int) -> Step:
        point = Point(ranks=ranks, actors=actors, prompts=prompts)
        tokens = 100 * prompts // actors
        parts = [Part(seconds=self.seconds("sample", 40, tokens), tokens=tokens, longest=40) for _ in range(actors)]
        updates, publish = [self.rank(point) for _ in range(ranks)], self.publish(actors)
        driver = self.seconds("driver", 1, 100 * prompts, ranks + actors)
        slowest = max(part.seconds for part in parts) + max(rank.seconds for rank in updates)
        return Step(
            point=point,
            seconds=slowest + publish.seconds + driver,
            publish=publish,
            parts=tuple(parts),
            ranks=tuple(updates),
            groups=(LENGTHS,) * prompts,
            group_bytes=5000 * prompts,
        )

    def measured(self, rounds: int = 3) -> Measured:
        sizes = [(1, 4), (1, 8), (2, 4), (2, 8)]
        return Measured(
            steps=[self.step(number, number, prompts) for _ in range(rounds) for number, prompts in sizes],
            sums=[(2, self.sum(2, "alone", num_bytes)) for num_bytes in (64, 4096, 262144) for _ in range(rounds)],
            publishes=[self.publish(n, -(-n // 2)) for _ in range(rounds) for n in (1, 2, 3, 4)],
            adapter_bytes=2 * PARAMETERS,
        )


def plan(**values: Any) -> Any:
    return SimpleNamespace(config=Config(**values), num_adapter_parameters=PARAMETERS)


def summary(machine: Machine) -> dict[str, Any]:
    return json.loads(json.dumps(scaling_results.summary(plan(), machine.measured())))


def test_least_squares_with_coefficients_of_at_least_0() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert scaling_model.non_negative(rows, np.array([1.0, 2.0, 3.0])) == pytest.approx([1, 2])
    assert scaling_model.non_negative(rows, np.array([1.0, -1.0, 0.0])) == pytest.approx([0.5, 0])
    assert scaling_model.non_negative(rows, np.array([-1.0, -1.0, -1.0])) == pytest.approx([0, 0])


def test_relative_errors_weigh_all_points_alike() -> None:
    """Ratios 1 and 2: their mean. Plain least squares would give 1.8, errors relative to what was measured 1.2."""
    assert scaling_model.relative(np.array([[1.0], [2.0]]), np.array([1.0, 4.0])) == pytest.approx([1.5])


def test_the_bytes_of_a_ring() -> None:
    assert scaling_model.ring_factors(4, 100.0) == (6, 150.0)
    assert scaling_model.ring_factors(2, 100.0) == (2, 100.0)
    assert scaling_model.ring_factors(1, 100.0) == (0, 0.0)


def test_prompts_are_dealt_out_as_the_fleet_does() -> None:
    longest, sampled, packed = scaling_model.deal([LENGTHS], 5, 3, np.random.default_rng(0))
    assert (longest[0].tolist(), sampled[0].tolist(), packed[0].tolist()) == (
        [40] * 3,
        [200, 200, 100],
        [320, 320, 160],
    )
    assert scaling_model.deal([LENGTHS], 4, 8, np.random.default_rng(0))[1].shape == (100, 4)


def test_the_straggler_is_the_expected_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of completions of 10 or 30 tokens, the longest of two has 25 on average, of four 28.75; so with jitter."""
    monkeypatch.setattr(scaling_model, "SIMULATED_STEPS", 40_000)
    for number, expected in ((1, 20.0), (2, 25.0), (4, 28.75)):
        longest, *_ = scaling_model.deal([(5, 10), (5, 30)], number, number, np.random.default_rng(0))
        [seconds] = scaling_model.expected_maximum(np.array([[2.0]]), (longest,), np.ones(1))
        assert seconds == pytest.approx(2 * expected, rel=0.01)
        [seconds] = scaling_model.expected_maximum(
            np.array([[1.0]]), (np.full_like(longest, 20),), np.array([0.5, 1.5])
        )
        assert seconds == pytest.approx(expected, rel=0.01)


def test_jitter_is_what_the_shares_of_a_step_do_not_have_in_common() -> None:
    assert scaling_model.jitter([[1.0, 3.0], [7.0]]) == pytest.approx([1 - 0.5 * 2**0.5, 1 + 0.5 * 2**0.5])
    assert scaling_model.jitter([[7.0]]) == pytest.approx([1])
    generator = np.random.default_rng(0)
    drawn = scaling_model.jitter(np.exp(generator.normal()) * (1 + 0.1 * generator.normal(size=2)) for _ in range(4000))
    assert drawn.std() == pytest.approx(0.1, rel=0.05)


def test_a_known_machine_is_recovered_and_extrapolated() -> None:
    model = scaling_model.fitted(Machine(REAL).measured(), scaling_results.work_of(Machine(REAL).measured(), plan()))
    for name, each in model.fits().items():
        assert each.coefficients == pytest.approx(REAL[name], rel=1e-4), name
        assert each.draws == pytest.approx(np.tile(REAL[name], (scaling_model.DRAWS, 1)), rel=1e-4), name
    phases = {name: each[0] for name, each in model.phases(Point(ranks=64, actors=32, prompts=256)).items()}
    sent = 2 * 63 / 64 * (4 * PARAMETERS + 4 * (1 + 2) * 25_600)
    assert phases == pytest.approx(
        {
            "sample": 0.02 * 40 + 0.01 * 800,  # 8 prompts for each actor
            "learn": 0.3 + 0.02 * 4 * 160,
            "targets": 0.01 + 0.0004 * 25_600,
            "sums": 0.001 * 3 * 2 * 63 + 2e-6 * sent,
            "publish": 0.05 + 0.004 * 32 + 0.06,  # nobody shares a processor
            "driver": 0.01 + 0.0001 * 25_600 + 0.002 * 96,
        },
        rel=1e-3,
    )


def test_intervals_cover_the_truth_and_narrow_with_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_model, "DRAWS", 100)
    rows = np.array([[40.0, 400.0], [40.0, 800.0], [40.0, 200.0], [40.0, 400.0]])  # 1 or 2 actors, 4 or 8 prompts
    truth, at, generator = np.array([0.02, 0.01]), np.array([40.0, 100.0]), np.random.default_rng(0)
    widths = {}
    for noise in (0.01, 0.1):
        covered, width = 0, []
        for _ in range(60):
            seconds = rows @ truth * np.exp(noise * generator.standard_normal(4))
            low, high = scaling_model.interval(scaling_model.fit(rows, seconds, generator).all @ at)
            covered += low <= truth @ at <= high
            width.append(high - low)

        assert covered >= 51, covered  # of 60: 95 % less three standard deviations
        widths[noise] = float(np.median(width))
    assert 4 < widths[0.1] / widths[0.01] < 20


def test_a_perfect_scaler_has_efficiency_1_everywhere() -> None:
    rows = summary(Machine(PERFECT))["rows"]
    assert [(row["devices"], row["prompts"]) for row in rows] == [
        *((1, 4), (1, 8), (2, 4), (2, 8), (8, 32), (8, 512), (64, 256), (64, 512), (512, 2048), (512, 512))
    ]
    assert [row["modelled"]["efficiency"] for row in rows] == pytest.approx([1] * 10, abs=1e-3)
    assert [row["measured"]["efficiency"] for row in rows[:4] if row["work"] != "fit only"] == pytest.approx([1] * 3)


def test_what_is_not_shared_out_costs_efficiency() -> None:
    rows = {(row["devices"], row["work"]): row for row in summary(Machine(REAL))["rows"]}
    one, two = (Machine(REAL).step(n, n, 4 * n) for n in (1, 2))
    expected = two.tokens / two.seconds / 2 / (one.tokens / one.seconds)
    assert rows[2, "growing"]["measured"]["efficiency"] == pytest.approx(expected)
    assert rows[2, "growing"]["modelled"]["efficiency"] == pytest.approx(expected, rel=1e-3)
    assert rows[2, "fixed"]["measured"]["efficiency"] < expected < 1
    assert 1 > rows[8, "growing"]["modelled"]["efficiency"] > rows[512, "growing"]["modelled"]["efficiency"]


def test_a_summary_counts_bytes_and_judges_the_goals() -> None:
    found = summary(Machine(REAL))
    row = found["rows"][3]
    assert row["measured"]["bytes"] == {"reduce": 4000, "exchange": 4 * 3 * 800, "groups": 40_000}
    assert row["modelled"]["bytes"] == {"reduce": 4000, "exchange": 9600, "sent_by_a_rank": 13_600}
    assert found["rows"][0]["modelled"]["bytes"] == {"reduce": 0, "exchange": 0, "sent_by_a_rank": 0}
    lines = scaling_results.findings(found)
    fraction = 100 * (0.001 * 2 * 3 + 2e-6 * (4000 + 4800)) / Machine(REAL).step(2, 2, 4).seconds
    assert lines[0].startswith(f"reduce and exchange, 2 ranks, 4 prompts: {fraction:.2f} % of a step (goal 2 %: met)")
    assert pytest.approx(1.368, abs=1e-3) == (0.05 + 4 * 0.004 + 0.09) / (0.05 + 0.004 + 0.06)
    assert lines[2] == "publishing to 4 actors: 1.37 times publishing to one (goal 1.5: met)"
    slow = summary(Machine(REAL | {"sums": (0.5, 0.0), "publish": (0.05, 0.1)}))
    assert [line.split("goal")[1].split(":")[1][1:7] for line in scaling_results.findings(slow)[:3]] == ["missed"] * 3


@contextmanager
def _contender(plan: Any, processors: Sequence[int]) -> Any:
    """Stands in for a contender's process."""
    ranks, actors = plan.config.learner.num_ranks, plan.config.actor.num_actors
    machine = Machine(REAL, noise=0.03, seed=ranks)
    calls = {
        "step": lambda prompts: machine.step(ranks, actors, prompts),
        "sums": lambda: [machine.sum(ranks, "alone", n) for n in (64, 4096, 262144)] if ranks > 1 else [],
        "publishes": lambda rounds: [
            machine.publish(n, -(-n // 2)) for _ in range(rounds) for n in range(1, 1 + actors)
        ],
        "copies": lambda: (1, 2 * PARAMETERS),
    }
    yield lambda method, *arguments: calls[method](*arguments)


def test_the_command_keeps_measured_and_modelled_columns_apart(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(scaling.scaling_contender, "started", _contender)
    assert benchmark.main(["scaling", "--steps", "2", "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result == json.loads((tmp_path / "scaling.json").read_text())
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    left, right = scaling_results.chart(result["rows"]).axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "2", "8", "64", "512"]
    assert [[*line.get_xdata()] for line in right.lines] == [[1, 2], [1, 2, 8, 64, 512], [1, 2], [8, 64, 512]]
    first, *_ = scaling_results.tables(result)
    console = Console(width=170, record=True, file=io.StringIO())
    console.print(first)
    heads = [column.header for column in first.columns][5:]
    assert [head.split("\n")[0] for head in heads] == ["measured"] * 4 + ["modelled"] * 5
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line
    ]
    assert [row[0] for row in cells] == ["1", "1", "2", "2", "8", "8", "64", "64", "512", "512"]
    assert all(row[5:9] == ["-"] * 4 for row in cells[4:]) and all("-" not in row[9:10] for row in cells)
    low, high = result["rows"][-1]["modelled"]["efficiency_interval"]
    assert low < result["rows"][-1]["modelled"]["efficiency"] < high


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--devices", "2"], "--devices 2 shows no scaling"),
        (["--devices", "0", "1"], "--devices 0 measures nothing"),
        (["--actors", "1"], "--actors has 1 numbers and --devices 2"),
        (["--publish-actors", "2"], "--publish-actors 2 does not determine the model"),
        (["--steps", "0"], "--steps 0 measures nothing"),
        (["--run.max_staleness", "1"], "run.max_staleness=1 hides sampling"),
        (["--actor.part_prompts", "1"], "actor.part_prompts=1: an actor has one part here"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["scaling", *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_work_is_counted_from_what_the_ranks_sum() -> None:
    work = scaling_results.work_of(Machine(REAL).measured(1), plan())
    assert work == Work(groups=(LENGTHS,) * 24, gradient_bytes=4000, exchange_token_bytes=(4, 8))
