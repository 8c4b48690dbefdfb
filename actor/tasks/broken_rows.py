"""The row that keeps a data file from being read, for a message that names it."""

import json
from pathlib import Path

KINDS = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def first_broken(path: Path) -> str | None:
    """What is wrong with the first line of a JSONL file that is no object like those before it; or that there is none.

    None for other files. Called when a file could not be read, so that a good one is read once.
    """
    if path.suffix != ".jsonl":
        return None
    kinds: dict[str, tuple[str, int]] = {}  # of a column, and the line that has it
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # JSON can escape half of a character
            except (ValueError, RecursionError):  # ValueError: not JSON, or not UTF-8
                return f"{path}:{number} is not JSON; correct or remove the line"
            if not isinstance(row, dict):
                return f"{path}:{number} is {_kind(row)}; give each line an object with the columns of its row"
            for column, value in row.items():
                kind, before = kinds.setdefault(column, (_kind(value), number)) if value is not None else ("", 0)
                if value is not None and kind != _kind(value):
                    return f"{path}:{number}: {column} is {_kind(value)}, and in line {before} {kind}; make them alike"
    return None if kinds else f"{path} is empty; give it an object with the columns of a row on each line"


def _kind(value: object) -> str:
    return KINDS.get(type(value), "null")
