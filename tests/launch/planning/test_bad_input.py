"""Bad input ends with one clear line and status 2, before any model is loaded and with nothing lost."""

import json
from contextlib import nullcontext

import pytest
import ray
import torch

from common.command_line import load
from common.config import dump
from launch import run
from launch.planning import plan
from launch.runtime import cluster, nodes, workers
from learner import checkpoint

QUESTION = {"question": "1 + 1?", "answer": "2 #### 2"}


@pytest.fixture(autouse=True)
def _no_model(monkeypatch):
    """Getting as far as starting processes is a failure of the test."""
    monkeypatch.setattr(workers, "start", lambda plan, **_: pytest.fail("a model would have been loaded"))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps(QUESTION) + "\n")
    return folder


def refuse(capsys, *options: str) -> str:
    """The one line on stderr."""
    assert run.main(list(options)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--run.stepps", "3"], ["run.stepps", "run.steps"]),
        (["--run.steps", "many"], ["run.steps", "many", "integer"]),
        (["--actor.group_size", "1"], ["actor.group_size", "1", "2"]),
        (["--actor.temperature", "-1"], ["actor.temperature", "-1"]),
        (["--method.name", "sa-ah-grop"], ["sa-ah-grop", "sa-ah-grpo"]),
        (["--config", "nowhere.toml"], ["nowhere.toml"]),
        (["--actor.max_tokens", "512"], ["actor.max_tokens=512", "model.max_length=512"]),
        (["--actor.max_tokens", "480"], ["model.max_length=512", "actor.max_tokens=480", "longest prompt"]),
        (["--model.max_length", "100000"], ["model.max_length=100000", "8192"]),
        (["--model.path", "/no/such/model"], ["model.path=/no/such/model"]),
        (["--model.lora_targets", "q_proj,w_proj"], ["w_proj", "down_proj"]),
        (["--model.lora_targets", "lm_head"], ["lm_head"]),
        (["--task.name", "gsm9k"], ["gsm9k"]),
        (["--task.gym", "chain_summ"], ["chain_summ", "chain_sum"]),
        (["--task.rewards", '{"formt": 1.0}'], ["task.rewards", "task.name=gym", "formt", "format"]),
        (["--task.rewards", '{"no.such.judge": 1.0}'], ["task.rewards", "no.such.judge", "No module named 'no'"]),
        (["--task.rewards", '{"judges.lenght": 1.0}'], ["task.rewards", "judges.lenght"]),
        (["--task.rewards", '{"correct": "much"}'], ["task.rewards.correct", "much"]),
        (["--method.decoupled_rewards", "true"], ["method.decoupled_rewards", "task.rewards"]),
        (
            ["--method.name", "reft", "--method.opening_after", "<start_working_out>\n", "--actor.max_tokens", "9"],
            [r"method.opening_after='<start_working_out>\n' has 8 tokens", "actor.max_tokens=9", "shorten"],
        ),
        (["--evaluation.num_problems", "65"], ["65", "64"]),
        (["--run.resume"], ["--run.resume"]),
        (["--actor.tensor_parallel", "3"], ["actor.tensor_parallel=3", "cluster.layout=separate"]),
        (["--actor.tensor_parallel", "2", "--cluster.layout", "separate"], ["tensor_parallel=2", "9 attention heads"]),
    ],
)
def test_options(capsys, tmp_path, options, words):
    line = refuse(capsys, "--run.dir", str(tmp_path / "run"), *options)
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, ["train.jsonl"]),
        ([], ["train.jsonl", "empty"]),
        ([QUESTION, {"question": "no answer"}], ["train.jsonl", "2", "answer"]),
        ([QUESTION, {"answer": "#### 2"}], ["train.jsonl", "2", "question"]),
        ([QUESTION, "{"], ["train.jsonl", "2", "JSON"]),
        ([QUESTION], ["task.num_train", "800", "1"]),
    ],
)
def test_data(capsys, tmp_path, data, rows, words):
    train = data / "train.jsonl"
    if rows is None:
        train.unlink()
    else:
        train.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    (data / "test.jsonl").write_text((json.dumps(QUESTION) + "\n") * 64)
    few = ["--task.num_train", "2"] if rows and len(rows) > 1 else []
    line = refuse(capsys, "--run.dir", str(tmp_path / "run"), "--task.name", "gsm8k", "--task.data", str(data), *few)
    for word in words:
        assert word in line


def test_folder_of_another_run_is_not_touched(capsys, tmp_path):
    (tmp_path / "config.toml").write_text("[run]\nsteps = 3\n")
    assert "--run.resume" in refuse(capsys, "--run.dir", str(tmp_path))
    assert (tmp_path / "config.toml").read_text() == "[run]\nsteps = 3\n"


def test_resuming_with_other_options_names_the_difference(capsys, tmp_path):
    folder = tmp_path / "run"
    assert run.main(["--run.dir", str(folder), "--dry-run"]) == 0
    written = capsys.readouterr().out.split("\n#")[0]
    folder.mkdir()
    (folder / "config.toml").write_text(written)
    for option, value, before in (("method.alpha", "0.25", "0.5"), ("model.lora_variant", "rslora", "lora")):
        line = refuse(capsys, "--run.dir", str(folder), "--run.resume", f"--{option}", value)
        assert f"{option}={value} differs from {before}" in line


def test_a_run_that_published_by_merging_is_not_resumed(capsys, tmp_path):
    (tmp_path / "config.toml").write_text('[actor]\npublish = "merged"\n')
    line = refuse(capsys, "--run.dir", str(tmp_path), "--run.resume")
    assert "cannot resume: actor.publish='merged' was removed: every adapter is resident" in line


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_checkpoint_with_a_pickle_is_refused_and_its_run_stays(capsys, tmp_path, dry):
    (tmp_path / "checkpoints" / "step-000015").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000015" / "learner_state.pt").touch()
    (tmp_path / "config.toml").write_text(dump(load([], cluster.DEFAULT_CONFIG)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 16}\n')
    line = refuse(capsys, "--run.dir", str(tmp_path), "--run.resume", *dry)
    assert "step-000015 is damaged: learner_state.pt is neither safetensors nor JSON" in line
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 16}\n'


def test_a_moved_run_folder_resumes_by_any_name_of_it(tmp_path, monkeypatch):
    begun = load([], cluster.DEFAULT_CONFIG)
    folder = tmp_path / "moved"
    with checkpoint.written_whole(folder / "checkpoints" / "step-000015"):
        pass
    (folder / "config.toml").write_text(dump(begun))  # its run.dir is another
    monkeypatch.chdir(tmp_path)
    for name in ("moved", "./moved", str(folder)):
        config = load(["--run.dir", name, "--run.resume"], cluster.DEFAULT_CONFIG)
        assert plan.run_folder(config).name == "step-000015"


def test_resume_auto_starts_what_is_not_there_and_resumes_what_is(tmp_path):
    folder = tmp_path / "run"
    config = load(["--run.dir", str(folder), "--run.resume", "auto"], cluster.DEFAULT_CONFIG)
    assert plan.with_resume(config).run.resume is False
    folder.mkdir()
    assert plan.with_resume(config).run.resume is False
    (folder / "config.toml").write_text("")
    assert plan.with_resume(config).run.resume is True


def test_a_run_resumes_on_another_number_of_devices(tmp_path):
    (tmp_path / "config.toml").write_text(dump(load(["--run.dir", str(tmp_path)], cluster.DEFAULT_CONFIG)))
    more = ["--learner.num_ranks", "2", "--actor.num_actors", "3", "--cluster.layout", "separate"]
    config = plan.with_importance(load(["--run.dir", str(tmp_path), "--run.resume", *more], cluster.DEFAULT_CONFIG))
    assert plan.run_folder(config) is None


def test_dry_run_prints_a_configuration_that_loads(capsys, tmp_path):
    assert run.main(["--run.dir", str(tmp_path / "run"), "--run.steps", "7", "--dry-run"]) == 0
    written = tmp_path / "resolved.toml"
    written.write_text(capsys.readouterr().out)
    assert run.main(["--config", str(written), "--dry-run"]) == 0
    assert "steps = 7" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_head_that_cannot_run_here(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refuse(capsys, "--run.dir", str(tmp_path / "run"), "--learner.head_backend", "triton")
    assert line == "learner.head_backend=triton needs an NVIDIA GPU; use auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpus_plan_does_not_run_on_a_cpu(capsys, tmp_path, monkeypatch):
    """It would give a CPU run a GPU's KV cache and micro-batches."""
    monkeypatch.setattr(cluster, "connect", nullcontext)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    monkeypatch.setattr(workers, "start", lambda plan, **_: nodes.fitted(plan))
    line = refuse(capsys, "--run.dir", str(tmp_path / "run"), "--run.gpu_memory_gib", "40")
    assert "run.gpu_memory_gib=40.0 plans for a GPU, and there is none" in line
    assert not (tmp_path / "run").exists()
