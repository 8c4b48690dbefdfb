"""A run follows its cluster: how many workers fit, and that it goes on where it was."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import local_run
import pytest
import ray
import tiny

from common.config import Config, with_values
from common.metrics import read_lines
from common.types import UserError
from launch import run
from launch.planning.plan import Plan
from launch.runtime import resize
from launch.runtime.recovery import Losses
from launch.runtime.resize import Resized, numbers


def asked(ranks: int, actors: int, **options: object) -> Config:
    return with_values(tiny.config(), {"learner.num_ranks": ranks, "actor.num_actors": actors, **options})


@pytest.mark.parametrize(
    ("ranks", "actors", "devices", "fits"),
    [(8, 8, 8, (8, 8)), (8, 8, 5, (5, 5)), (8, 8, 20, (8, 8)), (2, 4, 3, (2, 3)), (2, 4, 1, (1, 1)), (1, 1, 0, None)],
)
def test_colocated_a_rank_and_an_actor_share_a_device(ranks, actors, devices, fits):
    assert numbers(asked(ranks, actors), devices) == fits


@pytest.mark.parametrize(
    ("ranks", "actors", "tensor_parallel", "devices", "fits"),
    [
        (2, 6, 1, 8, (2, 6)),
        (2, 6, 1, 7, (2, 5)),  # 5/6 of the one side; with (1, 6) half of the other
        (2, 6, 1, 4, (1, 3)),  # half of both sides
        (2, 6, 1, 2, (1, 1)),
        (2, 6, 1, 1, None),
        (4, 2, 2, 7, (3, 2)),  # an actor has two devices; (4, 1) would leave half of the actors
        (4, 2, 2, 5, (3, 1)),
    ],
)
def test_separate_the_sides_shrink_alike(ranks, actors, tensor_parallel, devices, fits):
    options = {"cluster.layout": "separate", "actor.tensor_parallel": tensor_parallel}
    assert numbers(asked(ranks, actors, **options), devices) == fits


def test_a_sharded_base_needs_two_ranks():
    assert numbers(asked(4, 4, **{"learner.shard": True}), 2) == (2, 2)
    assert numbers(asked(4, 4, **{"learner.shard": True}), 1) is None


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
def test_it_grows_only_towards_what_was_asked_for(monkeypatch, num_devices):
    plan = SimpleNamespace(config=asked(3, 3), gpus=())
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(num_devices), "GPU": 8.0})
    assert resize.can_grow(plan, asked(2, 2)) == (num_devices > 2)
    assert not resize.can_grow(plan, asked(3, 3))


class Lost:
    """A cluster of two devices that loses one in the middle of step 3, and gets it back after step 4."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_devices = 2
        self.started: list[tuple[int, int, str]] = []  # ranks, actors, checkpoint
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(self.num_devices)})
        monkeypatch.setattr(run.workers, "start", self.start)

    @contextlib.contextmanager
    def start(self, plan: Plan, *, losses: Losses | None = None) -> Iterator[SimpleNamespace]:
        config = plan.config
        resumed = plan.resume_from.name if plan.resume_from else ""
        self.started.append((config.learner.num_ranks, config.actor.num_actors, resumed))
        with local_run.start(plan, losses=losses) as started:
            update = started.learner.update

            def failing(groups):
                step = started.learner.position.get("step", 0) + 1
                if step == 3 and len(self.started) == 1:
                    self.num_devices = 1
                    raise Resized("a node is lost")
                self.num_devices = 2 if step == 4 else self.num_devices
                return update(groups)

            started.learner.update = failing
            yield started


def test_a_run_goes_on_after_its_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The one lost step is made again; steps, evaluations and the last checkpoint are those of an unbroken run."""
    local_run.install(monkeypatch)
    model = local_run.save_model(tmp_path / "model")
    two = ["--learner.num_ranks", "2", "--actor.num_actors", "2", "--run.steps", "6", "--run.checkpoint_every", "0"]
    assert run.main(local_run.options(model, tmp_path / "unbroken", *two)) == 0
    cluster = Lost(monkeypatch)
    assert run.main(local_run.options(model, tmp_path / "run", *two)) == 0
    assert cluster.started == [(2, 2, ""), (1, 1, "step-000002"), (2, 2, "step-000004")]
    assert "going on after step 2 with learner.num_ranks=1 and actor.num_actors=1" in capsys.readouterr().out
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
        whole, resized = (
            [local_run.comparable(line) for line in read_lines(tmp_path / folder / name)]
            for folder in ("unbroken", "run")
        )
        assert resized == whole
    last, expected = (tmp_path / folder / "checkpoints" / "step-000006" for folder in ("run", "unbroken"))
    assert (last / "adapter_model.safetensors").read_bytes() == (expected / "adapter_model.safetensors").read_bytes()


def test_too_few_devices_end_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    local_run.install(monkeypatch)
    cluster = Lost(monkeypatch)
    monkeypatch.setattr(resize, "_num_devices", lambda asked: 0)
    options = local_run.options(local_run.save_model(tmp_path / "model"), tmp_path / "run")
    assert run.main([*options, "--learner.num_ranks", "2", "--actor.num_actors", "2"]) == 1
    assert cluster.started == [(2, 2, "")]
    assert capsys.readouterr().err == (
        "run failed: 0 devices are too few to go on; resume with --run.resume when there are more\n"
    )
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir(), "nothing is lost"


def test_a_larger_run_that_does_not_start_goes_on_as_before(tmp_path, monkeypatch, capsys):
    """It has lost nothing, and does not try again."""
    local_run.install(monkeypatch)
    cluster = Lost(monkeypatch)
    start = cluster.start

    def failing(plan: Plan, *, losses: Losses | None = None):
        if len(cluster.started) == 2:
            cluster.started.append((plan.config.learner.num_ranks, plan.config.actor.num_actors, "fails"))
            raise UserError("node 10.77.0.2: model.path=x has no config.json")
        return start(plan, losses=losses)

    monkeypatch.setattr(run.workers, "start", failing)
    options = local_run.options(local_run.save_model(tmp_path / "model"), tmp_path / "run", "--run.steps", "6")
    assert run.main([*options, "--learner.num_ranks", "2", "--actor.num_actors", "2"]) == 0
    assert cluster.started == [(2, 2, ""), (1, 1, "step-000002"), (2, 2, "fails"), (1, 1, "step-000004")]
    assert "node 10.77.0.2: model.path=x has no config.json; going on as before" in capsys.readouterr().out
    assert [record["step"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_run_does_not_grow_after_its_last_step(tmp_path, monkeypatch):
    local_run.install(monkeypatch)
    cluster = Lost(monkeypatch)
    options = local_run.options(local_run.save_model(tmp_path / "model"), tmp_path / "run")  # of four steps
    assert run.main([*options, "--learner.num_ranks", "2", "--actor.num_actors", "2"]) == 0
    assert cluster.started == [(2, 2, ""), (1, 1, "step-000002")]


@pytest.mark.parametrize(
    ("layout", "free", "grows"), [("colocated", 1, True), ("separate", 1, True), ("separate", 0, False)]
)
def test_gpus_that_other_jobs_hold_are_no_room(monkeypatch, layout, free, grows):
    wanted = asked(2, 2, **{"cluster.layout": layout})
    plan = SimpleNamespace(config=wanted, gpus=("a", "b"))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"GPU": float(free)})
    assert resize.can_grow(plan, asked(1, 1, **{"cluster.layout": layout})) == grows


def test_it_grows_to_what_is_worth_more_even_with_fewer_workers(monkeypatch):
    """11 GPUs, actors of four: (3, 2) instead of (4, 1), which leaves half of the actors."""
    separate = {"cluster.layout": "separate", "actor.tensor_parallel": 4}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 11.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"GPU": 3.0})
    plan = SimpleNamespace(config=asked(4, 2, **separate), gpus=("a",))
    assert resize.can_grow(plan, asked(4, 1, **separate))
