"""What W&B, MLflow and trackio have stored of a run, read with their own code where they have any for it."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Stored:
    """One run in a tracker. Several processes may have written it, one after another."""

    ids: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    points: list[tuple[int, str, float]] = field(default_factory=list)  # step, metric, value
    tables: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # by step
    report: str | None = None
    complete: bool | None = None

    def of(self, metric: str) -> list[tuple[int, float]]:
        return sorted((step, value) for step, name, value in self.points if name == metric)


def wandb(folder: Path) -> Stored:
    """The offline-run folders below `folder`, which `wandb sync` would send."""
    stored = Stored()
    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        for record in _records(file.read_bytes()):
            if record.run.run_id:
                stored.ids.append(record.run.run_id)
                stored.config |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
            elif record.HasField("history"):
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                _add(stored, row, file.parent / "files")
            elif record.HasField("exit"):
                stored.complete = record.exit.exit_code == 0
    return stored


def _add(stored: Stored, row: dict[str, Any], files: Path) -> None:
    if "report/path" in row:
        stored.report = (files / row["report/path"]).read_text()
    elif "samples/path" in row:
        table = json.loads((files / row["samples/path"]).read_text())
        stored.tables[row["step"]] = _rows(table)
    else:
        own = {name: value for name, value in row.items() if not name.startswith("_") and name != "step"}
        stored.points += [(row["step"], name, value) for name, value in own.items()]


def _rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _records(data: bytes) -> list[Any]:
    """W&B's file is a LevelDB log behind seven bytes: blocks of 32 KiB, in which each part of a record has a checksum
    (4 bytes), a length (2) and a kind (1): 1 the whole, 2 the first, 3 one between, 4 the last."""
    from wandb.proto import wandb_internal_pb2

    records, parts, position = [], b"", 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def mlflow(uri: str, run_id: str) -> Stored:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(run_id)
    stored = Stored(ids=[run_id], config=dict(run.data.params), complete=run.info.status == "FINISHED")
    for name in run.data.metrics:
        stored.points += [(each.step, name, each.value) for each in client.get_metric_history(run_id, name)]
    for file in client.list_artifacts(run_id, "samples"):
        table = json.loads(Path(client.download_artifacts(run_id, file.path)).read_text())
        step = int(Path(file.path).stem.removeprefix("step-"))
        stored.tables[step] = _rows(table)
    if "report.html" in [file.path for file in client.list_artifacts(run_id)]:
        stored.report = Path(client.download_artifacts(run_id, "report.html")).read_text()
    return stored


def trackio(project: str, name: str) -> Stored:
    """From the local database in $TRACKIO_DIR, which must be set before trackio is first imported."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    [run] = [run for run in trackio.Api().runs(project) if run.name == name]
    stored = Stored(ids=[run.id], config=run.config or {})
    for row in SQLiteStorage.get_logs(project, name, run_id=run.id):
        if "samples" in row:
            stored.tables[row["step"]] = row["samples"]["_value"]
        else:
            stored.points += [(row["step"], n, value) for n, value in row.items() if n not in ("step", "timestamp")]
    for artifact in SQLiteStorage.get_run_artifacts(project, name, run.id)["output"]:
        assert artifact["name"].startswith("report"), artifact
        [file] = [path for path in Path(os.environ["TRACKIO_DIR"]).glob("artifacts/*/blobs/*/*/*") if path.is_file()]
        stored.report = file.read_text()
    return stored
