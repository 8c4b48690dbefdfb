"""What a contender of the scaling benchmark measures: sums apart from waiting, bytes by formula, fair shares."""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import rank_processes
import tiny
import torch

from common.config import Config, with_values
from launch import benchmark
from launch.benchmarks import scaling, scaling_contender
from launch.benchmarks.scaling_contender import Contender, TimedLearner, TimedRanks
from launch.benchmarks.scaling_measured import Part, Rank, Sum
from launch.benchmarks.scaling_model import ring_factors
from learner.learner import Learner
from learner.ranks import Ranks

LOOPBACK = Path("/proc/net/dev")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with rank_processes.processes(3) as made:
        yield made


def timed(ranks: Ranks) -> TimedRanks:
    made = TimedRanks(ranks.rank, ranks.world)
    made._group = ranks._group
    return made


def update(ranks: Ranks, folder: Path) -> tuple[Rank, str, str, int]:
    """The times of an update, the adapter's checksum after it and after that of a plain learner, its parameters."""
    config = tiny.config(micro_batch_tokens=40)
    made, plain = (
        TimedLearner(folder, config, tiny.CANARY, ranks=ranks),
        Learner(folder, config, tiny.CANARY, ranks=ranks),
    )
    made.timed._group = ranks._group
    for each in (made, plain):
        each.update(tiny.groups())
        each.update(tiny.groups())
    num_parameters = sum(parameter.numel() for parameter in made.policy.parameters())
    return made.times(), made.checksum(), plain.checksum(), num_parameters


@pytest.mark.slow
def test_the_counted_bytes_are_those_of_the_formula(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path)
    [(alone, *_)] = rank_processes.on_ranks(pool, 1, update, folder)
    assert alone.sums == () and alone.packed_tokens > 0
    found = rank_processes.on_ranks(pool, 2, update, folder)
    num_tokens = sum(rollout.num_completion_tokens for group in tiny.groups() for rollout in group.rollouts)
    for times, checksum, plain_checksum, num_parameters in found:
        assert checksum == plain_checksum == found[0][1]  # timing changes nothing
        *exchanges, reduce = times.sums
        assert (reduce.what, reduce.bytes) == ("reduce", 4 * num_parameters)
        assert [(each.what, each.bytes % (4 * num_tokens)) for each in exchanges] == [("exchange", 0)] * 2
        assert [each.bytes // (4 * num_tokens) for each in exchanges] == [2, 3]  # log-probability, entropies
        assert times.own_seconds > 0 and times.targets_seconds > 0
        assert times.own_seconds + times.targets_seconds + times.sum_seconds + times.wait_seconds == pytest.approx(
            times.seconds
        )
    assert sum(times.packed_tokens for times, *_ in found) == alone.packed_tokens


def late(ranks: Ranks) -> Sum:
    """A sum to which rank 1 comes a second late."""
    made = timed(ranks)
    made.timed_sum(4)
    time.sleep(ranks.rank)
    made.timed_sum(1 << 20)
    return made.sums[-1]


@pytest.mark.slow
def test_waiting_for_the_slowest_rank_is_not_part_of_the_sum(pool: ProcessPoolExecutor) -> None:
    first, second = rank_processes.on_ranks(pool, 2, late)
    assert first.wait_seconds > 0.8 > 0.5 > first.seconds
    assert second.wait_seconds < 0.5 > second.seconds


def sent(ranks: Ranks, num_bytes: int) -> int:
    """Bytes on the loopback during a sum."""
    made = timed(ranks)
    made.timed_sum(4)
    before = loopback_bytes()
    made.timed_sum(num_bytes)
    made.timed_sum(4)
    return loopback_bytes() - before


def loopback_bytes() -> int:
    [line] = [line for line in LOOPBACK.read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not LOOPBACK.exists(), reason="the system does not count the bytes of its loopback")
@pytest.mark.parametrize("world", [2, 3])
def test_a_sum_sends_the_bytes_of_a_ring(pool: ProcessPoolExecutor, world: int) -> None:
    """Of several tries the one with the least other traffic; headers and acknowledgements add a little."""
    num_bytes = 32 << 20
    least = min(max(rank_processes.on_ranks(pool, world, sent, num_bytes)) for _ in range(4))
    assert 1 <= least / (world * ring_factors(world, num_bytes)[1]) < 1.15


def test_publishes_spread_over_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four actors on two processors: 0 and 1 share the first, 2 and 3 the second."""
    given: list[list[int]] = []

    class Channel:
        def __init__(self, fleet: SimpleNamespace, *, canary_bound_nats: float) -> None:
            given.append(fleet.actors)

        def publish(self, learner: object, *, canary: bool) -> SimpleNamespace:
            assert not canary
            return SimpleNamespace(load_seconds=0.0)

    monkeypatch.setattr(scaling_contender, "Channel", Channel)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5})
    contender = object.__new__(Contender)
    contender.config = Config()
    contender.workers = SimpleNamespace(fleet=SimpleNamespace(actors=[0, 1, 2, 3]), learner=None)  # type: ignore[assignment]
    found = contender.publishes(2)
    assert given[:4] == [[0], [0, 2], [0, 2, 1], [0, 2, 1, 3]]
    assert [(each.actors, each.sharing) for each in found] == [(1, 1), (2, 1), (3, 2), (4, 2)] * 2


def test_the_parts_of_a_step() -> None:
    first, second, third = tiny.groups()
    one = {"rollout_seconds": 2.0, "reward_seconds": 0.5}
    groups = [replace(first, **one), replace(second, **one), replace(third, rollout_seconds=1.0)]
    assert scaling_contender._parts(groups) == (
        Part(seconds=2.5, tokens=20 + 20, longest=9),
        Part(seconds=1.0, tokens=15, longest=5),
    )


def test_a_device_is_the_same_share_of_the_processors_in_every_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    assert [scaling.shares(number, 2) for number in (1, 2)] == [[0, 1], [0, 1, 2, 3]]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert [scaling.shares(number, 4) for number in (1, 4)] == [[0], [0, 1]]


def test_fixed_and_growing_work(tmp_path: Path) -> None:
    config = with_values(Config(), {"run.dir": tmp_path / "run"})
    assert scaling.planned(config, 1, 1, first=True).works == (4, 8)
    two = scaling.planned(config, 2, 1)
    assert (two.works, two.devices, two.plan.config.run.prompts_per_step) == ((4, 8), 2, 8)
    separate = scaling.planned(with_values(config, {"cluster.layout": "separate"}), 3, 5)
    assert (separate.works, separate.devices) == ((4, 32), 8)
    assert separate.plan.config.learner.gradient_accumulation == 3


@pytest.mark.slow
def test_a_contender_that_ends_is_reported() -> None:
    with (
        pytest.raises(RuntimeError, match="a contender's process has ended"),
        scaling_contender.started(None, [0]),  # type: ignore[arg-type]
    ):
        pass


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the contenders would take its memory")
def test_the_command_on_real_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--run.prompts_per_step", "2", "--actor.max_tokens", "8", "--actor.kv_cache_gib", "0.25"]
    arguments = ["--steps", "1", "--publish-actors", "3", "--out", str(tmp_path)]
    assert benchmark.main(["scaling", *arguments, *options]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    measured = [row["measured"] for row in result["rows"] if row["measured"]]
    assert len(measured) == 4
    for row in measured:
        phases = {name: seconds for name, seconds in row["phases"].items() if name != "wait"}
        assert sum(phases.values()) + row["phases"]["wait"] == pytest.approx(row["seconds"], rel=0.1)
    two = result["rows"][3]
    assert two["measured"]["bytes"]["reduce"] == two["modelled"]["bytes"]["reduce"] == result["gradient_bytes"]
    assert two["measured"]["bytes"]["exchange"] == pytest.approx(two["modelled"]["bytes"]["exchange"])
    assert result["adapter_bytes"] in (result["gradient_bytes"], result["gradient_bytes"] // 2)  # float32, bfloat16
    # of a token: its id, mask and log-probability; texts and scores beside them
    tokens = 2 * 4 * 8
    assert 9 * tokens < result["rows"][0]["measured"]["bytes"]["groups"] < 9 * tokens * 5 + 30_000
    assert [row["actors"] for row in result["publish"]] == [1, 2, 3]
