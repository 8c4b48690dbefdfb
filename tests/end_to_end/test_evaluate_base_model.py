"""launch/evaluate.py on a base model with the real vLLM and Ray: two sets, graded by two tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_model import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from actor.rollout import prompt_tokens
from actor.tasks.sets import load_sets
from common.config import Config, EvaluationConfig
from common.metrics import read_lines

ROOT = Path(__file__).resolve().parents[2]
MAX_TOKENS = 8


@pytest.mark.slow
def test_a_base_model_is_evaluated_as_it_is(tmp_path):
    """Its adapter of zeros changes nothing: the texts are those of transformers' own greedy decoding."""
    save_model(tmp_path / "model")
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"1 + {i}?", "answer": f"so #### {i + 1}"} for i in (1, 2)]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"problem": f"Simplify $\\frac{{{i}}}{{4}}$.", "answer": f"\\frac{{{i}}}{{4}}"} for i in (1, 3)]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = (f"gsm8k:{tmp_path / 'gsm8k'}", f"math500:{tmp_path / 'math.jsonl'}")
    command = [
        *(sys.executable, "launch/evaluate.py", str(tmp_path / "model"), "--sets", *sets),
        *("--out", str(tmp_path / "out.jsonl"), "--model.dtype", "float32", "--actor.max_tokens", str(MAX_TOKENS)),
        *("--evaluation.num_samples", "2", "--task.example", "false", "--task.num_train", "4", "--task.num_eval", "4"),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["step"] == 0
    for name in ("gsm8k", "math500"):
        numbers = record["sets"][name]
        assert (numbers["num_problems"], numbers["num_failed_rewards"], numbers["k"]) == (2, 0, 2)
        assert numbers["num_truncated"] == 2  # random weights never end
    problems = read_lines(tmp_path / "out.jsonl")
    assert [each["set"] for each in problems] == ["gsm8k"] * 2 + ["math500"] * 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    loaded = load_sets(Config(evaluation=EvaluationConfig(sets=sets)))
    for each, prompt in zip(problems, [*loaded["gsm8k"], *loaded["math500"]], strict=True):
        ids = torch.tensor([prompt_tokens(tokenizer, prompt)])
        with torch.no_grad():
            out = model.generate(ids, do_sample=False, max_new_tokens=MAX_TOKENS)
        assert each["text"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
