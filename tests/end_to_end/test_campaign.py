"""A short campaign, and that it notices what it is there for."""

import json
import subprocess
import sys
from pathlib import Path

import campaign
import pytest


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1500)
def test_five_kills_change_no_number() -> None:
    command = [sys.executable, campaign.__file__, "--kills", "5", "--stops", "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=1400, check=False)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == result["equal"] == 5, done.stdout
    assert result["left_running"] == []
    assert done.returncode == 0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files of a run."""
    checkpoint = tmp_path / "checkpoints" / f"step-{campaign.STEPS:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter.safetensors").write_bytes(b"1234")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kl/mean": NaN, "time/x": 1.0, "recovery/actor": 0.0}\n')
    (tmp_path / "rollouts.jsonl").write_text('{"step": 1, "text": "a"}\n')
    (tmp_path / "evaluations.jsonl").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "old", "new", "found"),
    [
        ("metrics.jsonl", '"time/x": 1.0, "recovery/actor": 0.0', '"time/x": 2.0, "recovery/actor": 1.0', None),
        ("metrics.jsonl", "NaN", "0.1", "differs at metrics.jsonl:1"),
        ("metrics.jsonl", "\n", '\n{"step": 2}\n', "differs at metrics.jsonl:2"),
        ("rollouts.jsonl", "a", "b", "differs at rollouts.jsonl:1"),
        ("checkpoints/step-000060/adapter.safetensors", "3", "5", "differs at adapter.safetensors"),
    ],
)
def test_a_difference_is_found(run: Path, name: str, old: str, new: str, found: str | None) -> None:
    expected = dict(campaign.contents(run))
    (run / name).write_text((run / name).read_text().replace(old, new))
    assert campaign.difference(run, expected) == found


def test_a_kill_is_recovered_by_the_next_line_of_its_kind() -> None:
    kills = [campaign.Kill(kind=kind, how="killed", moment=10.0) for kind in ("learner", "actor", "reward", "driver")]
    lines = [
        (9.0, "the learner was lost (ActorDiedError); replaced in 1.0 s"),
        (12.0, "step 3/60 reward 1"),
        (13.0, "actor 1 was lost (ActorDiedError); replaced in 2.5 s"),
        (14.0, "the learner was lost (PeerLost); replaced in 3.0 s"),
        (15.0, "the learner was lost (PeerLost); replaced in 9.0 s"),
    ]
    rows: dict[str, campaign.Row] = {}
    campaign.count(rows, campaign.Outcome(folder=Path("x"), kills=kills, lines=lines))
    assert rows["learner killed"].numbers() == {
        "kills": 1, "equal": 1, "recovery_seconds": [4.0, 4.0], "replacing_seconds": [3.0, 3.0]
    }  # fmt: skip
    assert (rows["actor killed"].recovery, rows["actor killed"].replacing) == ([3.0], [2.5])
    assert rows["driver killed"].recovery == [2.0]
    assert rows["reward killed"].numbers() == {"kills": 1, "equal": 1}
