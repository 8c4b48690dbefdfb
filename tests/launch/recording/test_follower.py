"""What a tracker's process reads and sends, without a process: the library is a list."""

import json

import pytest
from tracked import record, written

from common.metrics import JsonLines
from launch.recording import follower, libraries


@pytest.fixture
def sent(monkeypatch):
    """What was sent, of one follower after another."""
    sent = []

    class Listed:
        def __init__(self, run):
            self.id = run.id or "first"
            sent.append(("start", run.id, run.name))

        def log(self, step, values):
            sent.append((step, values))
            if values.get("reward/mean") == 13.0:
                raise ConnectionError

        def table(self, step, name, rows):
            sent.append((step, name, [row["text"] for row in rows]))

        def report(self, path):
            sent.append(path.read_text())

        def finish(self, *, complete):
            sent.append(complete)

    monkeypatch.setitem(libraries.LIBRARIES, "wandb", Listed)
    return sent


def started(folder):
    return follower.Follower("wandb", folder, lambda line: None)


def test_lines_that_are_being_written_are_left_for_later(tmp_path, sent):
    """Half a line of metrics; 7 of 20 samples, then the others; a step without a table; a small one."""
    folder = written(tmp_path / "run")
    following = started(folder)
    (folder / "metrics.jsonl").write_bytes(
        b'{"step": 1, "reward/mean": 2.5, "kl/mean": null, "flag": true}\n{"step": 2, "rew'
    )
    rows = [{"step": 2, "text": str(index), "reward": 1.0} for index in range(20)]
    samples = JsonLines(folder / "rollouts.jsonl")
    samples.write(*rows[:7])
    following.send()
    assert sent == [("start", None, "sa-ah-grpo run"), (1, {"reward/mean": 2.5})]
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'ard/mean": 3.5}\n')
    samples.write(*rows[7:])
    following.send()
    texts = [str(index) for index in range(follower.MAX_SAMPLES)]
    assert sent[2:] == [(2, {"reward/mean": 3.5}), (2, "samples", texts)]
    samples.write({"step": 3, "text": "not due"}, {"step": 4, "text": "a small step"})
    following.send()
    assert len(sent) == 4
    following.finish(complete=False)
    assert sent[4:] == [(4, "samples", ["a small step"]), False]


def test_a_step_is_lost_rather_than_sent_twice(tmp_path, sent):
    """The library fails at step 3. The next process goes on with step 4, in the same run of the tracker."""
    folder = written(tmp_path / "run")
    record(folder, 3, offset=10.0)
    following = started(folder)
    with pytest.raises(ConnectionError):
        following.send()
    record(folder, 4)
    del sent[:]
    following = started(folder)
    following.send()
    assert sent[0] == ("start", "first", "sa-ah-grpo run")
    assert [each[0] for each in sent[1:]] == [4, 4, 4]  # its evaluation, its metrics, its samples
    assert json.loads((folder / "tracker-wandb.json").read_text()) == {
        "id": "first",
        "sent": {"evaluations.jsonl": 4, "metrics.jsonl": 4, "rollouts.jsonl": 4},
    }


@pytest.mark.parametrize("id", ["../../x", "..", ".x", "a/b", "a\\b", "", "a\nb", 3, None, ["a"], {"a": 1}])
def test_an_id_from_a_stranger_leads_nowhere(tmp_path, sent, id):
    """A library makes paths and addresses of it, such as that of W&B's offline folder."""
    folder = written(tmp_path / "run")
    (folder / "tracker-wandb.json").write_text(json.dumps({"id": id, "sent": {}}))
    with pytest.raises(ValueError, match=r"tracker-wandb.json holds no run of a tracker; remove it to start another"):
        started(folder)
    assert sent == []


@pytest.mark.parametrize("state", ["[]", "3", '{"id": "x"}', '{"id": "x", "sent": []}'])
def test_a_damaged_state_is_one_line(tmp_path, sent, state):
    folder = written(tmp_path / "run")
    (folder / "tracker-wandb.json").write_text(state)
    with pytest.raises(ValueError, match="holds no run of a tracker"):
        started(folder)
    assert sent == []


@pytest.mark.parametrize("id", ["3f2a9c1b", "sa-ah-grpo run 2 (b) 01ab2f", "my.method.x run 01ab2f", "0" * 32])
def test_the_ids_that_libraries_give_are_taken(tmp_path, sent, id):
    """W&B's, trackio's (method, folder, hexadecimal digits) and MLflow's; steps that are none are left out."""
    folder = written(tmp_path / "run")
    steps = {"metrics.jsonl": 3, "rollouts.jsonl": "4", "evaluations.jsonl": -1, "other": 5}
    (folder / "tracker-wandb.json").write_text(json.dumps({"id": id, "sent": steps}))
    following = started(folder)
    assert sent == [("start", id, "sa-ah-grpo run")]
    assert following.sent == {"metrics.jsonl": 3, "rollouts.jsonl": -1, "evaluations.jsonl": -1}
