"""Options of evaluations that cannot work together are one line, before anything starts."""

import pytest

from common.command_line import load
from common.types import UserError
from launch.runtime.cluster import DEFAULT_CONFIG


def config(*argv: str):
    return load([f"--{each}" for each in argv], DEFAULT_CONFIG)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluation.sets=math500"], r"math500 is not NAME:DATA; name a set and its data, such as math500:FOLDER$"),
        (["evaluation.sets=task:x"], "task:x is not NAME:DATA"),  # the records call the task's own problems so
        (["evaluation.sets=a/b:x"], "a/b:x is not NAME:DATA"),
        (["evaluation.sets=svamp:x,svamp:y"], "has svamp 2 times"),
        (["evaluation.pass_at=4"], r"pass_at=4 exceeds evaluation.num_samples=0"),
        (["evaluation.pass_at=1", "evaluation.num_samples=8"], "greater than or equal to 2"),
        (["run.patience=3"], r"run.patience=3 needs .*; set evaluation.best=pass_at_1$"),
        (["evaluation.best=pass_at_1", "run.evaluate_every=0"], "needs evaluations; set run.evaluate_every"),
        (["evaluation.best=pass_at_2"], "no number of an evaluation; did you mean pass_at_1"),
        (["evaluation.best=pass_at_8", "evaluation.num_samples=4"], r"did you mean pass_at_\d"),
        (["evaluation.best=math500/pass_at_1"], "no number of an evaluation"),
        (["evaluation.best=x/pass_at_1", "evaluation.sets=svamp:x"], "x/pass_at_1 is no number of an evaluation"),
        (["run.keep_checkpoints=0"], "greater than or equal to 1"),
        (["evaluation.num_problems=65"], "evaluation.num_problems=65 exceeds task.num_eval=64"),
    ],
)
def test_a_contradiction_is_one_line(argv, message):
    with pytest.raises(UserError, match=message) as raised:
        config(*argv)
    assert "\n" not in str(raised.value)


def test_what_works_together():
    made = config("evaluation.sets=gsm8k:a,math500:b:c", "evaluation.num_samples=8", "evaluation.num_problems=200")
    assert made.evaluation.sets == ("gsm8k:a", "math500:b:c")
    for metric in ("pass_at_1", "reward_mean", "mean_at_8", "pass_at_2", "gsm8k/pass_at_8", "math500/mean_at_8"):
        assert config("evaluation.sets=gsm8k:a,math500:b", "evaluation.num_samples=8", f"evaluation.best={metric}")
