"""Two hundred steps that change nothing, and 500 adapters: all curves are flat, and nothing is left behind.

HORIZON_SOAK_OUT=FOLDER keeps the curves.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import letters
import numpy as np
import psutil
import pytest
import resources
from small_model import save_model

from launch import run
from launch.recording.recorder import Recorder

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]

STEPS, MORE, EVERY = 200, 300, 5
# It must be above 0. The optimizer adds it to zeros, so that each version has its own checksum; no activation changes.
LEARNING_RATE = "1e-30"
# Allowed in the last three quarters of either part, in all processes of a role. What leaks once a step comes to 150, an
# adapter or a state a step to 190 MiB and more. Seen without a leak: on a busy machine Ray frees late (50 MiB), two
# learners' allocators vary by 10 MiB, and their pools start a last thread each.
GROWTH = {"MiB": 64.0, "descriptors": 4.0, "threads": 4.0}


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run: the metrics of its steps, samples of its steps and of the later publishes, and what is left after it."""
    folder = tmp_path_factory.mktemp("soak")
    save_model(folder / "model")
    samples: dict[str, list[resources.Sample]] = {"steps": [], "publishes": []}
    held: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        path = [str(Path(letters.__file__).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))  # of the workers
        patch.setenv("RAY_ADDRESS", "local")
        patch.setattr(Recorder, "step", sampled(Recorder.step, samples["steps"], held))
        patch.setattr(run, "train", publishing(run.train, samples["publishes"]))
        before = psutil.Process().children(recursive=True)
        options = [
            *("--model.path", str(folder / "model"), "--model.dtype", "float32", "--model.lora_dropout", "0"),
            *("--task.name", "letters", "--task.num_train", "64", "--task.num_eval", "2", "--run.steps", str(STEPS)),
            *("--run.prompts_per_step", "2", "--run.evaluate_every", "50", "--run.checkpoint_every", "20"),
            *("--run.sample_every", "0", "--learner.learning_rate", LEARNING_RATE, "--actor.group_size", "4"),
            *("--actor.max_tokens", "8", "--actor.part_prompts", "1", "--run.dir", str(folder / "run")),
            *("--learner.num_ranks", "2", "--actor.num_actors", "2"),
        ]
        assert run.main(options) == 0
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    if out := os.environ.get("HORIZON_SOAK_OUT"):
        for name, each in samples.items():
            resources.save(each, Path(out), name)
    return {
        **samples,
        "metrics": [json.loads(line) for line in lines],
        "orphans": resources.orphans() & held,
        "held": held,
        "children": set(psutil.Process().children(recursive=True)) - set(before),
    }


def sampled(step: Callable[..., None], samples: list[resources.Sample], held: set[str]) -> Callable[..., None]:
    """Every few steps, a sample and the names of the segments in use."""

    def record(self: Recorder, number: int, *arguments: Any, **options: Any) -> None:
        step(self, number, *arguments, **options)
        if number % EVERY == 0:
            samples.append({"step": float(number), **resources.sample()})
            held.update(resources.held())

    return record


def publishing(train: Callable[..., None], samples: list[resources.Sample]) -> Callable[..., None]:
    """After the last step, MORE publishes as the loop makes them."""

    def train_and_publish(config: Any, workers: Any, *arguments: Any, **options: Any) -> None:
        train(config, workers, *arguments, **options)
        for number in range(1, MORE + 1):
            with workers.fleet.paused():
                workers.channel.publish(workers.learner)
                workers.learner.commit()
            if number % EVERY == 0:
                samples.append({"step": float(number), **resources.sample()})

    return train_and_publish


def test_every_step_published_a_version_of_its_own(curves: dict[str, Any]) -> None:
    assert [line["adapter/version"] for line in curves["metrics"]] == list(range(1, STEPS + 1))
    assert len(curves["publishes"]) == MORE // EVERY


def test_nothing_is_learned(curves: dict[str, Any]) -> None:
    reward, kl, difference = (
        np.array([line[name] for line in curves["metrics"]]) for name in ("reward/mean", "kl/mean", "actor_learner_kl")
    )
    assert np.abs(kl).max() == 0
    assert difference.max() < 1e-8, "two implementations in float32"
    quarters = np.array([np.median(part) for part in np.split(difference, 4)])
    assert quarters.max() < 2 * quarters.min()
    # The rewards are drawn from one distribution: their slope is 0 within four standard errors.
    steps = np.arange(STEPS) - (STEPS - 1) / 2
    error = reward.std() / np.sqrt((steps**2).sum())
    assert abs((steps * reward).sum() / (steps**2).sum()) < 4 * error
    assert reward.std() > 0.05, "a reward that cannot vary shows nothing"


@pytest.mark.parametrize("part", ["steps", "publishes"])
@pytest.mark.parametrize("kind", GROWTH)
@pytest.mark.parametrize("role", resources.ROLES)
def test_no_role_grows(curves: dict[str, Any], part: str, kind: str, role: str) -> None:
    assert resources.growth(curves[part], f"{kind} {role}") <= GROWTH[kind]


@pytest.mark.parametrize("part", ["steps", "publishes"])
def test_processes_segments_and_objects_stay(curves: dict[str, Any], part: str) -> None:
    samples = curves[part]
    for name in ("processes", "segments", "objects", "MiB object store"):
        assert resources.growth(samples, name) == 0, name
    assert samples[-1]["processes"] <= samples[len(samples) // 4]["processes"]


def test_nothing_is_left_behind(curves: dict[str, Any]) -> None:
    assert curves["children"] == set()
    assert curves["orphans"] == set()
    assert curves["held"], "vLLM has a semaphore at least: a run without any segment shows nothing"
