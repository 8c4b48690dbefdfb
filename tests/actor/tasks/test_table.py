"""Tables of problems: every format, the draw, and rows and files that are broken."""

import errno
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actor.tasks.table import BATCH_ROWS, Problems, Row, open_table, problems
from common.config import TaskConfig
from common.types import Prompt, UserError

ROWS = [{"question": f"What is {n}, “{n}”?", "answer": str(n)} for n in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    return folder


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("question,answer\n" + "".join(f'"{row["question"]}","{row["answer"]}"\n' for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task(data: Path | str, num_train: int = 20, num_eval: int = 10, **changes: Any) -> TaskConfig:
    return TaskConfig(name="gsm8k", data=str(data), num_train=num_train, num_eval=num_eval, **changes)


def read(row: Row, where: str) -> Prompt:
    return Prompt(messages=({"role": "user", "content": row["question"]},), answer=str(row["answer"]))


def answers(prompts: Iterator[Prompt] | Problems) -> list[str]:
    return [prompt.answer for prompt in prompts]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("names", [["train"], ["train-00000-of-00002", "train-00001-of-00002"], ["data/train-0"]])
def test_every_format_and_layout_has_the_same_rows(tmp_path: Path, suffix: str, names: list[str]) -> None:
    share = len(ROWS) // len(names)
    for number, name in enumerate(names):
        write(tmp_path / f"{name}{suffix}", ROWS[number * share : (number + 1) * share])
    write(tmp_path / f"training{suffix}", ROWS[:1])  # another split
    table = open_table(task(tmp_path), "train")
    assert table["question"] == [row["question"] for row in ROWS]
    assert [str(answer) for answer in table["answer"]] == [row["answer"] for row in ROWS]  # CSV has numbers


def test_prompts_are_built_when_they_are_read(tmp_path: Path) -> None:
    built = []

    def counted(row: Row, where: str) -> Prompt:
        built.append(where)
        return read(row, where)

    drawn = problems(task(write(tmp_path / "all.jsonl", ROWS)), "train", counted)
    assert len(drawn) == len(drawn[3:]) + 3 == 20
    assert built == []
    assert drawn[7].answer == ROWS[drawn.rows[7]]["answer"]
    assert built == [f"{tmp_path}/all.jsonl row {drawn.rows[7] + 1}"]


def test_it_is_a_sequence(tmp_path: Path) -> None:
    many = [{"question": str(n), "answer": str(n)} for n in range(2 * BATCH_ROWS + 100)]
    num = 2 * BATCH_ROWS + 1
    drawn = problems(task(write(tmp_path / "all.jsonl", many), num_train=num), "train", read)
    one_by_one = [drawn[i] for i in range(num)]
    assert list(drawn) == one_by_one
    assert [prompt.index for prompt in drawn] == list(range(num))
    assert drawn[-1] == one_by_one[-1]
    assert answers(drawn[5:50:3]) == [prompt.answer for prompt in one_by_one[5:50:3]]
    assert answers(drawn.at(np.array([9, 2]))) == [one_by_one[9].answer, one_by_one[2].answer]
    for index in (num, -num - 1):
        with pytest.raises(IndexError):
            drawn[index]


def test_rows_that_train_and_eval_share_are_divided(tmp_path: Path) -> None:
    """No row is in both, and each draw is the start of a larger one."""
    write(tmp_path / "one.jsonl", ROWS)
    for options in ({"data": tmp_path / "one.jsonl"}, {"data": tmp_path, "train_split": "one", "eval_split": "one"}):
        train, evaluation = (answers(problems(task(**options), split, read)) for split in ("train", "eval"))
        order = [row["answer"] for row in ROWS]
        random.Random(123).shuffle(order)
        assert (train, evaluation) == (order[:20], order[::-1][:10])
        assert answers(problems(task(**options, num_train=30), "train", read))[:20] == train
        assert answers(problems(task(**options, num_eval=20), "eval", read))[:10] == evaluation
        with pytest.raises(UserError, match=r"num_train=31 and task.num_eval=10 together exceed the 40 rows"):
            problems(task(**options, num_train=31), "train", read)


def test_changed_data_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", ROWS)
    before = open_table(task(path), "train")
    assert open_table(task(path), "train")._fingerprint == before._fingerprint
    write(path, ROWS[::-1])
    os.utime(path, ns=(1, 1))
    after = open_table(task(path), "train")
    assert after["answer"] == before["answer"][::-1]
    assert after._fingerprint != before._fingerprint


GOOD = '{"question": "q", "answer": "a"}\n'
BROKEN = {
    "no JSON": (f"{GOOD}\n{{no\n{GOOD}", "all.jsonl:3 is not JSON"),
    "nested deeply": (GOOD + "[" * 100_000, "all.jsonl:2 is not JSON"),
    "half of a character": (GOOD + '{"question": "\\ud800", "answer": "a"}\n', "all.jsonl:2 is not JSON"),
    "a list": (f"{GOOD}[1, 2]\n", "all.jsonl:2 is a list"),
    "a list at first": (f"[1, 2]\n{GOOD}", "all.jsonl:1 is a list"),
    "no lines": ("", "all.jsonl is empty"),
    "empty lines": ("\n\n", "all.jsonl is empty"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_cannot_be_read_names_its_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    content, words = BROKEN[what]
    (tmp_path / "all.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        open_table(task(tmp_path / "all.jsonl"), "train")
    assert words in str(error.value)
    assert capfd.readouterr() == ("", "")  # no log, no bar


def test_a_row_of_other_types_is_named_though_it_comes_late(tmp_path: Path) -> None:
    """`datasets` takes the types of the first 10 MB."""
    (tmp_path / "all.jsonl").write_text(f'{{"question": "{"q" * 10_000}", "answer": 1}}\n' * 2000 + GOOD)
    with pytest.raises(UserError, match=r"all.jsonl:2001: answer is a text, and in line 1 a number"):
        open_table(task(tmp_path / "all.jsonl"), "train")


def test_a_row_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_bytes(GOOD.encode() * 4 + b'{"question": "\xff", "answer": "a"}\n')
    drawn = problems(task(tmp_path / "all.jsonl", num_train=4, num_eval=1), "train", read)
    position = drawn.rows.tolist().index(4)
    with pytest.raises(UserError, match=r"all.jsonl row 5 is not UTF-8"):
        drawn[position]
    with pytest.raises(UserError, match=r"all.jsonl row 5 is not UTF-8"):
        list(drawn)


def test_other_data_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ragged.csv").write_text("question,answer\n1,2\n1,2,3\n")
    (tmp_path / "no.parquet").write_text("no")
    (tmp_path / "text.txt").write_text("no")
    os.mkfifo(tmp_path / "pipe.jsonl")
    write(tmp_path / "both" / "train.jsonl", ROWS)
    write(tmp_path / "both" / "train.csv", ROWS)
    for name, words in {
        "ragged.csv": "line 3, saw 3",
        "no.parquet": "no.parquet cannot be read (",
        "text.txt": "is none of .jsonl, .parquet, .csv",
        "pipe.jsonl": "pipe.jsonl is not a file",
        "missing.jsonl": "missing.jsonl cannot be read (No such file or directory)",
        "both": "has train in several formats",
        ".": "has no train.jsonl, .parquet or .csv; set task.train_split",
        "../no/where": "could not be loaded from the hub",
    }.items():
        with pytest.raises(UserError, match=r"^[^\n]*$") as error:
            open_table(task(tmp_path / name), "train")
        assert words in str(error.value)


def test_a_name_is_neither_a_pattern_nor_an_address(tmp_path: Path) -> None:
    path = write(tmp_path / "hf:" / "x" / "[ab]*.jsonl", ROWS[:30])
    write(tmp_path / "hf:" / "x" / "a.jsonl", ROWS)
    assert len(open_table(task(path), "train")) == 30


def test_a_folder_that_is_only_read(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "train.jsonl").chmod(0o444)
    tmp_path.chmod(0o555)
    before = sorted(tmp_path.rglob("*"))
    assert len(open_table(task(tmp_path), "train")) == 40
    tmp_path.chmod(0o755)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"^[^\n]*file/cache[^\n]*$"):
        open_table(task(write(tmp_path / "all.jsonl", ROWS)), "train")


@pytest.mark.parametrize("kind", ["Image", "Audio", "Video", "Pdf", "nested"])
def test_what_a_row_names_is_not_opened(tmp_path: Path, kind: str) -> None:
    """A file's metadata can make any column of bytes and path an image, at an address that its rows choose."""
    storage: Any = {"bytes": b"broken", "path": "http://127.0.0.1:9/x"} if kind == "Pdf" else {"path": "/no/where"}
    place = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    evil, feature = pa.array([storage] * 4, place), {"_type": kind}
    if kind == "nested":
        evil = pa.array([{"a": [storage]}] * 4, pa.struct({"a": pa.list_(place)}))
        feature = {"a": {"feature": {"_type": "Image"}, "_type": "List"}}
    text = {"dtype": "string", "_type": "Value"}
    features = {"question": text, "answer": text, "evil": feature}
    table = pa.table({"question": ["q"] * 4, "answer": ["7"] * 4, "evil": evil})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "all.parquet")
    drawn = problems(task(tmp_path / "all.parquet", num_train=3, num_eval=1), "train", read)
    assert [drawn[0].answer, *answers(drawn)] == ["7"] * 4
    assert drawn.table.column_names == ["question", "answer"]


def test_a_column_of_objects_of_several_kinds_stays(tmp_path: Path) -> None:
    """`datasets` decodes it, too, but opens nothing for that."""
    more: list[Any] = [{"a": 1}, {"a": [1]}, {"a": "x"}]
    lines = [json.dumps({"question": "q", "answer": "7", "more": [each]}) for each in more]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    assert open_table(task(tmp_path / "all.jsonl"), "train")["more"] == [[each] for each in more]


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, since root may read any."""
    write(tmp_path / "train.jsonl", ROWS)
    for name in ("iterdir", "is_dir"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, _denied)
            with pytest.raises(UserError, match=rf"^task.data={tmp_path} cannot be read \(Permission denied\)[^\n]*$"):
                open_table(task(tmp_path), "train")


def _denied(path: Path) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


EVIL = "import os\nos.mkdir({trace!r})\nimport datasets\nclass Evil(datasets.GeneratorBasedBuilder): ...\n"
README = "---\nconfigs:\n- config_name: default\n  data_files: /etc/passwd\n---\n"


@pytest.mark.parametrize("named", ["", "evil.py"])
def test_a_strangers_folder_brings_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    folder, trace = tmp_path / "evil", tmp_path / "ran"
    folder.mkdir()
    for name in ("evil.py", "datasets.py", "json.py", "__init__.py"):
        (folder / name).write_text(EVIL.format(trace=str(trace)))
    (folder / "README.md").write_text(README)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^[^\n]*$"):
        open_table(task(f"evil/{named}".rstrip("/")), "train")
    write(folder / "train.jsonl", ROWS)
    assert len(open_table(task("evil"), "train")) == 40
    assert not trace.exists()


def test_a_hub_data_set_is_read_by_the_readers_of_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is stood in for by a folder of the same layout."""
    import datasets

    write(tmp_path / "main" / "test.parquet", ROWS)
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: main\n  data_files: main/*.parquet\n---\n")
    real = datasets.load_dataset_builder

    def hub(name: str, configuration: str | None) -> Any:
        assert name == "open/problems"
        return real(str(tmp_path), configuration)

    monkeypatch.setattr(datasets, "load_dataset_builder", hub)
    of_hub = task("open/problems", configuration="main", eval_split="train", train_split="x")
    assert open_table(of_hub, "eval")["answer"] == [row["answer"] for row in ROWS]
    with pytest.raises(UserError, match=r"^[^\n]*could not be loaded from the hub[^\n]*$"):
        open_table(of_hub, "train")  # no such split

    (tmp_path / "README.md").unlink()
    (tmp_path / "main" / "test.parquet").unlink()
    (tmp_path / "train.txt").write_text("text\n")
    with pytest.raises(UserError, match=r"task.data=open/problems is read by text; only data of .jsonl"):
        open_table(task("open/problems"), "train")
