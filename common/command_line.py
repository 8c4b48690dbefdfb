"""From a command line and a TOML file to a configuration; whatever is wrong with them is one line."""

import argparse
import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pydantic_settings
from pydantic import ValidationError

from common.config import GONE, Config, suggest
from common.types import UserError


def load(argv: Sequence[str], default: Path) -> Config:
    """The configuration of a command line: options win over `--config FILE`, which wins over the defaults.

    Without --config the file `default` is read. Raises UserError for anything wrong, in one line.
    """
    parser = _Parser(add_help=False)
    parser.add_argument("--config", type=Path, default=default)
    chosen, options = parser.parse_known_args(list(argv))
    if not chosen.config.is_file():
        raise UserError(f"--config {chosen.config} is no file; name a TOML file, such as launch/configs/default.toml")

    class Loaded(Config):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: Any, init_settings: Any, *_: Any, **__: Any
        ) -> tuple[Any, ...]:
            command_line: Any = pydantic_settings.CliSettingsSource(
                settings_cls,
                root_parser=_Parser(),
                cli_parse_args=options,
                cli_parse_none_str="null",
                cli_avoid_json=True,  # in the help; it is still understood
                cli_implicit_flags=True,
            )
            return command_line, pydantic_settings.TomlConfigSettingsSource(settings_cls, toml_file=chosen.config)

    try:
        return Config.model_construct(**dict(Loaded()))
    except ValidationError as error:
        raise UserError("; ".join(_explain(e) for e in error.errors())) from None
    except pydantic_settings.SettingsError as error:
        raise UserError(f"{str(error).strip().splitlines()[0]}; see --help for the options") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--config {chosen.config} is not valid TOML: {error}") from None


def _explain(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        if where in GONE:
            return f"{where}={error['input']!r} is no option any more: {GONE[where]}"
        return f"{where}={error['input']!r} is no option{suggest(where, option_names())}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{where}={error['input']!r}: {error['msg']}"


class _Parser(argparse.ArgumentParser):
    """The command line, with the help of `--help`; its errors are UserErrors."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            usage="launch/run.py [--config FILE.toml] [--dry-run] [--SECTION.KEY VALUE ...]",
            description="Train. Options win over the file, which wins over the defaults shown here; "
            "--dry-run checks everything, prints the plan and starts nothing.",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=120),
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            if (name := unknown[1].removeprefix("--")) in GONE:
                raise UserError(f"{unknown[1]} is no option any more: {GONE[name]}")
            close = difflib.get_close_matches(unknown[1], [f"--{name}" for name in option_names()], n=1)
            raise UserError(f"{unknown[1]} is no option; {f'did you mean {close[0]}?' if close else 'see --help'}")
        raise UserError(f"{message}; see --help for the options")


def option_names() -> list[str]:
    """Every option as section.key."""
    return [
        f"{name}.{key}"
        for name, section in Config.model_fields.items()
        for key in section.annotation.model_fields  # type: ignore[union-attr]
    ]
