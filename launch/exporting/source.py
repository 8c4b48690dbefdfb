"""What is exported: a checkpoint, the configuration of its run, and the base model that its adapter belongs to.

All of it may come from a stranger: nothing in it is run, and no link in it is followed to another folder.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.adapter import LORA_A, LORA_B, PEFT_PREFIX, scale
from common.command_line import load
from common.config import Config
from common.files import WEIGHTS, run_of, usable
from common.metrics import is_count
from common.types import UserError
from launch.planning import model_folder, plan
from learner import checkpoint
from learner.policy import base as base_model


class Factors(NamedTuple):
    """The two factors of one module's update, float32, on the CPU."""

    a_RI: Tensor
    b_OR: Tensor


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that has been checked against its run and its base model."""

    checkpoint: Path
    step: int
    run: Path  # the run folder
    config: Config
    base: Path  # the base model's folder
    num_base_parameters: int
    factors: dict[str, Factors]  # by the name of the module in the base model

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return scale(self.config.model.lora_rank, self.config.model.lora_alpha, self.config.model.lora_variant)

    @property
    def targets(self) -> list[str]:
        """The last parts of the modules' names, as PEFT names its target modules."""
        return sorted({module.rsplit(".", 1)[-1] for module in self.factors})


def read(saved: Path) -> Source:
    """The checkpoint in the folder `saved` of a run folder. Raises UserError, in one line, for anything else."""
    run = run_of(saved)
    checkpoint.check(saved)
    config = load(["--config", str(run / "config.toml")], run / "config.toml")
    base = model_folder.resolve(config.model.path)
    model = plan.check_model(config, base)
    try:
        step = checkpoint.read_object(saved / checkpoint.NUMBERS).get("step")
        if not is_count(step):
            raise ValueError(f"{checkpoint.NUMBERS} has no step")
        factors = _factors(checkpoint.load_tensors(saved / WEIGHTS), _shapes(model, config))
    except (OSError, ValueError) as error:
        raise UserError(f"{saved} cannot be exported: {error}; use another checkpoint") from None
    return Source(
        checkpoint=saved,
        step=step,
        run=run,
        config=config,
        base=base,
        num_base_parameters=sum(parameter.numel() for parameter in model.parameters()),
        factors=factors,
    )


def base_file(folder: Path, name: str) -> Path | None:
    """A file of the base model; None if it has none of this name.

    Raises UserError for a link to anything but the hub cache's own files (snapshots/REVISION/NAME leads to blobs/HASH):
    the export would otherwise publish any file of this machine that a stranger's model folder links to.
    """
    path = usable(folder / name)
    real = path.resolve()
    if path.is_symlink() and real.parent not in (folder.resolve(), folder.resolve().parent.parent / "blobs"):
        raise UserError(f"{path} is a symbolic link to another folder; put the file itself in its place")
    return path if path.is_file() else None


def base_object(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of the base model; None if it has none of this name. Raises UserError."""
    path = base_file(folder, name)
    if path is None:
        return None
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); use another model") from None
    return value


def _shapes(model: PreTrainedModel, config: Config) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each module that the adapter adapts."""
    targets = base_model.targets(model, config.model)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in targets
    }


def _factors(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]]) -> dict[str, Factors]:
    names = {f"{PEFT_PREFIX}{module}{suffix}" for module in shapes for suffix in (LORA_A, LORA_B)}
    if other := sorted(names ^ tensors.keys()):
        raise ValueError(f"{WEIGHTS} {'lacks' if other[0] in names else 'has a tensor too many,'} {other[0]}")
    factors = {}
    for module, (outputs, inputs) in shapes.items():
        a_RI, b_OR = (tensors[f"{PEFT_PREFIX}{module}{suffix}"].float() for suffix in (LORA_A, LORA_B))
        if a_RI.ndim != 2 or a_RI.shape[1] != inputs or b_OR.shape != (outputs, a_RI.shape[0]):
            raise ValueError(f"{WEIGHTS}: the factors of {module} do not fit its weight of {outputs} x {inputs}")
        if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
            raise ValueError(f"{WEIGHTS}: the factors of {module} are not finite")
        factors[module] = Factors(a_RI, b_OR)
    return factors
