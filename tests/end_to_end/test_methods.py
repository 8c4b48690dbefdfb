"""Five steps of every method and of three combinations, with vLLM, SmolLM2, Ray and the loop: all finite, each with
its own signal.

One vLLM serves them all. Each has a new learner in this process, and starts from the unadapted model.
"""

import math
from dataclasses import replace

import pytest
import torch

from actor.rollout import Sampling
from common.command_line import load
from common.config import MethodConfig
from common.methods import METHODS
from common.metrics import read_lines
from launch.loop import train
from launch.planning import plan
from launch.planning.prompts import PromptStream
from launch.recording.console import Display
from launch.recording.recorder import Recorder
from launch.runtime import cluster, workers
from launch.runtime.buffer import Buffer
from launch.runtime.crew import Crew
from launch.runtime.recovery import Losses
from learner.learner import Learner
from learner.selection import drop_reason

pytestmark = pytest.mark.long

STEPS = 5
OPTIONS = [
    *("--run.steps", str(STEPS), "--run.prompts_per_step", "2", "--actor.max_tokens", "24", "--task.num_eval", "1"),
    *("--learner.learning_rate", "1e-3"),  # large enough for the policy to leave the reference in five steps
]
COMBINATIONS = {
    "reft with sa-ah": {"name": "sa-ah-grpo", "opening": "reft"},
    "reft after the tag": {"name": "reft", "opening_after": "<start_working_out>\n"},
    "asym with horizon": {
        "name": "sa-ah-grpo",
        "selective": False,
        "advantage": "asymmetric",
        "beta_pos": 0.9,
        "beta_neg": 0.4,
    },
    "holder with arca": {"name": "holder", "token_weight": "residual"},
}
SIGNALS = {  # what distinguishes the method's metrics from those of plain GRPO
    "grpo": lambda m: all(x == 1 for x in m["weight/mean"]),
    "ah-grpo": lambda m: max(m["weight/mean"]) < 1,
    "sa-ah-grpo": lambda m: min(m["weight/mean"]) < 1 and max(m["weight/negative_mean"]) < 1,
    "asym-grpo": lambda m: not math.isclose(-sum(m["advantage/negative_mean"]), sum(m["advantage/positive_mean"])),
    "erpo": lambda m: (
        m["advantage/spread_within_rollouts"][0] < 1e-4 < 1e-2 < m["advantage/spread_within_rollouts"][-1]
    ),
    "arca": lambda m: m["weight/gini"][0] < 1e-4 and m["weight/gini"][-1] > 0.1,
    "reft": lambda m: all(x == 4 for x in m["completion/distinct_openers"]),
    "holder": lambda m: m["ratio/power"] == [2, 1, 0, -1, -2],
    "dr-grpo": lambda m: "kl/mean" not in m and max(m["advantage/positive_mean"]) > 1.8,  # sqrt(3) with the std
    "dapo": lambda m: "kl/mean" not in m and sum(m["groups/discarded"]) > 0,
    "gspo": lambda m: max(m["ratio/outside_fraction"]) > 0,
    "cispo": lambda m: "kl/mean" not in m,
    "entropy-mask": lambda m: all(0.19 < x < 0.27 for x in m["weight/mean"]),
    "rloo": lambda m: max(m["advantage/positive_mean"]) > 1.8,
    "reft with sa-ah": lambda m: SIGNALS["reft"](m) and SIGNALS["sa-ah-grpo"](m),
    "reft after the tag": lambda m: SIGNALS["reft"](m) and min(m["completion/length_mean"]) >= 10,  # 8 are the tag's
    "asym with horizon": lambda m: SIGNALS["asym-grpo"](m) and SIGNALS["ah-grpo"](m),
    "holder with arca": lambda m: SIGNALS["holder"](m) and SIGNALS["arca"](m),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A plan, and the actor and channel of a run that all methods use one after the other."""
    checked = plan.make(
        load([*OPTIONS, "--run.dir", str(tmp_path_factory.mktemp("methods") / "run")], cluster.DEFAULT_CONFIG)
    )
    with cluster.connect(), workers.start(checked) as started:
        yield checked, started


class InProcess(Crew):
    """A crew of one learner in this process."""

    def __init__(self, learner):
        super().__init__([], Losses())
        self.learner = learner

    def update(self, groups):
        return self.learner.update(groups)

    def adapter(self, canary):
        return self.learner.adapter(canary), []

    def commit(self, run_files=None, **position):
        self._state, self.position = {**self.learner.files(), **(run_files or {})}, position


def metrics(folder) -> dict[str, list[float]]:
    """The values of each metric over the steps that have it."""
    lines = list(read_lines(folder / "metrics.jsonl"))
    return {key: [line[key] for line in lines if key in line] for line in lines for key in line}


@pytest.mark.parametrize("name", [*METHODS, *COMBINATIONS])
def test_five_steps(running, tmp_path, name):
    checked, started = running
    several = {"mini_batches": 4} if "holder" in name or name == "gspo" else {}
    config = checked.config.model_copy(
        update={
            "run": checked.config.run.model_copy(update={"dir": tmp_path, "evaluate_every": 0, "sample_every": 0}),
            "method": MethodConfig(**COMBINATIONS.get(name, {"name": name}), importance="none"),
            "learner": checked.config.learner.model_copy(update=several),
        }
    )
    method = config.method
    learner = InProcess(Learner(checked.model_folder, config, checked.canary_token_ids))
    started.channel.publish(learner)
    recorder = Recorder(tmp_path, checked.tokenizer, Display(name, steps=STEPS), config)
    buffer = Buffer(
        started.fleet,
        PromptStream(checked.prompts.train, seed=3),
        Sampling.of(config),
        prompts_per_step=2,
        num_steps=STEPS,
        drop_reason=lambda group: drop_reason(group, method=method, rewards={}),
        refill_rounds=method.refill_rounds,
    )
    train(config, replace(started, learner=learner), buffer, recorder, eval_prompts={}, first_step=0)
    recorder.close()
    got = metrics(tmp_path)
    assert len(got["step"]) == STEPS
    assert max(got["update/skipped"]) == 0
    learned = got["loss/total"]
    assert learned and all(map(math.isfinite, learned)) and all(map(math.isfinite, got["gradient/norm"]))
    assert all(x < 0.1 for x in got["actor_learner_kl"]), "actor and learner hold the same policy"
    assert SIGNALS[name](got), {key: values for key, values in got.items() if "time" not in key}
    assert all(torch.isfinite(p).all() for p in learner.learner.policy.parameters())
