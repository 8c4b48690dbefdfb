"""Evaluation: greedy Pass@1 with its 95 % interval, and pass@k by sampling, on held-out problems.

As a command:  python launch/evaluate.py runs/x/checkpoints/step-000030 [--evaluation.num_samples 8 ...]
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the checkout, not from launch/, whose names shadow packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from actor.rollout import Sampling
from common.command_line import load
from common.config import Config
from common.files import usable
from common.metrics import mean
from common.types import Prompt, UserError
from launch.planning import plan
from launch.runtime import cluster, workers
from launch.runtime.channel import AdapterMismatch
from launch.runtime.fleet import Fleet
from launch.runtime.recovery import RunFailed
from learner import checkpoint


def interval(p: float, n: int) -> float:
    """Half-width of the 95 % interval of a fraction p of n: 1.96 sqrt(p (1 - p) / n) (arXiv 2606.05434, 4.4)."""
    return 1.96 * math.sqrt(p * (1 - p) / n)


def evaluate(fleet: Fleet, prompts: Sequence[Prompt], config: Config, *, step: int) -> dict[str, Any]:
    """Evaluate the adapter that the fleet holds; returns the record, one line of evaluations.jsonl.

    A problem whose reward fails counts as incorrect for Pass@1; the mean reward is over the others.
    """
    started = time.perf_counter()
    prompts = [replace(prompt, index=index) for index, prompt in enumerate(prompts)]  # sampling seeds derive from it
    sampled = replace(Sampling.of(config), fixed_length=False, opening=None)
    greedy = replace(sampled, group_size=1, temperature=0.0)
    groups = fleet.sample(prompts, greedy, work="evaluate")
    firsts = [group.rollouts[0] for group in groups]
    pass_at_1 = mean(float(r.score is not None and r.score.correct) for r in firsts)
    record = {
        "step": step,
        "pass_at_1": pass_at_1,
        "ci95": interval(pass_at_1, len(prompts)),
        "num_problems": len(prompts),
        "reward_mean": mean(r.score.total for r in firsts if r.score is not None),
        "length_mean": mean(r.num_completion_tokens for r in firsts),
        "num_failed_rewards": sum(r.score is None for r in firsts),
    }
    if config.evaluation.num_samples:
        k = config.evaluation.num_samples
        several = fleet.sample(prompts, replace(sampled, group_size=k), work="evaluate")
        record |= {
            "k": k,
            "pass_at_k": mean(float(any(r.score and r.score.correct for r in g.rollouts)) for g in several),
        }
    return record | {"seconds": time.perf_counter() - started}


def main(argv: Sequence[str]) -> int:
    """Evaluate a checkpoint with its run's configuration and the given options; prints the record as its last line."""
    try:
        if not argv or argv[0].startswith("-"):
            raise UserError("name a checkpoint: python launch/evaluate.py runs/x/checkpoints/step-000030 [OPTIONS]")
        saved = usable(Path(argv[0]))
        written = saved.parent.parent / "config.toml"
        if not (saved / "adapter_model.safetensors").is_file() or not written.is_file():
            raise UserError(
                f"{saved} is not a checkpoint in a run folder; name one, such as RUN/checkpoints/step-000030"
            )
        checkpoint.check(saved)
        checked = plan.make(load(["--config", str(written), *argv[1:]], written), saved=saved)
        with cluster.connect(), workers.start(checked) as started:
            record = evaluate(started.fleet, checked.eval_prompts, started.plan.config, step=started.version)
        print(json.dumps(record))
    except UserError as error:
        print(getattr(error, "cause", error), file=sys.stderr)  # `cause`: a worker's, to which Ray adds a traceback
        return 2
    except (RunFailed, AdapterMismatch) as error:
        print(f"evaluation failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
