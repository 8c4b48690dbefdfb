"""W&B, MLflow and trackio behind one interface. Each is imported only in the process of its tracker (`follower.py`).

Their own environment variables decide where a run goes; what they leave open is set here.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

PROJECT = "horizon"  # W&B's and trackio's project, MLflow's experiment
MAX_PARAMS = 100  # of one of MLflow's calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a library is told when it starts."""

    folder: Path
    config: Mapping[str, Any]  # by section.key, as in config.toml
    id: str | None  # of the tracker's run that this one continues; None: there is none
    say: Callable[[str], None]  # shows the user a line

    @property
    def name(self) -> str:
        return f"{self.config['method.name']} {self.folder.resolve().name}"


class Library(Protocol):
    """A run in a tracker, which is started by the constructor. Whatever a library raises ends the tracker."""

    id: str  # with which another process continues the run

    def __init__(self, run: Run) -> None: ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of the same columns."""

    def report(self, path: Path) -> None:
        """An HTML file."""

    def finish(self, *, complete: bool) -> None:
        """The last call. `complete`: the run has ended as it should."""


class Wandb:
    """W&B. Without an API key and without WANDB_MODE it is offline. Its own step counts calls, and `step` is the axis:
    an evaluation comes after the metrics of its step, and W&B drops what goes back in its own."""

    def __init__(self, run: Run) -> None:
        import wandb

        for name, value in {
            "WANDB_PROJECT": PROJECT,
            "WANDB_NAME": run.name,
            "WANDB_RUN_GROUP": str(run.config["method.name"]),
            "WANDB_DIR": str(run.folder.resolve()),
        }.items():
            os.environ.setdefault(name, value)
        mode: Literal["offline"] | None = None  # W&B decides
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
            mode = "offline"
            folder = Path(os.environ["WANDB_DIR"]) / "wandb"
            run.say(f"no API key, so the run stays in {folder}; wandb login and wandb sync send it later")
        settings = wandb.Settings(console="off", silent=True)
        self.run = wandb.init(id=run.id, config=dict(run.config), resume="allow", mode=mode, settings=settings)
        self.id = self.run.id
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.make_table, self.make_html = wandb.Table, wandb.Html

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        table = self.make_table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.run.log({"step": step, name: table})

    def report(self, path: Path) -> None:
        self.run.log({"report": self.make_html(path.read_text(encoding="utf-8"), inject=False)})

    def finish(self, *, complete: bool) -> None:
        self.run.finish(exit_code=0 if complete else 1)


class Mlflow:
    def __init__(self, run: Run) -> None:
        import mlflow

        if "MLFLOW_EXPERIMENT_ID" not in os.environ:
            os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")  # a minute; with the default of 7 four minutes
        self.mlflow = mlflow
        started = mlflow.start_run(run_id=run.id, run_name=None if run.id else run.name)
        self.id = started.info.run_id
        if run.id is None:  # MLflow refuses another value, such as that of run.checkpoint_every in a resumed run
            mlflow.set_tag("method", run.config["method.name"])
            params = list(run.config.items())
            for first in range(0, len(params), MAX_PARAMS):
                mlflow.log_params(dict(params[first : first + MAX_PARAMS]))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        allowed = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in values.items()}
        self.mlflow.log_metrics(allowed, step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        self.mlflow.log_table(columns, f"{name}/step-{step:06d}.json")

    def report(self, path: Path) -> None:
        self.mlflow.log_artifact(str(path))

    def finish(self, *, complete: bool) -> None:
        self.mlflow.end_run("FINISHED" if complete else "FAILED")


class Trackio:
    """trackio, which finds a run again by its name only, and by default in ~/.cache/huggingface/trackio."""

    def __init__(self, run: Run) -> None:
        import trackio

        self.trackio = trackio
        self.id = run.id or f"{run.name} {os.urandom(3).hex()}"
        trackio.init(
            PROJECT,
            name=self.id,
            group=str(run.config["method.name"]),
            config=dict(run.config),
            resume="allow" if run.id else "never",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        table = self.trackio.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.trackio.log({name: table}, step=step)

    def report(self, path: Path) -> None:
        self.trackio.log_artifact(str(path), name="report", type="report")

    def finish(self, *, complete: bool) -> None:
        self.trackio.finish()


LIBRARIES: dict[str, type[Library]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def flat(tree: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """The leaves of nested tables by their joined names."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        below = flat(value, separator) if isinstance(value, Mapping) else {}
        leaves |= {f"{name}{separator}{rest}": leaf for rest, leaf in below.items()} or {name: value}
    return leaves


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a record, by their names joined with /. What is not finite, or null, is left out."""
    leaves = flat(record, "/").items()
    kept = {name: value for name, value in leaves if isinstance(value, int | float) and not isinstance(value, bool)}
    return {name: value for name, value in kept.items() if math.isfinite(value)}
