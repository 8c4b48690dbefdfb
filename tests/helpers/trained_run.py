"""A run folder with a checkpoint whose adapter has moved, as a run on a tiny model leaves it, without a run."""

import json
from pathlib import Path

import local_run
import torch

from common.command_line import load
from common.config import dump
from launch.planning import model_folder
from learner import checkpoint
from learner.policy.policy import Policy

DEFAULT = Path(__file__).resolve().parents[2] / "launch" / "configs" / "default.toml"
STEP = 4


def policy(run: Path) -> Policy:
    """The learner's policy in float32, with the adapter of the run's checkpoint."""
    config = load(["--config", str(run / "config.toml")], DEFAULT)
    made = Policy(
        model_folder.resolve(config.model.path),
        config.model.model_copy(update={"dtype": "float32"}),
        device=torch.device("cpu"),
        recompute="none",
        head_backend="torch",
    )
    made.load(saved(run))
    return made


def saved(run: Path) -> Path:
    """The folder of the run's checkpoint."""
    return run / "checkpoints" / checkpoint.name(STEP)


def write(run: Path, model: Path, *options: str, strength: float = 0.05) -> Path:
    """Write the run folder; the entries of B have the standard deviation `strength`."""
    config = load([*local_run.options(model, run), *options], DEFAULT)
    run.mkdir(parents=True)
    (run / "config.toml").write_text(dump(config))
    made = Policy(model, config.model, device=torch.device("cpu"), recompute="none", head_backend="torch")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * strength)
    with checkpoint.written_whole(saved(run)) as whole:
        made.save(whole)
        checkpoint.save_state(whole, {"step": STEP, "entropy_bonus": 0.0, "optimizer": {"0.step": torch.tensor(1.0)}})
        (whole / "run_state.json").write_text(json.dumps({"step": STEP, "prompt_cursor": 8}))
    evaluations = [
        {"step": 0, "pass_at_1": 0.25, "num_problems": 8, "sets": {"math500": {"pass_at_1": 0.1, "num_problems": 50}}},
        {
            "step": STEP,
            "pass_at_1": 0.5,
            "num_problems": 8,
            "mean_at_4": 0.4,
            "mean_at_4_ci95": 0.125,
            "sets": {"math500": {"pass_at_1": 0.2, "num_problems": 50}},
        },
    ]
    metrics = [{"step": step, "reward/mean": float(step)} for step in range(1, 7)]
    for name, records in (("evaluations", evaluations), ("metrics", metrics)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run
