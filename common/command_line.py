"""From a command line and a TOML file to a configuration. Every error is a UserError of one line.

A TOML file may extend another one: `base = "default.toml"`, a path relative to its own folder.
"""

import argparse
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pydantic_settings
from pydantic import ValidationError

from common.config import Config, dump, options, with_values
from common.contradictions import REFUSED
from common.files import is_run_folder, usable
from common.methods import MethodConfig
from common.types import UserError, suggest

RESUME = "--run.resume"
Tables = dict[str, dict[str, Any]]  # section -> key -> value, as in a TOML file


def load(argv: Sequence[str], default: Path) -> Config:
    """The configuration of a command line: options win over `--config FILE`, which wins over the defaults.

    Without --config the file `default` is read. A run is resumed in the folder whose config.toml is named, whatever
    run.dir that file has: the folder may have been moved, or come from a stranger. Raises UserError for any
    invalid input.
    """
    parser = _Parser(add_help=False)
    parser.add_argument("--config", type=Path, default=default)
    chosen, arguments = parser.parse_known_args(list(argv))
    given = parse(arguments)
    config = build(read(chosen.config), given)
    named = chosen.config.name == "config.toml" and is_run_folder(chosen.config.parent)
    if config.run.resume and named and "dir" not in given.get("run", {}):
        return with_values(config, {"run.dir": chosen.config.parent})
    return config


def read(path: Path, above: Sequence[Path] = ()) -> Tables:
    """The tables of a TOML file, merged over those of its base. `above`: the files that extend this one."""
    what = f"base of {above[-1]}" if above else "--config"
    if not usable(path).is_file():
        raise UserError(f"{what} {path}: no such file; name a TOML file, such as launch/configs/default.toml")
    if path.resolve() in above:
        raise UserError(f"--config {path} is its own base; remove one `base =`")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        repr(tables)  # an error shows the value; RecursionError: it is nested too deeply for that
    except (ValueError, RecursionError) as error:  # ValueError: TOML's, UTF-8's, and a number of too many digits
        raise UserError(f"--config {path} is not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}); name another file") from None
    base = tables.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"--config {path}: base={base!r} is not a path; name a TOML file")
    return merged(read(path.parent / base, [*above, path.resolve()]) if base else {}, tables)


def parse(arguments: Sequence[str]) -> Tables:
    """The tables of command-line options. Values are strings, except lists and tables."""
    known, unset = _known(arguments)
    try:
        source: Any = pydantic_settings.CliSettingsSource(
            Config,  # type: ignore[arg-type]
            root_parser=_Parser(),
            cli_parse_args=known,
            cli_avoid_json=True,  # shortens the help; JSON values still work
            cli_implicit_flags=True,
        )
        return merged(source(), unset)
    except pydantic_settings.SettingsError as error:
        raise UserError(f"{str(error).strip().splitlines()[0]}; see --help for the options") from None


def _known(arguments: Sequence[str]) -> tuple[list[str], Tables]:
    """The arguments in the form that the parser knows, and a table of the options that are set to null.

    `--section.key=VALUE` becomes two arguments; true and false of a switch become `--section.key` and
    `--no-section.key`; --run.resume without a value, which may be auto, gets true.
    """
    defaults = {f"--{name}": default for name, default in options().items()}
    words: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        words += [name, value] if equals and name in defaults else [argument]
    result: list[str] = []
    unset: Tables = {}
    for word in words:
        name = result[-1] if result else ""
        if name in defaults and word == "null":
            section, key = result.pop().removeprefix("--").split(".")
            unset.setdefault(section, {})[key] = None
        elif name != RESUME and isinstance(defaults.get(name), bool) and word.lower() in ("true", "false"):
            result[-1] = name if word.lower() == "true" else name.replace("--", "--no-", 1)
        else:
            result.append(word)
    for index in reversed(range(len(result))):
        if result[index] == RESUME and (index + 1 == len(result) or result[index + 1].startswith("--")):
            result.insert(index + 1, "true")
    return result, unset


def merged(*layers: Mapping[str, Any]) -> Tables:
    """Merge the layers; later values win over earlier ones. Nested tables are merged too."""
    result: Tables = {}
    for layer in layers:
        for section, table in layer.items():
            if not isinstance(table, Mapping):
                raise UserError(f"{section}={table!r} is not a table; write {section} = {{ KEY = VALUE }}")
            result[section] = _over(result.get(section, {}), table)
    return result


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key for key in above if isinstance(above[key], Mapping) and isinstance(below.get(key), Mapping)}
    return {**below, **above, **{key: _over(below[key], above[key]) for key in both}}


def build(*layers: Mapping[str, Any]) -> Config:
    """The configuration of the merged layers, over the defaults. Raises UserError for any invalid value."""
    merged_layers = merged(*layers)  # null leaves an option at its default
    tables = {name: {k: v for k, v in table.items() if v is not None} for name, table in merged_layers.items()}
    for layer in layers:
        written = layer.get("method", {})
        if MethodConfig.model_fields.keys() <= written.keys() and written["name"] != tables["method"]["name"]:
            raise UserError(
                f"method.name={tables['method']['name']} would rename {written['name']}, all of whose fields the file "
                "sets; use a configuration without them"
            )
    try:
        config = Config.model_validate(tables)
        dump(config).encode()
    except ValidationError as error:
        raise UserError("; ".join(_explain(e) for e in error.errors())) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"an option has a value that config.toml cannot hold ({error}); correct it") from None
    return config


def _explain(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        if where in REFUSED:
            return f"{where}={error['input']!r} {REFUSED[where]}"
        return f"unknown option {where}={error['input']!r}{suggest(where, options())}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{where}={error['input']!r}: {error['msg']}"


class Parser(argparse.ArgumentParser):
    """A command's own parser. Raises UserError, in one line, instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split())}; see --help for the options")


class _Parser(Parser):
    """The options of a run, with the text of `--help`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            usage="launch/run.py [--config FILE.toml] [--dry-run] [--SECTION.KEY VALUE ...]",
            description="Train. Options win over the file, which wins over the defaults shown here; "
            "--dry-run checks everything, prints the plan and starts nothing.",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=120),
            allow_abbrev=False,
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            if (name := unknown[1].removeprefix("--")) in REFUSED:
                raise UserError(f"{unknown[1]} {REFUSED[name]}")
            close = difflib.get_close_matches(unknown[1], [f"--{name}" for name in options()], n=1)
            raise UserError(f"unknown option {unknown[1]}; {f'did you mean {close[0]}?' if close else 'see --help'}")
        super().error(message)
