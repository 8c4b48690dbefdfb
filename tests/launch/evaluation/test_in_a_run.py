"""Whole runs of a tiny model, without Ray and vLLM: the best checkpoint, the early stop, sets, and the command."""

import json
import re
import shutil
from pathlib import Path

import local_run
import pytest
from local_run import comparable

from actor.rollout import prompt_tokens
from common.command_line import load
from common.config import dump
from common.metrics import read_lines
from common.types import UserError
from launch import evaluate, loop, run
from launch.planning import plan
from launch.runtime.cluster import DEFAULT_CONFIG
from learner import checkpoint

pytestmark = pytest.mark.slow

PASSES = {0: 0.9, 1: 0.1, 2: 0.5, 3: 0.4, 4: 0.5}  # scripted Pass@1 by step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_run.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(model, monkeypatch, capsys):
    """A function that runs up to 4 steps with an evaluation after each; returns status and stdout."""
    local_run.install(monkeypatch)
    measured = loop.evaluate

    def scripted(*arguments, step):
        found = measured(*arguments, step=step)
        return type(found)(record=found.record | {"pass_at_1": PASSES[step]}, problems=found.problems)

    monkeypatch.setattr(loop, "evaluate", scripted)

    def start(folder: Path, *more: str) -> tuple[int, str]:
        every = ["--run.evaluate_every", "1", "--run.checkpoint_every", "0", "--evaluation.best", "pass_at_1"]
        status = run.main(local_run.options(model, folder, *every, *more))
        return status, capsys.readouterr().out

    return start


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def step_of_best(folder: Path) -> int:
    best = folder / "checkpoints" / "best"
    assert checkpoint.damage(best) is None
    return checkpoint.read_object(best / "run_state.json")["step"]


def numbers(folder: Path) -> list[dict]:
    """What equal runs have in common: metrics and evaluations."""
    return [
        comparable(record) for name in ("metrics", "evaluations") for record in read_lines(folder / f"{name}.jsonl")
    ]


@pytest.mark.long
def test_the_best_is_kept_and_the_others_are_bounded(start, tmp_path):
    status, _ = start(tmp_path / "run", "--run.keep_checkpoints", "1")
    assert status == 0
    assert (names(tmp_path / "run"), step_of_best(tmp_path / "run")) == (["best", "step-000004"], 2)


def test_patience_ends_a_run_as_finished(start, tmp_path):
    folder = tmp_path / "run"
    status, out = start(folder, "--run.patience", "1")
    assert status == 0
    assert out.splitlines()[-1] == (
        "stopped after step 3: 1 evaluation without a better pass_at_1, 0.500 at step 2 is the best "
        f"(run.patience=1); run folder {folder}"
    )
    assert [record["step"] for record in read_lines(folder / "metrics.jsonl")] == [1, 2, 3]
    assert names(folder) == ["best", "step-000001", "step-000002", "step-000003"]
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    status, out = start(folder, "--run.patience", "1", "--run.resume")
    assert (status, "stopped after step 3" in out.splitlines()[-1], "starting vLLM" in out) == (0, True, False)
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before


@pytest.mark.parametrize(
    "moment",
    [pytest.param("evaluated", marks=pytest.mark.long), "saved", pytest.param("copied", marks=pytest.mark.long)],
)
def test_a_run_that_ends_at_any_moment_resumes_to_the_same_best_and_the_same_stop(start, tmp_path, monkeypatch, moment):
    """Interrupted at step 2, after its evaluation, its checkpoint, or the copy of the best one."""
    patience = ["--run.patience", "2", "--run.keep_checkpoints", "1"]
    monkeypatch.setitem(PASSES, 4, 0.3)
    start(tmp_path / "whole", *patience)
    place, name = {
        "evaluated": (loop, "save"),
        "saved": (checkpoint, "keep_best"),
        "copied": (checkpoint, "delete_old"),
    }[moment]
    real, count = getattr(place, name), []

    def interrupted(*arguments):
        count.append(None)
        if len(count) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        assert start(tmp_path / "cut", *patience)[0] == 130
    status, out = start(tmp_path / "cut", *patience, "--run.resume")
    assert status == 0
    assert "stopped after step 4: 2 evaluations without" in out.splitlines()[-1]
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert (names(tmp_path / "cut"), step_of_best(tmp_path / "cut")) == (["best", "step-000004"], 2)


@pytest.mark.long
def test_the_best_is_a_checkpoint_that_a_run_resumes_from(start, tmp_path):
    """In the place of the later ones, under the name of its step: to the same numbers."""
    start(tmp_path / "whole", "--run.keep_checkpoints", "1")
    again = shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "step-000004")
    (again / "checkpoints" / "best").rename(again / "checkpoints" / "step-000002")
    status, out = start(again, "--run.keep_checkpoints", "1", "--run.resume")
    assert (status, "resuming at step 2" in out) == (0, True)
    assert numbers(again) == numbers(tmp_path / "whole")
    state = "learner_state.safetensors"
    last = [folder / "checkpoints" / "step-000004" / state for folder in (again, tmp_path / "whole")]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.long
def test_a_damaged_checkpoint_is_written_again_before_older_ones_are_deleted(start, tmp_path):
    folder = tmp_path / "run"
    start(folder)
    (folder / "checkpoints" / "step-000004" / "run_state.json").write_text("x")
    status, _ = start(folder, "--run.keep_checkpoints", "1", "--run.resume")
    assert (status, names(folder)) == (0, ["best", "step-000004"])
    assert checkpoint.damage(folder / "checkpoints" / "step-000004") is None


@pytest.mark.long
def test_more_patience_resumes_a_run_that_has_stopped(start, tmp_path):
    folder = tmp_path / "run"
    start(folder, "--run.patience", "1")
    status, out = start(folder, "--run.patience", "9", "--run.resume")
    assert (status, out.splitlines()[-1]) == (0, f"finished 4 steps; run folder {folder}")


@pytest.fixture
def svamp(tmp_path) -> Path:
    path = tmp_path / "svamp.jsonl"
    rows = [{"Body": f"Ann had {i} pens.", "Question": "How many?", "Answer": float(i)} for i in (3, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_evaluation_of_a_run_has_its_sets_and_its_problems(start, tmp_path, svamp):
    folder = tmp_path / "run"
    status, out = start(folder, "--evaluation.sets", f"svamp:{svamp}", "--evaluation.best", "svamp/pass_at_1")
    assert status == 0
    assert "evaluation at step 3, svamp: Pass@1" in out
    for record in read_lines(folder / "evaluations.jsonl"):
        assert record["sets"]["svamp"]["num_problems"] == 2
        problems = read_lines(folder / "evaluations" / f"{checkpoint.name(record['step'])}.jsonl")
        assert [(each["step"], each["set"]) for each in problems] == [
            (record["step"], name) for name in ("task", "task", "svamp", "svamp")
        ]


def test_the_command_evaluates_a_base_model_on_sets_alone(start, model, tmp_path, svamp, capsys):
    small = ["--model.dtype", "float32", "--model.lora_rank", "2", "--actor.max_tokens", "32"]
    out = tmp_path / "problems.jsonl"
    assert evaluate.main([str(model), "--sets", f"svamp:{svamp}", f"other:{svamp}", "--out", str(out), *small]) == 0
    *lines, record = capsys.readouterr().out.splitlines()
    assert [line.partition(" Pass@1")[0] for line in lines] == [
        "evaluation at step 0, svamp:",
        "evaluation at step 0, other:",
    ]
    assert set(json.loads(record)) == {"step", "sets", "seconds"}
    assert [each["set"] for each in read_lines(out)] == ["svamp"] * 2 + ["other"] * 2
    assert evaluate.main(["--compare", str(out), str(out)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["svamp"]["p_value"] == 1.0


@pytest.mark.long
def test_the_command_evaluates_the_best(start, tmp_path, svamp, capsys):
    start(tmp_path / "run", "--evaluation.sets", f"svamp:{svamp}", "--evaluation.num_samples", "2")
    best = str(tmp_path / "run" / "checkpoints" / "best")
    assert evaluate.main([best]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["step"], record["num_problems"], list(record["sets"])) == (2, 2, ["svamp"])
    # Neither the set nor the number by which the run chose it need be evaluated again.
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace('best = "pass_at_1"', 'best = "svamp/pass_at_2"'))
    assert evaluate.main([best, "--sets", f"other:{svamp}", "--evaluation.num_samples", "0"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["step"], list(record["sets"])) == (2, ["other"])


def saved_by(options: list[str], folder: Path) -> Path:
    """The checkpoint of step 4, without weights, of a run with these options."""
    folder.mkdir()
    (folder / "config.toml").write_text(dump(load(options, DEFAULT_CONFIG)))
    saved = folder / "checkpoints" / checkpoint.name(4)
    with checkpoint.written_whole(saved) as whole:
        (whole / "adapter_model.safetensors").touch()
        (whole / "run_state.json").write_text("{}")
    return saved


def test_sets_alone_need_no_data_of_the_run(model, tmp_path, svamp):
    """It may lie on the machine that trained, and be large; the canary is then the first problem of the sets."""
    task = ["--task.name", "math", "--task.data", "no/such.jsonl", "--task.system", "Be brief."]
    saved = saved_by(local_run.options(model, tmp_path / "run", *task), tmp_path / "run")
    planned = evaluate.planned(str(saved), [f"svamp:{svamp}"], [])
    assert {name: len(each) for name, each in planned.prompts.evaluation.items()} == {"svamp": 2}
    first = planned.prompts.evaluation["svamp"][0]
    assert first.messages[0]["content"] == "Be brief.", "the run's options decide how a set is asked"
    canary = planned.canary_token_ids.tolist()
    assert len(canary) > 50 and canary == prompt_tokens(planned.tokenizer, first)[: len(canary)]
    with pytest.raises(UserError, match="no/such"):
        evaluate.planned(str(saved), (), [])


def test_a_checkpoint_is_evaluated_where_the_judges_of_its_run_are_missing(model, tmp_path):
    """Its config.toml names a module that is not here; no evaluation calls it."""
    judged = ["--task.rewards", '{"no_such_module.judge": 1.0}', "--method.decoupled_rewards", "true"]
    options = local_run.options(model, tmp_path / "run", *judged, "--method.name", "grpo")
    saved = saved_by(options, tmp_path / "run")
    planned = evaluate.planned(str(saved), (), [])
    assert (planned.config.task.rewards, planned.resume_from) == ({}, saved)
    assert planned.config.run.steps == 4, "the other options are the run's"
    with pytest.raises(UserError, match="no_such_module"):  # a run, and the plan of an experiment's cell, do need it
        plan.make(load(options, DEFAULT_CONFIG), trains=False)


def test_help_lists_the_commands_own_options(capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "--sets NAME:DATA" in out and "launch/run.py --help" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a checkpoint or a model"),
        (["--sets", "svamp:x"], "name a checkpoint or a model"),
        (["."], "is not a checkpoint in a run folder"),
        (["no/such/folder"], "is not a directory and cannot be downloaded"),
        (["MODEL", "--sets"], "expected at least one argument"),
        (["MODEL", "--sets", "svamp"], "is not NAME:DATA"),
        (["MODEL", "--sets", "svamp:no/such.jsonl"], "evaluation.sets, svamp: .*no/such.jsonl"),
        (["MODEL", "--out", "no/such/folder/x.jsonl"], "not a file in a folder that is there"),
        (["--compare", "x.jsonl"], "expected 2 arguments; see --help"),
    ],
)
def test_other_command_lines_are_one_line(start, model, capsys, argv, message):
    small = ["--model.dtype", "float32", "--actor.max_tokens", "32"] if "MODEL" in argv else []
    assert evaluate.main([str(model) if each == "MODEL" else each for each in argv] + small) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err)
