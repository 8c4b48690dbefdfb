"""Two evaluations of the same problems, compared problem by problem."""

import json

import pytest

from common.types import UserError
from launch import evaluate
from launch.evaluation.compare import compare, lines


def write(path, name, correct, samples=None, **more):
    """An evaluation whose problems, numbered from 0 on, are correct or not; `samples` are correct ones of 4."""
    records = [
        {"step": 0, "set": name, "problem": f"p{i}", "correct": each}
        | ({"num_samples": 4, "num_samples_correct": samples[i]} if samples else {})
        | more
        for i, each in enumerate(correct)
    ]
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def test_the_differences_by_hand(tmp_path):
    before = write(tmp_path / "a.jsonl", "svamp", [True] * 30 + [False] * 20)
    after = write(tmp_path / "b.jsonl", "svamp", [False] * 2 + [True] * 38 + [False] * 10)  # 2 lost, 10 gained
    numbers = compare(before, after)["svamp"]
    assert numbers == {
        "num_problems": 50,
        "pass_at_1": [0.6, 0.76],
        "num_gained": 10,
        "num_lost": 2,
        "difference": 0.16,
        "difference_95": [pytest.approx(0.024547, abs=1e-5), pytest.approx(0.283145, abs=1e-5)],
        "p_value": pytest.approx(2 * (1 + 12 + 66) / 4096),
        "num_unpaired": 0,
    }
    assert list(lines({"svamp": numbers})) == [
        "svamp: Pass@1 0.600 to 0.760, difference +0.1600 [+0.0245, +0.2832], 10 gained, 2 lost, p 0.0386 (McNemar, "
        "exact), 50 problems"
    ]


def test_samples_are_compared_problem_by_problem(tmp_path):
    before = write(tmp_path / "a.jsonl", "svamp", [True, False, False], samples=[4, 0, 2])
    after = write(tmp_path / "b.jsonl", "svamp", [True, False, False], samples=[4, 1, 4])
    numbers = compare(before, after)["svamp"]
    assert numbers["mean_difference"] == pytest.approx((0 + 0.25 + 0.5) / 3)
    assert numbers["mean_difference_ci95"] == pytest.approx(1.96 * 0.25 / 3**0.5)
    assert next(lines({"svamp": numbers})).endswith("; mean of samples +0.2500 ± 0.2829")


def test_problems_are_paired_by_what_they_are_not_by_their_place(tmp_path):
    before = write(tmp_path / "a.jsonl", "svamp", [True, False, True])
    write(before, "aime24", [False])
    lines_ = before.read_text().splitlines()
    after = tmp_path / "b.jsonl"
    after.write_text("\n".join(lines_[::-1][:3]) + "\n")  # another order, and without svamp's first
    found = compare(before, after)
    assert (found["svamp"]["num_gained"], found["svamp"]["num_lost"]) == (0, 0)
    assert (found["svamp"]["num_problems"], found["svamp"]["num_unpaired"]) == (2, 1)
    assert list(found) == ["svamp", "aime24"]
    assert "2 problems, 1 in one file alone" in next(lines(found))


def test_the_command_prints_lines_and_an_object(tmp_path, capsys):
    before = write(tmp_path / "a.jsonl", "svamp", [True, False])
    after = write(tmp_path / "b.jsonl", "svamp", [True, True])
    assert evaluate.main(["--compare", str(before), str(after)]) == 0
    text, record = capsys.readouterr().out.splitlines()
    assert text.startswith("svamp: Pass@1 0.500 to 1.000")
    assert json.loads(record) == compare(before, after)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "is not a file"),
        ("x\n", "is damaged"),
        ('{"step": 0, "pass_at_1": 0.5}\n', "no problem of an evaluation"),
        ('{"step": 0, "set": "svamp", "problem": "p0", "correct": 1}\n', "no problem of an evaluation"),
        ('{"step": 0, "set": "svamp", "problem": [], "correct": true}\n', "no problem of an evaluation"),
        (
            '{"step": 0, "set": "s", "problem": "p", "correct": true, "num_samples": 0, "num_samples_correct": 0}\n',
            "no problem of an evaluation",
        ),
        ('{"step": 0, "set": "aime24", "problem": "p0", "correct": true}\n', "no problem in common"),
        ('{"step": 0, "set": "svamp", "problem": "p9", "correct": true}\n', "no problem in common"),
        ("", "no problem in common"),
    ],
)
def test_other_files_are_one_line(tmp_path, capsys, bad, message):
    before = write(tmp_path / "a.jsonl", "svamp", [True, False])
    after = tmp_path / "b.jsonl"
    if bad is not None:
        after.write_text(bad)
    with pytest.raises(UserError, match=message):
        compare(before, after)
    assert evaluate.main(["--compare", str(before), str(after)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
