"""Grids: which cells a file makes, with what configuration, and the one line that says what is wrong with it."""

from itertools import combinations
from pathlib import Path

import pytest

from actor.tasks.composite_reward import REASONING
from common.command_line import load
from common.method import Method
from common.methods import METHODS
from common.types import UserError
from launch.experiments import grid

CONFIGS = Path(__file__).resolve().parents[3] / "launch" / "configs"
GRIDS = CONFIGS / "grids"
OF_HORIZON = ["main_comparison", "alpha_sweep_ah", "alpha_sweep_sa_ah", "alpha_schedule", "entropy_topk"]  # one loss

TOML = """
[run]
steps = 7
[actor]
max_tokens = 64
[method]
beta = 0.1
[grid]
seeds = [3, 5]
models = ["some/model-a", "b"]
variants = [
    { name = "plain", method = { name = "grpo" } },
    { name = "ah", method = { name = "ah-grpo", alpha = 0.25, beta = 0.0 }, learner = { inner_updates = 2 } },
]
[scale.cpu.run]
steps = 2
[scale.cpu.grid]
models = []
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.toml"
    path.write_text(TOML)
    return path


def test_cells_are_variants_times_models_times_seeds(file: Path) -> None:
    cells = grid.cells(file, Path("runs/x"))
    assert [cell.name for cell in cells] == [
        "plain_model-a_seed-3",
        "ah_model-a_seed-3",
        "plain_b_seed-3",
        "ah_b_seed-3",
        "plain_model-a_seed-5",
        "ah_model-a_seed-5",
        "plain_b_seed-5",
        "ah_b_seed-5",
    ]
    assert [cell.kind for cell in cells[:2]] == ["plain_model-a", "ah_model-a"]
    assert all(cell.config.run.dir == Path("runs/x") / cell.name for cell in cells)
    assert [cell.config.run.seed for cell in cells] == [3] * 4 + [5] * 4
    assert {cell.config.run.steps for cell in cells} == {7}
    assert {cell.config.actor.max_tokens for cell in cells} == {64}
    assert [cell.config.model.path for cell in cells[:4]] == ["some/model-a", "some/model-a", "b", "b"]
    assert [cell.config.learner.inner_updates for cell in cells[:2]] == [1, 2]
    plain, ah = (cell.config.method for cell in cells[:2])
    assert (plain.token_weight, plain.beta) == ("uniform", 0.1)
    assert (ah.token_weight, ah.alpha, ah.beta) == ("horizon", 0.25, 0.0)


def test_a_scale_wins_over_the_file_and_an_option_over_both(file: Path) -> None:
    cells = grid.cells(
        file, Path("x"), scale="cpu", options=["--actor.max_tokens", "8", "--learner.inner_updates", "3"]
    )
    assert [cell.name for cell in cells] == ["plain_seed-3", "ah_seed-3", "plain_seed-5", "ah_seed-5"]
    assert {cell.config.run.steps for cell in cells} == {2}
    assert {cell.config.actor.max_tokens for cell in cells} == {8}
    assert {cell.config.learner.inner_updates for cell in cells} == {3}  # for every cell, also one with its own
    assert {cell.config.model.path for cell in cells} == {"smollm2-135m-instruct"}


def test_cells_share_their_data(file: Path) -> None:
    assert len({cell.config.task.seed for cell in grid.cells(file, Path("x"))}) == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("steps = 7", "stepps = 7", "unknown option run.stepps=7; did you mean run.steps?"),
        ("[run]", "[rum]", "unknown option rum={'steps': 7}"),
        ("seeds = [3, 5]", "sedes = [3, 5]", "grid.sedes=[3, 5] is an unknown key; did you mean seeds?"),
        ("seeds = [3, 5]", "", "grid.seeds is missing; add it"),
        ("seeds = [3, 5]", "seeds = []", "grid.seeds=[]: "),
        ("seeds = [3, 5]", "seeds = [3, 3]", "grid.seeds=[3, 3] names a seed twice"),
        ("seeds = [3, 5]", "seeds = [3, 0.5]", "grid.seeds.1=0.5: Input should be a valid integer"),
        ("seeds = [3, 5]", "seeds = [3, -5]", "grid.seeds.1=-5: Input should be greater than or equal to 0"),
        ('name = "plain"', 'name = "a/b"', "grid.variants.0.name='a/b': "),
        ('name = "plain"', 'name = "ah"', "two cells are called ah_model-a"),
        ('name = "plain", ', "", "grid.variants.0.name is missing"),
        ('name = "grpo"', 'name = "grppo"', "variant plain: method.name=grppo is unknown; did you mean grpo?"),
        ("inner_updates", "inner_updats", "variant ah: unknown option learner.inner_updats=2; did you mean"),
        ("learner = {", "lerner = {", "variant ah: unknown option lerner={'inner_updates': 2}"),
        ("learner = { inner_updates = 2 }", "alpha = 2", "variant ah: alpha=2 is not a table"),
        ("learner = { inner_updates = 2 }", "run = { steps = 3 }", "variant ah: run.steps is the same for all cells"),
        ("learner = { inner_updates = 2 }", "run = { seed = 3 }", "run.seed is set by the grid"),
        ("[run]", '[run]\ndir = "x"', "run.dir is set by the grid; use --dir"),
        ("[actor]", '[model]\npath = "c"\n[actor]', "model.path is set by the grid; use grid.models"),
        ("learner = { inner_updates = 2 }", "run = 3", "variant ah: run=3 is not a table"),
        ("[scale.cpu.run]\nsteps = 2\n[scale.cpu.grid]\nmodels = []", "[scale]\ncpu = 2", "cpu=2 is not a table"),
        ("[run", "[run[", "is not valid TOML"),
        ("[grid]", "[gird]", "has no table [grid]; start a single run with launch/run.py"),
    ],
)
def test_a_bad_grid_gets_one_line(old: str, new: str, words: str, file: Path) -> None:
    assert old in TOML
    file.write_text(TOML.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        grid.cells(file, Path("x"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--run.stepps 3", "unknown option --run.stepps; did you mean --run.steps?"),
        ("--run.steps many", "run.steps='many': Input should be a valid integer"),
        ("--run.seed 4", "run.seed is set by the grid; use grid.seeds"),
        ("--run.dir=x", "run.dir is set by the grid; use --dir"),
        ("--run.resume", "run.resume is set by the grid; a grid always resumes"),
        ("--model.path c", "model.path is set by the grid; use grid.models"),
    ],
)
def test_a_bad_option_gets_one_line_that_blames_no_variant(options: str, words: str, file: Path) -> None:
    with pytest.raises(UserError) as caught:
        grid.cells(file, Path("x"), options=options.split())
    assert str(caught.value).startswith(words)


def test_an_option_that_makes_two_variants_the_same_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    variants = ", ".join(f'{{ name = "a{a}", method = {{ name = "ah-grpo", alpha = {a} }} }}' for a in (0.1, 0.2))
    path.write_text(f"[grid]\nseeds = [1]\nvariants = [{variants}]\n")
    assert len(grid.cells(path, Path("x"))) == 2
    with pytest.raises(UserError, match=r"a0\.1 and a0\.2 are the same run"):
        grid.cells(path, Path("x"), options=["--method.alpha", "0.3"])


def test_an_unknown_scale_and_no_file(file: Path) -> None:
    with pytest.raises(UserError, match=r"--scale gpu is not in .*some.toml; did you mean cpu\?"):
        grid.cells(file, Path("x"), scale="gpu")
    with pytest.raises(UserError, match=r"--config nowhere.toml: no such file"):
        grid.cells(Path("nowhere.toml"), Path("x"))


def methods(name: str, scale: str | None) -> list[tuple[str, float]]:
    """Method and alpha of the cells of the first seed and model of a grid of the repository."""
    cells = grid.cells(GRIDS / name, Path("x"), scale=scale)
    first = [c.config for c in cells if (c.config.run.seed, c.config.model.path) == _first(cells)]
    return [(config.method.name, config.method.alpha) for config in first]


def _first(cells: list[grid.Cell]) -> tuple[int, str]:
    return cells[0].config.run.seed, cells[0].config.model.path


@pytest.mark.parametrize("scale", [None, "cpu"])
def test_the_ready_made_grids_hold_the_papers_comparisons(scale: str | None) -> None:
    baseline, eq2 = ("sa-ah-grpo", 0.0), ("grpo", METHODS["grpo"].alpha)
    assert methods("main_comparison.toml", scale) == [baseline, ("ah-grpo", 0.5), ("sa-ah-grpo", 0.5), eq2]
    for method, more in (("ah-grpo", []), ("sa-ah-grpo", [1])):
        sweep = [(method, -0.25), baseline, *((method, alpha) for alpha in (0.1, 0.25, 0.5, *more))]
        assert methods(f"alpha_sweep_{method.replace('-grpo', '').replace('-', '_')}.toml", scale) == sweep
    assert [name for name, _ in methods("methods.toml", scale)] == list(METHODS)
    openings = {cell.config.method.opening_after for cell in grid.cells(GRIDS / "methods.toml", Path("x"), scale=scale)}
    tag = {f"{REASONING[0]}\n"} if scale is None else set()
    assert openings == {"", *tag}, "reft's openers come behind the tag that the format begins with; CPU: no tags"


@pytest.mark.parametrize(("scale", "shared"), [(None, 5 * 3), ("cpu", 4 * 3 + 1)])
def test_grids_in_one_folder_share_what_they_have_in_common(scale: str | None, shared: int) -> None:
    """Every seed of the baseline, of AH 0.5 and of SA-AH 0.5 (on the 1.5B model): equal names are equal runs.

    At the CPU scale, where their entropy is the same, so is one seed of Eq. 2's grpo.
    """
    names = [*OF_HORIZON, "methods"]
    grids = [{c.name: c.config for c in grid.cells(GRIDS / f"{name}.toml", Path("x"), scale=scale)} for name in names]
    in_two = {name for one, other in combinations(grids, 2) for name in one.keys() & other.keys()}
    assert len(in_two) == shared
    for name in in_two:
        one, *others = [each[name] for each in grids if name in each]
        assert all(other == one for other in others), name
    every = {name: config for each in grids for name, config in each.items()}
    assert len(set(map(repr, every.values()))) == len(every)


def test_the_ready_made_grids_are_the_papers_recipe() -> None:
    """But for what a grid is about: the method, the steps, and how often it saves and evaluates."""
    about = {"run": True, "method": True}
    expected = load([], CONFIGS / "paper_qwen2.5_1.5b.toml")
    for name in OF_HORIZON:
        config = grid.cells(GRIDS / f"{name}.toml", Path("x"))[0].config
        assert config.model_dump(exclude=about) == expected.model_dump(exclude=about), name
        assert config.run.prompts_per_step == expected.run.prompts_per_step
        assert config.method.entropy == expected.method.entropy == "topk-partial"


@pytest.mark.parametrize("scale", [None, "cpu"])
def test_the_ready_made_grids_ask_what_the_paper_leaves_open(scale: str | None) -> None:
    def first_seed(name: str) -> list[Method]:
        cells = grid.cells(GRIDS / f"{name}.toml", Path("x"), scale=scale)
        return [cell.config.method for cell in cells if cell.config.run.seed == 1]

    schedules = [(method.alpha, method.alpha_end) for method in first_seed("alpha_schedule")]
    assert schedules == [(0.0, "alpha"), (0.5, "alpha"), (0.5, 0.0), (0.0, 0.5)]
    estimates = [(method.entropy, method.entropy_topk) for method in first_seed("entropy_topk")]
    assert estimates[:2] == [("topk-partial", 50), ("topk-partial", 500)]
    assert [entropy for entropy, _ in estimates[2:]] == ["exact"]


@pytest.mark.parametrize(("name", "num"), [(name, 8 if name == "main_comparison" else 4) for name in OF_HORIZON])
def test_the_cpu_scale_has_paired_seeds_of_one_task(name: str, num: int) -> None:
    """All but method, seed and folder are equal, in float32: cells of different processors may be compared."""
    cells = grid.cells(GRIDS / f"{name}.toml", Path("x"), scale="cpu")
    assert len({cell.config.run.seed for cell in cells}) == num
    assert len({repr(cell.config.model_dump(exclude={"run": {"dir", "seed"}, "method": True})) for cell in cells}) == 1
    config = cells[0].config
    assert (config.model.dtype, config.task.example) == ("float32", False)


def test_some_seeds_of_a_grid(file: Path) -> None:
    cells = grid.cells(file, Path("x"), scale="cpu", seeds=[5])
    assert [cell.name for cell in cells] == ["plain_seed-5", "ah_seed-5"]
    with pytest.raises(UserError, match=r"--seeds 4 is not in grid.seeds=\[3, 5\]; name some of these"):
        grid.cells(file, Path("x"), seeds=[5, 4])
