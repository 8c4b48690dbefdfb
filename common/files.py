"""Files of a run folder, each whole or not there; and the checks of a folder that a stranger may have made."""

import contextlib
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import ModuleType

from common.types import UserError

WEIGHTS = "adapter_model.safetensors"  # in each checkpoint, and in no base model's folder
OWN_FOLDERS = ("checkpoints", "evaluations", "tensorboard")  # in a run folder; all else in it are files
Warn = Callable[[str], None]
NEW = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class NotWritten(RuntimeError):
    """A file cannot be written, because a disk is full or fails. The run ends with status 1 and can be resumed."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(f"{_problem(path, error)}; make room, then resume the run with --run.resume")


def _problem(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or getattr(error, "cause", error)  # `cause`: Ray adds a traceback
    return f"{path} cannot be written ({reason})"


class Appended:
    """A file to which bytes are appended whole or not at all. A symbolic link in its place is not followed.

    With `warn`, a failure is no more than a line for it.
    """

    def __init__(self, path: Path, warn: Warn | None = None) -> None:
        self.path = path
        self.warn = warn
        self.file: int | None = None

    def append(self, data: bytes) -> bool:
        """Whether `data` is on the disk; if not, the file is as it was. Raises NotWritten, unless it is to warn."""
        try:
            if self.file is None:
                self.path.parent.mkdir(exist_ok=True)
                self.file = os.open(self.path, NEW | os.O_APPEND, 0o666)
            before = os.fstat(self.file).st_size
            try:
                _write(self.file, data)
            except OSError:
                os.ftruncate(self.file, before)
                raise
        except OSError as error:
            if self.warn is None:
                raise NotWritten(self.path, error) from None
            self.warn(f"{_problem(self.path, error)}: a part of it is missing")
            return False
        return True

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)


def write_whole(path: Path, text: str) -> None:
    """Write `path`, and the folders above it, atomically. Raises NotWritten, with the file as it was."""
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        file = os.open(temporary, NEW | os.O_EXCL, 0o666)
        try:
            _write(file, text.encode(errors="replace"))
        finally:
            os.close(file)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise NotWritten(path, error) from None


def _write(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # a nearly full disk takes a part, and refuses the next one
        rest = rest[os.write(file, rest) :]
    os.fsync(file)  # a network's file system may report a full disk only now


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_own(folder: Path) -> None:
    """Raise UserError if anything that a run or a grid would write in `folder` is a link, or no file or folder.

    Such a link may lead outside of the folder, and a pipe has no end. `folder` itself may be a link.
    """
    for path in chain(folder.iterdir(), *((folder / name).rglob("*") for name in OWN_FOLDERS)):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UserError(
                f"{path} is a symbolic link or a special file, which may lead outside of its folder; put a plain file "
                "or folder in its place"
            )


def user_module(name: str) -> ModuleType:
    """Import the module that a configuration names. Raises ImportError for one within a run folder.

    A stranger's config.toml could otherwise name the code beside it: `runs.x.evil` can be imported from a checkout.
    """
    folders = [Path(entry) for entry in sys.path]
    for part in name.split("."):  # without importing, which would run the packages above
        folders = [folder / part for folder in folders if (folder / part).is_dir()]
        if runs := [folder for folder in folders if (folder / "config.toml").exists()]:
            raise ImportError(f"{runs[0]} is a run folder, from which no code is imported")
    return importlib.import_module(name)


def usable(path: Path) -> Path:
    """The path, which need not exist. Raises UserError for one that the system does not accept."""
    try:
        str(path).encode()
        for each in (path, *map(Path, path.parts)):  # of a path below a missing folder the system checks no name
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                each.lstat()
    except (OSError, ValueError) as error:  # ValueError: a null byte, or a lone surrogate
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be used as a path ({reason}); name another") from None
    return path


def is_run_folder(folder: Path) -> bool:
    """Whether a run has left its configuration and more in `folder`."""
    return (folder / "config.toml").exists() and any(
        (folder / name).exists() for name in ("checkpoints", "metrics.jsonl")
    )


def run_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint, which may be damaged. Raises UserError for any other folder."""
    run = checkpoint.parent.parent
    if not (checkpoint / WEIGHTS).is_file() or not (run / "config.toml").is_file():
        raise UserError(
            f"{checkpoint} is not a checkpoint in a run folder; name one, such as RUN/checkpoints/step-000030"
        )
    return run


def check_started_elsewhere() -> None:
    """Raise UserError if this process works in a run folder: Ray's processes import from there first."""
    here = Path.cwd()
    if within := [folder for folder in (here, *here.parents) if is_run_folder(folder)]:
        raise UserError(
            f"{within[0]} is a run folder, whose files would be imported as code; start it in another folder"
        )
