"""Command line and TOML file to a configuration, and the one-line error for each invalid input."""

from pathlib import Path

import pytest

from common.command_line import load
from common.config import Config, dump, options
from common.methods import METHODS
from common.section import COSMETIC, MACHINE, PLACEMENT, PLANNED, REPETITION
from common.types import UserError
from launch.experiments import grid
from launch.planning.plan import warnings

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "launch" / "configs").rglob("*.toml"))
GRIDS = [path for path in CONFIGS if "\n[grid]" in path.read_text()]
RUNS = [path for path in CONFIGS if path.parent.name != "grids"]


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.toml"
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--run.stepps 3", "unknown option --run.stepps; did you mean --run.steps?"),
        ("--run.stepps=3", "unknown option --run.stepps; did you mean --run.steps?"),
        ("--steps 3", "unknown option --steps; did you mean --run.steps?"),
        ("--qqq 3", "unknown option --qqq; see --help"),
        ("stray", "unknown option stray"),
        ("--run.steps", "argument --run.steps: expected one argument"),
        ("--run.steps many", "run.steps='many': Input should be a valid integer"),
        ("--run.steps 0", "run.steps='0': Input should be greater than or equal to 1"),
        ("--actor.group_size 1", "actor.group_size='1': Input should be greater than or equal to 2"),
        ("--actor.temperature -1", "actor.temperature='-1': Input should be greater than 0"),
        ("--run.max_staleness -1", "run.max_staleness='-1'"),
        ("--run.max_staleness 1 --method.name dapo", "method.refill_rounds=3 cannot be combined"),
        ("--actor.publish merged", "--actor.publish was removed: every adapter is resident"),
        ("--actor.max_tokens 1024", "actor.max_tokens=1024 leaves no room for a prompt in model.max_length=1024"),
        ("--learner.learning_rate -0.1", "learner.learning_rate='-0.1': Input should be greater than 0"),
        ("--method.name grppo", "method.name=grppo is unknown; did you mean grpo?"),
        ("--method.name qqq", "method.name=qqq is unknown; choose one of grpo"),
        ("--method.alpha inf", "method.alpha='inf': Input should be a finite number"),
        ("--method.clip_low 1.5", "method.clip_low='1.5': Input should be less than or equal to 1"),
        ("--method.weight_gradient true --learner.inner_updates 2", "needs learner.inner_updates=1, not 2"),
        ("--method.weight_gradient true --learner.mini_batches 2", "needs learner.mini_batches=1, not 2"),
        ("--learner.mini_batches 17", "learner.mini_batches=17 is more than the 16 rollouts of a step; lower it"),
        ("--method.name grpo --method.weight_gradient true", "has no effect with token_weight=uniform"),
        (
            "--method.entropy topk-partial --learner.head_backend trl",
            "is not supported by learner.head_backend=trl; use auto",
        ),
        (
            "--method.name reft --method.opening_distinct 3",
            "actor.group_size=4 is not a multiple of method.opening_distinct=3",
        ),
        ("--method.name reft --method.opening_candidates 2", "is less than method.opening_distinct=4"),
        ("--method.opening_after <think>", "method.opening_after='<think>' has no effect with method.opening=plain"),
        (
            "--method.name reft --method.opening_after </SOLUTION>:",
            "actor.stop has '</SOLUTION>', which is in method.opening_after='</SOLUTION>:'",
        ),
        ("--method.overlong_buffer 600", "method.overlong_buffer=600 exceeds actor.max_tokens=512"),
        (
            '--method.decoupled_rewards true --method.overlong_buffer 9 --task.rewards {"a.b":1}',
            "a function of the length",
        ),
        (
            '--method.decoupled_rewards true --method.reward_threshold 0.1 --task.rewards {"a.b":1}',
            "method.reward_threshold=0.1 is one of the sum",
        ),
        ('--method.decoupled_rewards true --task.rewards {"a.b":0}', "needs the rewards"),
        ('--method.decoupled_rewards true --method.advantage asymmetric --task.rewards {"a.b":1}', "use group_std"),
        ("--evaluation.num_problems 600", "evaluation.num_problems=600 exceeds task.num_eval=500"),
        ("--task.gym_options {bad", "task.gym_options"),
        ("--model.lora_variant dora", "model.lora_variant=dora scales each output of W + s B A by a learned magnitude"),
        ("--model.lora_variant PiSSA", "model.lora_variant=PiSSA takes a part of W into B A"),
        ("--model.lora_variant olora", "would be neither the model's nor the actor's; use lora or rslora"),
        ("--model.lora_variant vera", "model.lora_variant='vera': Input should be 'lora' or 'rslora'"),
        ("--model.use_rslora true", "--model.use_rslora is PEFT's name; set model.lora_variant=rslora"),
        ("--model.lora_targets []", "model.lora_targets=[]: Tuple should have at least 1 item"),
        ("--run.st\nps 3", "unknown option --run.st; did you mean --run.steps?"),
        ("--config nowhere.toml", "--config nowhere.toml: no such file"),
        ("--config", "argument --config: expected one argument"),
    ],
)
def test_a_bad_command_line_gets_one_line(options: str, words: str, empty: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(options.split(), empty)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[run]\nstepps = 3", "unknown option run.stepps=3; did you mean run.steps?"),
        ("[rum]\nsteps = 3", "unknown option rum={'steps': 3}"),
        ("[run]\nsteps = 2.5", "run.steps=2.5: Input should be a valid integer"),
        ("[actor]\ngroup_size = 1", "actor.group_size=1: Input should be greater than or equal to 2"),
        ("[actor]\ntemperature = 0.0", "actor.temperature=0.0: Input should be greater than 0"),
        ("[run\nsteps = 3", "is not valid TOML"),
        ('[actor]\npublish = "merged"', "actor.publish='merged' was removed: every adapter is resident"),
    ],
)
def test_a_bad_file_gets_one_line(toml: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(toml)
    with pytest.raises(UserError) as caught:
        load(["--config", str(path)], path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_win_over_the_file_which_wins_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text("[run]\nsteps = 7\nseed = 8\n[task]\ngym_options = { min_terms = 2 }\n")
    config = load(["--config", str(path), "--run.steps", "9", "--actor.stop", '["a", "b"]', "--run.resume"], path)
    assert (config.run.steps, config.run.seed, config.run.prompts_per_step) == (9, 8, 4)
    assert config.actor.stop == ("a", "b")
    assert config.run.resume
    assert config.task.gym_options == {"min_terms": 2}


def test_the_environment_changes_nothing(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN", '{"steps": 3}')
    monkeypatch.setenv("run.steps", "3")
    assert load([], empty) == Config()


def test_a_switch_is_a_flag_or_has_a_value(empty: Path) -> None:
    def selective(*options: str) -> bool:
        return load(options, empty).method.selective

    assert selective()
    assert not selective("--no-method.selective")
    assert not selective("--method.selective", "false")
    assert not selective("--method.selective=false")
    assert selective("--no-method.selective", "--method.selective=true")
    assert selective("--no-method.selective", "--method.selective", "True")
    assert load(["--method.selective", "--run.steps", "3"], empty).run.steps == 3


def test_null_sets_an_option_back(tmp_path: Path) -> None:
    """To unset, or to the method's default."""
    path = tmp_path / "some.toml"
    path.write_text("[method]\nalpha = 0.25\n[evaluation]\nnum_problems = 3\n")
    assert load([], path).method.alpha == 0.25
    assert load(["--method.alpha", "null"], path).method.alpha == METHODS["sa-ah-grpo"].alpha
    assert load([], path).evaluation.num_problems == 3
    assert load(["--evaluation.num_problems", "null"], path).evaluation.num_problems is None
    path.write_text("[task]\ngym_options = { min_terms = 2 }\n")
    assert load(["--task.gym", "leg_counting", "--task.gym_options=null"], path).task.gym_options == {}
    assert load(["--method.alpha", "-0.5"], path).method.alpha == -0.5


def test_a_dumped_configuration_loads_again_as_the_same(empty: Path, tmp_path: Path) -> None:
    options = ["--method.alpha", "-0.5", "--run.dir", "runs/x", "--task.gym_options", '{"a": [1, 2]}']
    options += ["--method.opening", "reft", "--method.opening_after", '<a>\n\t"b\\\\ ']
    config = load(options, empty)
    path = tmp_path / "config.toml"
    path.write_text(dump(config))
    assert load([], path) == config


def test_help_describes_every_option(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--help"], empty)
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section in Config.model_fields:
        for key, field in Config.model_fields[section].annotation.model_fields.items():  # type: ignore[union-attr]
            assert f"--{section}.{key}" in text
            assert field.description, f"{section}.{key} has no description"
            assert field.description.split("\n")[0] in text
    assert len(options()) > 50


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_configuration_of_the_repository_loads(path: Path) -> None:
    config = load(["--config", str(path)], path)
    assert config.method.name


@pytest.mark.parametrize("scale", [None, "cpu"])
@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_every_grid_of_the_repository_loads_without_a_warning(path: Path, scale: str | None) -> None:
    assert not [
        w for cell in grid.cells(path, Path("x"), scale=scale) for w in warnings(cell.config) if "is off" not in w
    ]


def test_a_file_wins_over_its_base_and_a_table_in_a_table_is_merged(tmp_path: Path) -> None:
    (tmp_path / "below.toml").write_text("[run]\nsteps = 3\nseed = 4\n[task]\ngym_options = { a = 1, b = 2 }\n")
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "above.toml"
    path.write_text('base = "../below.toml"\n[run]\nsteps = 5\n[task]\ngym_options = { b = 3 }\n')
    config = load(["--task.gym_options", '{"c": 4}'], path)
    assert (config.run.steps, config.run.seed) == (5, 4)
    assert config.task.gym_options == {"a": 1, "b": 3, "c": 4}


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('base = "above.toml"', "above.toml is its own base"),
        ('base = "other.toml"', "above.toml is its own base"),
        ('base = "nowhere.toml"', "above.toml "),
        ("base = 3", "base=3 is not a path"),
    ],
)
def test_a_bad_base_gets_one_line(toml: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "above.toml").write_text(toml)
    (tmp_path / "other.toml").write_text('base = "above.toml"')
    with pytest.raises(UserError) as caught:
        load([], tmp_path / "above.toml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'[run]\ndir = "r\xe9sum\xe9"\n')
    with pytest.raises(UserError, match="is not valid TOML"):
        load([], tmp_path / "latin.toml")


def test_roles_of_the_options() -> None:
    """Listed in full: without its role a field could make runs look different, or change when a run resumes."""
    assert options(COSMETIC) == {
        "run.dir": Path("runs/default"),
        "run.checkpoint_every": 15,
        "run.keep_checkpoints": None,
        "run.evaluate_every": 30,
        "run.patience": None,
        "run.sample_every": 10,
        "run.tracker": ("tensorboard",),
        "run.resume": False,
        "cluster.wait_seconds": 60.0,
        "cluster.node_wait_seconds": 1800.0,
        "evaluation.sets": (),
        "evaluation.best": None,
    }
    assert options(PLACEMENT) == {
        "actor.num_actors": 1,
        "actor.tensor_parallel": 1,
        "learner.num_ranks": 1,
        "learner.shard": False,
        "cluster.layout": "colocated",
    }
    assert list(options(REPETITION)) == ["run.seed"]
    unset_memory = {
        "actor.gpu_memory_fraction": None,
        "actor.kv_cache_gib": None,
        "actor.num_sequences": None,
        "learner.micro_batch_tokens": None,
        "learner.recompute": "auto",
    }
    assert options(MACHINE, PLANNED) == unset_memory
    assert options(MACHINE) == unset_memory | {"run.gpu_memory_gib": None}
    assert options(PLANNED) == unset_memory | {
        "model.dtype": "auto",
        "model.lora_targets": ("all-linear",),
        "method.importance": "auto",
    }
