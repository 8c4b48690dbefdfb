"""The table of methods, and what the configuration's section takes over from it."""

from pathlib import Path

import pytest

from common.command_line import load
from common.config import dump
from common.methods import METHODS, MethodConfig, parameters, table
from common.types import UserError
from launch.planning.plan import warnings, with_importance


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.toml"
    path.write_text("")
    return path


@pytest.mark.parametrize("name", METHODS)
def test_a_section_has_every_field_of_its_method_and_each_can_be_changed(name: str) -> None:
    section, method = MethodConfig(name=name), METHODS[name]
    assert section.name == method.name == name
    assert all(getattr(section, field) == getattr(method, field) for field in parameters())
    changed = MethodConfig(name=name, alpha=-2.0, normaliser="step", reward_threshold=0.5)
    assert (changed.alpha, changed.normaliser, changed.reward_threshold) == (-2.0, "step", 0.5)
    assert all(
        getattr(changed, field) == getattr(method, field)
        for field in parameters().keys() - {"alpha", "normaliser", "reward_threshold"}
    )


def test_a_dumped_configuration_keeps_its_meaning_when_the_methods_change(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(["--method.name", "dapo", "--method.alpha", "0.3"], empty)
    path = tmp_path / "config.toml"
    path.write_text(dump(config))
    changed = METHODS["dapo"].model_copy(update={"clip_high": 9.0, "token_weight": "residual"})
    monkeypatch.setattr("common.methods.METHODS", {"dapo": changed})
    assert MethodConfig(name="dapo").clip_high == 9.0
    assert load([], path) == config
    monkeypatch.setattr("common.methods.METHODS", {})
    assert load([], path) == config


def test_the_name_alone_of_a_dumped_method_cannot_be_changed(empty: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(dump(load([], empty)))
    with pytest.raises(
        UserError, match=r"method\.name=grpo would rename sa-ah-grpo, all of whose fields the file sets"
    ):
        load(["--method.name", "grpo"], path)
    assert load(["--method.name", "sa-ah-grpo", "--method.alpha", "0.3"], path).method.alpha == 0.3


def test_the_readme_holds_the_table_of_methods() -> None:
    readme = (Path(__file__).resolve().parents[2] / "learner" / "README.md").read_text()
    assert table() in readme, "paste the output of `python launch/run.py --methods` into learner/README.md"


def test_every_method_has_a_source_and_every_field_a_description() -> None:
    for name, method in METHODS.items():
        assert method.paper.startswith("arXiv "), name
        assert method.equation, name
    assert all(meaning for _, meaning in parameters().values())
    assert set(parameters()) == set(MethodConfig.model_fields) - {"name"}


def test_stale_rollouts_get_importance_weights_unless_the_option_is_set(empty: Path, tmp_path, monkeypatch) -> None:
    def importance(*options: str) -> str:
        return with_importance(load(["--run.max_staleness", "1", *options], empty)).method.importance

    assert with_importance(load([], empty)).method.importance == "none"
    assert importance() == "token-truncate"
    assert importance("--method.importance", "sequence-mask") == "sequence-mask"
    assert importance("--method.importance", "none") == "none"
    source = "from common.methods import Method\nMETHOD = Method(paper='p', equation='e', importance='sequence-mask')\n"
    (tmp_path / "stale_method.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert importance("--method.name", "stale_method") == "sequence-mask"
    [warning] = warnings(load(["--run.max_staleness", "1", "--method.importance", "none"], empty))
    assert "nothing corrects for it" in warning


def test_warnings_name_what_has_no_effect(empty: Path) -> None:
    assert warnings(load(["--method.name", "grpo"], empty)) == []
    for name in ("holder", "gspo", "cispo"):
        [one] = warnings(load(["--method.name", name], empty))
        assert "is 1 with one update a step" in one
        for several in ("inner_updates", "mini_batches"):
            assert warnings(load(["--method.name", name, f"--learner.{several}", "2"], empty)) == []
    [one] = warnings(load(["--method.name", "grpo", "--method.kl", "none"], empty))
    assert "beta=0.04 has no effect with kl=none" in one
    [one] = warnings(load(["--method.name", "grpo", "--method.alpha_end", "1"], empty))
    assert "alpha_end=1.0 has no effect with token_weight=uniform" in one
    several = ["--learner.mini_batches", "4", "--learner.num_ranks", "2", "--learner.gradient_accumulation", "2"]
    [one] = warnings(load(several, empty))
    assert "mini_batches=4 of run.prompts_per_step=4 may have fewer micro-batches than learner.num_ranks=2" in one
    [one] = warnings(load(["--method.name", "arca"], empty))
    assert "lora_dropout=0.05 is off" in one
