"""A run with the real vLLM and Ray whose reward is composed, one of its rewards from a judge behind HTTP."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import judges
import pytest
from small_model import save_model

from common.metrics import read_lines
from launch import run

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

WEIGHTS = {"words": 0.5, "judges.length": -2.0, "judges.rank": 0.0, "judges.judge": 3.0, "correct": 1.0}
STEPS, PROMPTS, GROUP = 2, 2, 4


class Judge(BaseHTTPRequestHandler):
    """Gives the fraction of letters in a completion."""

    asked = 0

    def do_POST(self) -> None:
        Judge.asked += 1
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["completion"]
        body = json.dumps({"score": sum(map(str.isalpha, text)) / max(1, len(text))}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_run_with_composed_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = [str(Path(judges.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))  # of the workers
    monkeypatch.setenv("RAY_ADDRESS", "local")
    folder = tmp_path / "run"
    options = [
        *("--model.path", str(tmp_path / "model"), "--model.dtype", "float32", "--task.name", "judges"),
        *("--task.data", f"http://127.0.0.1:{server.server_port}", "--task.rewards", json.dumps(WEIGHTS)),
        *("--task.num_train", "8", "--task.num_eval", "3", "--run.steps", str(STEPS), "--run.dir", str(folder)),
        *("--run.prompts_per_step", str(PROMPTS), "--actor.group_size", str(GROUP), "--actor.max_tokens", "12"),
        *("--run.evaluate_every", "1", "--method.decoupled_rewards", "true", "--method.normaliser", "step"),
    ]
    assert run.main(options) == 0
    server.shutdown()
    server.server_close()

    assert Judge.asked == STEPS * PROMPTS * GROUP, "evaluations ask no judge"
    rollouts = read_lines(folder / "rollouts.jsonl")
    assert len(rollouts) == STEPS * PROMPTS * GROUP
    for rollout in rollouts:
        text, parts = rollout["text"], rollout["parts"]
        assert list(parts) == list(WEIGHTS)
        assert parts["judges.judge"] == sum(map(str.isalpha, text)) / max(1, len(text))
        assert (parts["words"], parts["judges.length"]) == (len(text.split()), len(text) / 10)
        assert rollout["reward"] == pytest.approx(sum(WEIGHTS[name] * value for name, value in parts.items()))
    for step, metrics in enumerate(read_lines(folder / "metrics.jsonl"), start=1):
        own = [rollout for rollout in rollouts if rollout["step"] == step]
        means = {name: sum(rollout["parts"][name] for rollout in own) / len(own) for name in WEIGHTS}
        assert {name: metrics[f"reward/parts/{name}"] for name in WEIGHTS} == pytest.approx(means)
        assert metrics["reward/mean"] == pytest.approx(sum(WEIGHTS[name] * mean for name, mean in means.items()))
        advantages = [rollout["advantage"] for rollout in own]
        assert sum(advantages) == pytest.approx(0, abs=1e-6)
        assert sum(a * a for a in advantages) / len(own) == pytest.approx(1, abs=1e-4), "standardised over the step"
    evaluations = read_lines(folder / "evaluations.jsonl")
    assert [each["num_failed_rewards"] for each in evaluations] == [0] * (STEPS + 1)
