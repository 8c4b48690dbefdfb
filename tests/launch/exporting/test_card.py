"""The model card: what the hub reads of it, its numbers, and nothing of this machine or of a stranger in it."""

import json
import re
import shutil
from pathlib import Path

import local_run
import pytest
import trained_run
from huggingface_hub import ModelCard
from stranger import rewrite

from common.command_line import load
from common.config import dump
from launch.exporting import card, comparison, merge, names, source
from launch.exporting.card import Merge
from launch.planning import model_folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    return trained_run.write(folder / "run", local_run.save_model(folder / "tiny"))


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


def rendered(run: Path, merged: Merge | None = None, name: str = "ada/tiny-rl") -> str:
    return card.render(source.read(trained_run.saved(run)), name, merged)


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_hub_reads_its_front_matter(run):
    data = ModelCard(rendered(run)).data
    assert (data.library_name, data.pipeline_tag, data.base_model, data.license) == (
        "peft",
        "text-generation",
        None,
        None,
    )
    assert data.tags == ["reinforcement-learning", "lora", "horizon", "sa-ah-grpo"]
    assert data.model_name == "tiny-rl"
    first, second, third = data.eval_results
    assert (first.dataset_name, first.metric_value) == ("gym (8 problems)", 0.5)
    assert first.metric_name == "greedy Pass@1 (95 % interval 0.215 to 0.785)"  # Wilson's of 4 of 8
    assert (second.metric_name, second.metric_value) == ("mean@4 (95 % interval 0.275 to 0.525)", 0.4)
    assert (third.dataset_type, third.metric_value) == ("math500", 0.2)


def test_results_stand_beside_those_before_training(run):
    """Wilson's interval of 2 of 8 is [.071, .591], of 5 of 50 [.043, .214], of 10 of 50 [.112, .330]."""
    rows = [line for line in section(rendered(run), "Results").splitlines() if line.startswith("| `")]
    assert rows == [
        "| `task` | 8 | greedy Pass@1 | 0.250 [0.071, 0.591] | 0.500 [0.215, 0.785] |",
        "| `task` | 8 | mean@4 | - | 0.400 [0.275, 0.525] |",
        "| `math500` | 50 | greedy Pass@1 | 0.100 [0.043, 0.214] | 0.200 [0.112, 0.330] |",
    ]


def test_the_reward_is_that_up_to_the_checkpoint(run):
    """The run has rewards 1 .. 6, the checkpoint is of step 4: the first and the last half of these are 1.5 and 3.5."""
    assert "Mean training reward: 1.50 in the first steps, 3.50 in the last ones." in rendered(run)


def test_a_step_without_evaluation_says_so(run):
    (run / "evaluations.jsonl").write_text('{"step": 0, "pass_at_1": 0.25, "num_problems": 8}\n')
    text = rendered(run)
    assert "This checkpoint was not evaluated in its run." in text
    assert ModelCard(text).data.eval_results is None


def test_method_and_settings(run):
    text = rendered(run)
    method = section(text, "Method")
    assert "[arXiv 2606.05434](https://arxiv.org/abs/2606.05434), equation 3-5, 7-9" in method
    assert "selective `True`" in method and "clip_low" not in method
    assert "| model.lora_rank | `2` |" in section(text, "Settings")


def test_how_to_load_an_adapter_and_a_merged_model(run):
    adapter = section(rendered(run), "Use")
    assert 'PeftModel.from_pretrained(base, "ada/tiny-rl")' in adapter
    assert "vllm serve tiny --enable-lora --max-lora-rank 8 --lora-modules adapter=ada/tiny-rl" in adapter
    merged = Merge(
        dtype="bfloat16",
        retained=merge.Retained(kept=0.8, whole=1.0, wrong=0.04, shares={"a.q_proj": 0.7}),
        comparison=comparison.Comparison(num_prompts=8, num_tokens=99, difference=0.01, effect=0.2),
    )
    text = rendered(run, merged)
    assert ModelCard(text).data.library_name == "transformers"
    assert "vllm serve ada/tiny-rl\n" in section(text, "Use") and "peft" not in section(text, "Use")
    assert "80.0% of the update retained (least of all modules 70.0%, a.q_proj)" in section(text, "Merge")
    assert "relative error of the update 20.0%" in section(text, "Merge")
    assert "Merge" not in rendered(run)


def test_no_path_of_this_machine_is_in_an_export(run, tmp_path, trained):
    data = str(tmp_path / "secret-project" / "data")
    rewrite(run, task={"name": "gsm8k", "data": data})
    rewrite(run, evaluation={"sets": [f"math500:{data}", "aime24:HuggingFaceH4/aime_2024"]})
    config = load(["--config", str(run / "config.toml")], trained_run.DEFAULT)
    shared = names.shared(config)
    assert (shared.model.path, shared.task.data, str(shared.run.dir)) == ("tiny", "data", "runs/again")
    assert shared.evaluation.sets == ("math500:data", "aime24:HuggingFaceH4/aime_2024")
    text = rendered(run)
    assert "secret-project" not in dump(shared) + text and str(trained.parent) not in text
    assert "--run.dir runs/again --model.path FOLDER --task.data FOLDER" in section(text, "Reproduce")
    assert ModelCard(text).data.datasets is None


def test_hub_names_stay(run):
    config = load(
        ["--task.name", "gsm8k", "--task.data", "openai/gsm8k", "--model.path", "Qwen/Qwen2.5-3B"], trained_run.DEFAULT
    )
    assert names.hub_base(config) == names.base_name(config) == "Qwen/Qwen2.5-3B"
    assert names.hub_data(config) == "openai/gsm8k"
    embedded = load(["--model.path", model_folder.SMOLLM2], trained_run.DEFAULT)
    assert names.hub_base(embedded) == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_what_a_stranger_wrote_stays_code(run):
    """Neither Markdown nor HTML, nor another line of a command, comes of a setting."""
    evil = "x`\n```\n# owned <img src=x> | y\n---\n"
    folder = run.parent / "a'; rm <img> #\n```"
    shutil.copytree(Path(load(["--config", str(run / "config.toml")], trained_run.DEFAULT).model.path), folder)
    rewrite(run, task={"gym": evil, "name": "gym"}, model={"path": str(folder)})
    text = rendered(run)
    assert not re.search(r"^# owned|^<img", text, re.MULTILINE)
    assert text.count("\n```") == 6  # three blocks
    for line in re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines():
        outside = re.sub(r"`[^`]*`", "", line)
        assert "<img" not in outside and "owned" not in outside, line
    [serve] = [line for line in text.splitlines() if line.startswith("vllm serve")]
    assert serve.startswith("vllm serve 'a'\"'\"'; rm <img> #\\n```' --enable-lora")
    assert len(ModelCard(text).data.eval_results) == 3


def test_a_damaged_record_is_no_result(run):
    strange = {"step": 4, "pass_at_1": 0.5, "num_problems": 8, "mean_at_4": "x", "mean_at_4_ci95": 0.1}
    strange |= {"<img>": 0.1, "<img>_ci95": 0.1}
    sets = {"a": 3, "b": {"pass_at_1": 2.0, "num_problems": 5}, "c": {"num_problems": 5}, "d": {"pass_at_1": 0.5}}
    (run / "evaluations.jsonl").write_text(json.dumps(strange | {"sets": sets}) + "\n")
    found = card.results(card.runs.read(run), 4)
    assert [(result.problems, result.metric) for result in found] == [("task", "greedy Pass@1")]
