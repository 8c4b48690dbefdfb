"""What tests change in a run folder to make it a stranger's."""

import hashlib
import json
import tomllib
from pathlib import Path

import tomli_w

LAST = Path("checkpoints") / "step-000004"
SECRET = "the owner's\n"  # in a file outside of the run folder


def seal(checkpoint: Path) -> None:
    """Write the checksums that belong to the files: a stranger can."""
    files = [path for path in checkpoint.iterdir() if path.name != "checksums.json"]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(folder: Path, **tables: dict) -> None:
    """Change options in a folder's config.toml."""
    config = tomllib.loads((folder / "config.toml").read_text())
    for section, table in tables.items():
        config[section] |= table
    (folder / "config.toml").write_text(tomli_w.dumps(config))
