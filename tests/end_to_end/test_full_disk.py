"""A disk that is full, tried on a real one of a few hundred KB: lines are whole, the run ends in one line and resumes.

The disk is filled to the last page before the write under test. What the run has written before stays.
"""

import json
import subprocess
from pathlib import Path

import local_run
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import files
from common.metrics import read_lines
from launch import loop, run
from launch.recording import recorder
from launch.runtime.workers import Workers
from learner import checkpoint

pytestmark = pytest.mark.slow

SIZE = 1024 * 1024
JSON_LINES = ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl", "timeline.jsonl")


def long(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.fixture
def disk(tmp_path: Path):
    """An empty disk of SIZE bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave no page free; files may still grow within their last one."""
    with (disk / "ballast").open("ab", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass


def empty(disk: Path) -> None:
    (disk / "ballast").unlink(missing_ok=True)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path):
    """A function that runs launch/run.py in a folder; returns its status, stdout and stderr."""
    local_run.install(monkeypatch)

    def start(folder: Path, *more: str) -> tuple[int, str, str]:
        status = run.main(local_run.options(model, folder, *more))
        return (status, *capsys.readouterr())

    return start


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch, disk: Path):
    """A function that fills the disk before the `count`-th time something is appended to the file called `name`.

    `once`: and empties it after that.
    """

    def full_at(name: str, count: int, *, once: bool = False) -> None:
        append, seen = files.Appended.append, []

        def filling(self: files.Appended, data: bytes) -> bool:
            if name not in str(self.path):
                return append(self, data)
            seen.append(data)
            if len(seen) == count:
                fill(disk)
            try:
                return append(self, data)
            finally:
                if once:
                    empty(disk)

        monkeypatch.setattr(files.Appended, "append", filling)

    return full_at


@pytest.fixture
def unbroken(finished: Path) -> Path:
    return finished


def whole_lines(folder: Path) -> None:
    for name in JSON_LINES:
        if (folder / name).exists():
            text = (folder / name).read_text()
            assert text == "" or text.endswith("\n")
            assert all(isinstance(json.loads(line), dict) for line in text.splitlines())


def assert_equal(folder: Path, unbroken: Path, *names: str) -> None:
    for name in names:
        expected, got = ([local_run.comparable(r) for r in read_lines(each / name)] for each in (unbroken, folder))
        assert got == expected, f"{name} differs after resuming"
        assert {record["step"] for record in got} == ({0, 2, 4} if name == "evaluations.jsonl" else {1, 2, 3, 4})
    last = Path("checkpoints") / "step-000004"
    for path in (unbroken / last).glob("*.safetensors"):
        assert path.read_bytes() == (folder / last / path.name).read_bytes()


@pytest.mark.parametrize(("count", "reached"), [(1, 0), long(2, 0), (4, 2)])
def test_full_in_a_metrics_line(disk, start, full_at, unbroken, monkeypatch, count, reached):
    """At the first, and later ones, before and after the first checkpoint."""
    folder = disk / "run"
    full_at("metrics.jsonl", count)
    status, out, err = start(folder)
    assert status == 1
    assert err == (
        f"run failed: {folder}/metrics.jsonl cannot be written (No space left on device); make room, then resume the "
        "run with --run.resume\n"
    )
    assert "finished" not in out
    whole_lines(folder)
    assert [record["step"] for record in read_lines(folder / "metrics.jsonl")] == list(range(1, count))
    empty(disk)
    monkeypatch.undo()
    local_run.install(monkeypatch)
    status, out, err = start(folder, "--run.resume")
    assert (status, err) == (0, "")
    assert f"resuming at step {reached}" + ("" if reached else ": there is no checkpoint") in out.splitlines()
    assert_equal(folder, unbroken, "metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")
    whole_lines(folder)


@pytest.mark.parametrize(
    ("name", "count", "step"),
    [long("rollouts.jsonl", 1, 1), ("rollouts.jsonl", 2, 2), ("tfevents", 2, 1), long("tfevents", 3, 2)],
)
def test_full_in_rollouts_or_tensorboard_is_a_warning(disk, start, full_at, unbroken, name, count, step):
    """TensorBoard's first record is the evaluation at step 0."""
    folder = disk / "run"
    full_at(name, count, once=True)
    status, out, err = start(folder)
    assert (status, err) == (0, "")
    [warning] = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert name in warning
    assert warning.endswith("cannot be written (No space left on device): a part of it is missing")
    whole_lines(folder)
    assert_equal(folder, unbroken, "metrics.jsonl")
    missing = [step]
    rollouts = {record["step"] for record in read_lines(folder / "rollouts.jsonl")}
    assert sorted({1, 2, 3, 4} - rollouts) == (missing if name == "rollouts.jsonl" else [])
    assert sorted({1, 2, 3, 4} - shown(folder)) == (missing if name == "tfevents" else [])


def shown(folder: Path) -> set[int]:
    """The steps that TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step for event in events.Scalars("reward/mean")}


@pytest.mark.parametrize(("step", "free"), [long(2, 0), (2, 5), long(4, 0), (4, 3), long(4, 5)])
def test_full_in_a_checkpoint(disk, start, unbroken, monkeypatch, step, free):
    """At once, and after a part of its files: the one before stands, the run resumes there."""
    folder, save = disk / "run", loop.save

    def filling(folder: Path, workers: Workers) -> None:
        if workers.learner.position["step"] == step:
            (disk / "room").write_bytes(bytes(4096 * free))
            fill(disk)
            (disk / "room").unlink()
        save(folder, workers)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save", filling)
        status, out, err = start(folder)
    assert status == 1
    name = checkpoint.name(step)
    assert err == (
        f"run failed: {folder}/checkpoints/{name} cannot be written (No space left on device); make room, then resume "
        "the run with --run.resume\n"
    )
    assert "finished" not in out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == (["step-000002"] if step == 4 else [])
    empty(disk)
    status, out, err = start(folder, "--run.resume")
    assert (status, err) == (0, "")
    assert f"resuming at step {step - 2}" in out
    assert_equal(folder, unbroken, "metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")
    assert shown(folder) == {1, 2, 3, 4}


def test_full_before_anything_is_written(disk, start, unbroken):
    folder = disk / "run"
    fill(disk)
    status, _, err = start(folder)
    assert status == 1
    assert "/run/config.toml cannot be written (No space left on device); make room" in err
    assert err.count("\n") == 1
    assert not any(folder.iterdir())
    empty(disk)
    assert start(folder)[0] == 0
    assert_equal(folder, unbroken, "metrics.jsonl")


def test_full_while_a_resumed_run_is_rewound(disk, start, unbroken, monkeypatch):
    """Nothing is lost: the files are rewritten beside themselves."""
    folder = disk / "run"
    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "step", failing_at(3, recorder.Recorder.step))
        assert start(folder)[0] == 1
    before = (folder / "metrics.jsonl").read_bytes()
    fill(disk)
    status, _, err = start(folder, "--run.resume")
    assert status == 1
    assert "metrics.jsonl cannot be written (No space left on device)" in err
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not list(folder.glob("*.partial"))
    empty(disk)
    assert start(folder, "--run.resume")[0] == 0
    assert_equal(folder, unbroken, "metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")


def failing_at(last: int, record):
    def step(self, step: int, *arguments, **options) -> None:
        record(self, step, *arguments, **options)
        if step == last:
            raise loop.RunFailed("for the test")

    return step


@pytest.mark.parametrize("damage", ["flipped", long("cut"), long("gone")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, start, unbroken, damage):
    folder = tmp_path / "run"
    assert start(folder)[0] == 0
    victim = folder / "checkpoints" / "step-000004" / "learner_state.safetensors"
    content = bytearray(victim.read_bytes())
    content[-9] ^= 1  # a bit in the last moments
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(content if damage == "flipped" else content[:-100])
    status, out, err = start(folder, "--run.resume")
    assert (status, err) == (0, "")
    found = "is missing" if damage == "gone" else "has another checksum than when it was written"
    assert f"warning: step-000004 is damaged: learner_state.safetensors {found}" in out.splitlines()
    assert "resuming at step 2" in out.splitlines()
    assert_equal(folder, unbroken, "metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")
    assert checkpoint.passed_over(folder / "checkpoints") == []
    assert shown(folder) == {1, 2, 3, 4}
