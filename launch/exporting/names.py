"""What an export calls the base model and the data: hub names, and no path of this machine."""

from pathlib import Path

from common.config import Config, value_of, with_values
from launch.planning.model_folder import SMOLLM2

SMOLLM2_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDERS = ("model.path", "task.data")  # options that are a hub name or a path of this machine


def is_local(config: Config, option: str) -> bool:
    """Whether the option's value is a path of this machine rather than a hub name."""
    return _is_path(value_of(config, option))


def _is_path(value: str | None) -> bool:
    return value is not None and value != "" and (Path(value).is_absolute() or Path(value).exists())


def shared(config: Config) -> Config:
    """The configuration as an export contains it: of local files only their names, and another run.dir."""
    named = {option: _name(value_of(config, option)) for option in FOLDERS if is_local(config, option)}
    sets = tuple(f"{name}:{_name(data)}" for name, _, data in (each.partition(":") for each in config.evaluation.sets))
    return with_values(config, named | {"evaluation.sets": sets, "run.dir": Path("runs/again"), "run.resume": False})


def _name(value: str) -> str:
    return Path(value).resolve().name if _is_path(value) else value


def base_name(config: Config) -> str:
    """The base model's hub name, or the name of its folder."""
    name = shared(config).model.path
    return SMOLLM2_ON_THE_HUB if name == SMOLLM2 else name


def hub_base(config: Config) -> str | None:
    """The base model's hub name; None for a local folder."""
    return None if is_local(config, "model.path") else base_name(config)


def hub_data(config: Config) -> str | None:
    """The hub name of the task's data; None for local files and for problems that a task generates."""
    return None if is_local(config, "task.data") else config.task.data
