"""A run on two Ray nodes, from `ray job submit`: its numbers are those of one node.

The nodes have addresses of their own and share neither code nor run folder, only the environment and the model.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import namespaces
import pytest
from local_run import comparable
from namespaces import ADDRESSES, JOB_SERVER, Nodes
from small_model import save_model

from common.metrics import read_lines

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    *("--model.dtype", "float32", "--task.name", "letters", "--task.num_train", "8", "--task.num_eval", "2"),
    *("--run.steps", "3", "--run.prompts_per_step", "2", "--run.evaluate_every", "0"),
    *("--learner.learning_rate", "1e-3"),
    *("--actor.group_size", "2", "--actor.max_tokens", "8", "--actor.part_prompts", "1"),
]
SLOW = """
import time
import letters
load = letters.load
def reward(completion, prompt):
    time.sleep(0.5)
    return letters.reward(completion, prompt)
"""  # leaves time for a node to come and go within a few steps
STEPS = 24
TWO = ["--learner.num_ranks", "2", "--actor.num_actors", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, and first/, which only the first node has: the checkout with the user's task, and another model."""
    folder = tmp_path_factory.mktemp("nodes")
    save_model(folder / "model")
    shutil.copytree(folder / "model", folder / "first" / "model")
    checkout = folder / "first" / "checkout"
    for package in ("actor", "common", "launch", "learner"):
        shutil.copytree(ROOT / package, checkout / package)
    shutil.copy(Path(__file__).parents[1] / "helpers" / "letters.py", checkout)
    (checkout / "slow_letters.py").write_text(SLOW)
    return folder


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[Nodes]:
    if reason := namespaces.missing():
        pytest.skip(reason)
    with namespaces.two_nodes(hidden=[folder / "first"]) as nodes:
        yield nodes


def submit(nodes: Nodes, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The checkout travels with the job."""
    command = ["ray", "job", "submit", "--address", JOB_SERVER, "--working-dir", str(folder / "first" / "checkout")]
    return nodes.run(*command, "--", "python", "launch/run.py", *OPTIONS, *options)


def lines(run: Path) -> list[dict[str, float]]:
    return read_lines(run / "metrics.jsonl")


def num_steps(run: Path) -> int:
    return len(lines(run))


def metrics(run: Path) -> list[dict[str, float]]:
    """Without the counts of what was replaced."""
    kept = (comparable(line) for line in lines(run))
    return [{name: value for name, value in line.items() if not name.startswith("recovery/")} for line in kept]


def test_a_run_on_two_nodes_has_the_numbers_of_one(nodes: Nodes, folder: Path, tmp_path: Path) -> None:
    run = folder / "first" / "run"
    done = submit(nodes, folder, "--model.path", str(folder / "model"), "--run.dir", str(run), *TWO)
    assert done.returncode == 0, done.stdout
    assert "' succeeded" in done.stdout
    actors, alive = (
        json.loads(nodes.run("ray", "list", what, "--address", JOB_SERVER, "--format", "json").stdout)
        for what in ("actors", "nodes")
    )
    address = {node["node_id"]: node["node_ip"] for node in alive}
    workers = Counter((each["class_name"], address[each["node_id"]]) for each in actors)
    assert {who: count for who, count in workers.items() if who[0] in ("Learner", "Actor")} == {
        (name, where): 1 for name in ("Learner", "Actor") for where in ADDRESSES
    }
    assert (run / "checkpoints" / "step-000003" / "adapter_model.safetensors").exists(), "on the driver's node"

    assert_numbers_of_one_node(run, folder, tmp_path / "alone")


def assert_numbers_of_one_node(run: Path, folder: Path, alone: Path, *options: str) -> None:
    """The metrics of `run` are those of the same run with one rank and one actor, which is made in `alone`."""
    command = [sys.executable, "launch/run.py", *OPTIONS, "--model.path", str(folder / "model"), *options]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    checkout = folder / "first" / "checkout"
    subprocess.run([*command, "--run.dir", str(alone)], cwd=checkout, env=environment, check=True)
    expected, got = metrics(alone), metrics(run)
    assert expected[-1]["kl/mean"] > 1e-3, "the policy has moved"
    for one, two in zip(expected, got, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-4)


def test_a_run_goes_on_without_a_lost_node_and_takes_it_in_again(nodes: Nodes, folder: Path, tmp_path: Path) -> None:
    """Each step is taken once, and has the numbers of one node."""
    run, log = folder / "first" / "elastic", tmp_path / "log"
    options = ["--model.path", str(folder / "model"), "--run.dir", str(run), "--run.steps", str(STEPS), *TWO]
    options += ["--cluster.node_wait_seconds", "5", "--task.name", "slow_letters"]
    command = ["ray", "job", "submit", "--address", JOB_SERVER, "--working-dir", str(folder / "first" / "checkout")]
    job = nodes.begin(*command, "--", "python", "launch/run.py", *OPTIONS, *options, output=log)
    wait_for(lambda: num_steps(run) >= 2, job, log)
    nodes.stop(1)
    wait_for(lambda: "with learner.num_ranks=1 and actor.num_actors=1" in log.read_text(), job, log)
    lost_at = num_steps(run)
    wait_for(lambda: num_steps(run) >= lost_at + 1, job, log)
    nodes.start(1)
    wait_for(lambda: "with learner.num_ranks=2 and actor.num_actors=2" in log.read_text(), job, log)
    assert num_steps(run) < STEPS
    assert job.wait(300) == 0, log.read_text()
    said = [line for line in log.read_text().splitlines() if "going on after step" in line]
    assert len(said) == 2, said
    assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1))
    assert sum(line["recovery/learner"] + line["recovery/actor"] for line in lines(run)) >= 1
    assert_numbers_of_one_node(run, folder, tmp_path / "alone", "--run.steps", str(STEPS))


def wait_for(done: Callable[[], bool], job: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while not done():
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_a_model_that_one_node_lacks_is_named_with_the_node(nodes: Nodes, folder: Path) -> None:
    model, run = folder / "first" / "model", folder / "first" / "no-run"
    done = submit(nodes, folder, "--model.path", str(model), "--run.dir", str(run), *TWO)
    assert "failed with exit code 2" in done.stdout
    assert f"\nnode {ADDRESSES[1]}: model.path={model} has no config.json; " in done.stdout
    assert not run.exists()


def test_another_token_is_refused(nodes: Nodes) -> None:
    wrong = nodes.environment["RAY_AUTH_TOKEN"][::-1]
    command = ["ray", "job", "submit", "--address", JOB_SERVER, "--", "true"]
    done = nodes.run(*command, RAY_AUTH_TOKEN=wrong)
    assert done.returncode == 1
    assert "AuthenticationError" in done.stdout
    environment = {"RAY_AUTH_TOKEN": wrong, "RAY_ADDRESS": JOB_SERVER, "PYTHONPATH": str(ROOT)}
    done = nodes.run(sys.executable, "-m", "launch.runtime.submit", "--run.dir", "/tmp/no-run", **environment)
    assert (done.returncode, done.stdout.count("\n")) == (2, 1), done.stdout
    assert done.stdout.startswith(f"the Ray at {JOB_SERVER} does not accept the connection; check that")
