"""Checkpoint folders are complete or absent, and damage is found; resuming rewinds the files of a run."""

import errno
import hashlib
import json
import os

import pytest
import torch
from safetensors import SafetensorError

from common.files import NotWritten
from common.metrics import JsonLines, read_lines
from common.types import UserError
from launch.recording.recorder import rewind
from learner import checkpoint


def write(folder, step=30, **files):
    """A checkpoint with two files of data, and with `files`."""
    target = folder / checkpoint.name(step)
    with checkpoint.written_whole(target) as whole:
        for name, text in ({"numbers": "{}", "state": '{"step": 1}'} | files).items():
            (whole / f"{name}.json").write_text(text)
    return target


def test_a_crash_while_writing_leaves_no_checkpoint(tmp_path):
    target = tmp_path / checkpoint.name(30)

    def write_half():
        with checkpoint.written_whole(target) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert not target.exists()
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / "step-000030.partial").mkdir(exist_ok=True)  # as kill -9 leaves it
    (tmp_path / "step-000030.partial" / "half.json").write_text("x")
    write(tmp_path)
    assert sorted(p.name for p in target.iterdir()) == ["checksums.json", "numbers.json", "state.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-000030"]


def test_the_checksums_are_sha256(tmp_path):
    folder = write(tmp_path, state="abc")
    sums = json.loads((folder / "checksums.json").read_text())
    assert sums["state.json"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert sums["numbers.json"] == hashlib.sha256(b"{}").hexdigest()


def test_everything_is_on_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    """A loss of power may keep a rename and lose the bytes of a file that was not flushed before it."""
    flushed = []
    monkeypatch.setattr(checkpoint, "_flush", lambda path: flushed.append((path.name, path.exists())))
    folder = write(tmp_path)
    assert sorted(flushed[:4]) == [
        (n, True) for n in ("checksums.json", "numbers.json", "state.json", "step-000030.partial")
    ]
    assert flushed[3:] == [("step-000030.partial", True), (tmp_path.name, True)]
    assert folder.exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(tmp_path, error):
    write(tmp_path, step=2)

    def write_half():
        with checkpoint.written_whole(tmp_path / checkpoint.name(4)) as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(NotWritten, match=r"^[^\n]*step-000004 cannot be written \(No space left[^\n]*--run\.resume$"):
        write_half()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002"


def test_latest_is_by_number(tmp_path):
    for step in (9, 100):
        write(tmp_path, step)
    for name in ("step-000200.partial", "step-x", "step-200", "step-²", "step-" + "9" * 200):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path).name == "step-000100"


def flip(folder):
    path = folder / "state.json"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


DAMAGES = {
    r"state\.json has another checksum": flip,
    r"state\.json is missing": lambda folder: (folder / "state.json").unlink(),
    r"more\.json is not in checksums\.json": lambda folder: (folder / "more.json").write_text("{}"),
    r"checksums\.json is missing": lambda folder: (folder / "checksums.json").unlink(),
    r"checksums\.json is not JSON": lambda folder: (folder / "checksums.json").write_text("[" * 100_000),
    r"checksums\.json is not an object": lambda folder: (folder / "checksums.json").write_text("[]"),
    r"checksums\.json has more than": lambda folder: (folder / "checksums.json").write_text(" " * 2_000_000),
    r"adapter_model\.bin is neither": lambda folder: (folder / "adapter_model.bin").write_bytes(b"x"),
    r"deep is not a plain file": lambda folder: (folder / "deep").mkdir(),
    r"link\.json is not a plain file": lambda folder: (folder / "link.json").symlink_to("/etc/passwd"),
    r"pipe\.json is not a plain file": lambda folder: os.mkfifo(folder / "pipe.json"),
    r"'\\n\\x1b\.json is not in": lambda folder: (folder / "\n\x1b.json").write_text("{}"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, reason):
    before, newest = write(tmp_path, 2), write(tmp_path, 4)
    assert checkpoint.latest(tmp_path) == newest
    assert checkpoint.passed_over(tmp_path) == []
    checkpoint.check(newest)
    DAMAGES[reason](newest)
    assert checkpoint.latest(tmp_path) == before
    [line] = checkpoint.passed_over(tmp_path)
    with pytest.raises(UserError, match=rf"^[^\n]*step-000004 is damaged: [^\n]*{reason}[^\n]*$") as error:
        checkpoint.check(newest)
    assert line in str(error.value)
    write(tmp_path, 4)  # the resumed run writes it again
    assert checkpoint.latest(tmp_path) == newest


def test_checkpoints_of_which_none_is_whole_are_refused(tmp_path):
    """Rather than begun again at step 0: a file may be restored, and the records of the steps stay."""
    assert checkpoint.latest(tmp_path) is None
    for step in (2, 4):
        flip(write(tmp_path, step))
    with pytest.raises(
        UserError, match=r"^no checkpoint in [^\n]* is whole: step-000004 is damaged: state\.json [^\n]*$"
    ):
        checkpoint.latest(tmp_path)
    assert [line.split(" is")[0][-1] for line in checkpoint.passed_over(tmp_path)] == ["4", "2"]


class Exploit:
    """Makes the folder `trace` when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", ["learner_state.safetensors", "learner_state.json", "learner_state.pt"])
def test_a_pickled_state_is_rejected_and_not_run(tmp_path, name):
    """Under its own name, and under those of the files that are read."""
    folder, trace = tmp_path / "step-000030", tmp_path / "ran"
    checkpoint.save_state(tmp_path, {"step": 30, "entropy_bonus": 0.0, "optimizer": {"0.step": torch.tensor(1.0)}})
    with checkpoint.written_whole(folder) as whole:
        for file in (checkpoint.TENSORS, checkpoint.NUMBERS):
            (tmp_path / file).rename(whole / file)
        torch.save({"learner": Exploit(trace)}, whole / name)
    read = checkpoint.check if name.endswith(".pt") else checkpoint.load_state
    with pytest.raises(UserError, match=rf"^[^\n]*{name}[^\n]*use another (checkpoint|one)$"):
        read(folder)
    assert not trace.exists()


STATES = [
    '{"step": "3", "entropy_bonus": 0.0}',
    '{"step": -1, "entropy_bonus": 0.0}',
    '{"step": NaN, "entropy_bonus": 0.0}',
    '{"step": 1e999, "entropy_bonus": 0.0}',
    '{"step": true, "entropy_bonus": 0.0}',
    '{"step": %s, "entropy_bonus": 0.0}' % ("9" * 5000),
    '{"step": 3, "entropy_bonus": NaN}',
    '{"step": 3, "entropy_bonus": "0"}',
    '{"step": 3}',
    "[3]",
    "[" * 100_000,
    "\x00",
]


@pytest.mark.parametrize("text", STATES, ids=range(len(STATES)))
def test_a_state_of_other_contents_is_one_line(tmp_path, text):
    checkpoint.save_state(tmp_path, {"step": 3, "entropy_bonus": 0.0, "optimizer": {"0.step": torch.tensor(1.0)}})
    (tmp_path / checkpoint.NUMBERS).write_text(text)
    with pytest.raises(UserError, match=r"^the checkpoint cannot be loaded: learner_state\.json [^\n]*$"):
        checkpoint.load_state(tmp_path)


@pytest.mark.parametrize("header", [(2**60).to_bytes(8, "little"), b"", b"\x02" + bytes(7) + b"{}" * 50])
def test_tensors_of_another_format_are_one_line(tmp_path, header):
    checkpoint.save_state(tmp_path, {"step": 3, "entropy_bonus": 0.0, "optimizer": {"0.step": torch.tensor(1.0)}})
    (tmp_path / checkpoint.TENSORS).write_bytes(header)
    with pytest.raises(UserError, match=r"^the checkpoint cannot be loaded: learner_state\.safetensors[^\n]*$"):
        checkpoint.load_state(tmp_path)


def test_rewind_removes_later_steps_and_torn_lines(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        lines.write({"step": step, "text": "ü\n"})
    lines.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "te')
    rewind(tmp_path, 2)
    assert [record["step"] for record in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_old_checkpoints_are_deleted_and_the_newest_stay(tmp_path):
    folders = [write(tmp_path, step=step) for step in (2, 4, 6, 8)]
    checkpoint.delete_old(folders[3], keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000006", "step-000008"]
    checkpoint.delete_old(folders[3], keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000008"]


def test_a_deletion_that_is_cut_off_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    """Killed within it: what is left has no checkpoint's name, and goes with the next deletion."""
    first, second = write(tmp_path, step=2), write(tmp_path, step=4)

    def killed(path):
        (path / "numbers.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.delete_old(second, keep=1)
    assert not first.exists()
    assert checkpoint.latest(tmp_path) == second
    assert checkpoint.passed_over(tmp_path) == []
    write(tmp_path, step=2)  # a run that was resumed at the start has made it again
    checkpoint.delete_old(second, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]


def test_a_damaged_later_checkpoint_does_not_count_as_the_newest(tmp_path):
    """Resumed from step 4 since 8 is damaged: 6 is then the newest whole one, and all that a resumed run has."""
    write(tmp_path, step=4)
    later = write(tmp_path, step=8)
    (later / "state.json").write_text("x")
    newest = write(tmp_path, step=6)
    checkpoint.delete_old(newest, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000006", "step-000008"]
    assert checkpoint.latest(tmp_path) == newest


def test_the_best_is_a_whole_copy_and_never_the_latest(tmp_path):
    saved = write(tmp_path, step=4)
    checkpoint.keep_best(saved)
    best = tmp_path / "best"
    assert {p.name: p.read_bytes() for p in best.iterdir()} == {p.name: p.read_bytes() for p in saved.iterdir()}
    assert checkpoint.damage(best) is None
    assert checkpoint.latest(tmp_path) == saved
    checkpoint.delete_old(write(tmp_path, step=6), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-000006"]


def test_a_damaged_best_is_copied_again(tmp_path):
    saved = write(tmp_path, step=4)
    checkpoint.keep_best(saved)
    (saved.with_name("best") / "adapter_model.safetensors").write_bytes(b"cut")
    checkpoint.keep_best(saved)
    assert checkpoint.damage(saved.with_name("best")) is None


def test_a_full_disk_leaves_the_best_as_it_was(tmp_path, monkeypatch):
    checkpoint.keep_best(write(tmp_path, step=4))
    better = write(tmp_path, step=6, state='{"step": 6}')

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.shutil, "copyfile", full)
    with pytest.raises(NotWritten, match="best cannot be written"):
        checkpoint.keep_best(better)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-000004", "step-000006"]
    assert checkpoint.damage(tmp_path / "best") is None
    assert (tmp_path / "best" / "state.json").read_text() == '{"step": 1}'


def test_resuming_removes_what_became_of_problems_at_later_steps(tmp_path):
    folder = tmp_path / "evaluations"
    folder.mkdir()
    for name in ("step-000000.jsonl", "step-000004.jsonl", "step-000006.jsonl", "mine.jsonl"):
        (folder / name).write_text("")
    rewind(tmp_path, 4)
    assert sorted(path.name for path in folder.iterdir()) == ["mine.jsonl", "step-000000.jsonl", "step-000004.jsonl"]
    rewind(tmp_path, -1)
    assert [path.name for path in folder.iterdir()] == ["mine.jsonl"]
