"""Which runs are repetitions of one experiment, and which experiments can be compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np

from common.methods import METHODS
from launch.reporting.data.runs import OF_ONE_RUN, Run

PAPER_ALPHA = 0.5
# The fields that make a method what it is: with another value of one of them it is a composition of methods.
IDEAS = (
    *("opening", "advantage", "token_advantage", "token_weight", "alpha_end", "selective", "top_entropy_fraction"),
    "ratio",
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str  # method and alpha, and whatever else differs from the other groups of its setting
    setting: str  # model, and whatever else differs between runs that must not be compared
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        return str(self.runs[0].settings["method.name"])

    @property
    def alpha(self) -> float:
        """Of the horizon discount; 0 for a method without one."""
        settings = self.runs[0].settings
        return float(settings.get("method.alpha", 0.0)) if settings.get("method.token_weight") == "horizon" else 0.0

    @property
    def role(self) -> str:
        """Its name in the paper: "GRPO", "AH-GRPO", "SA-AH-GRPO"; "" for a method that it does not have.

        Whatever the normaliser, of which the paper has two.
        """
        if _composed(self.runs[0].settings):
            return ""
        if self.method == "grpo" or (self.method in ("ah-grpo", "sa-ah-grpo") and self.alpha == 0):
            return "GRPO"
        return {"ah-grpo": "AH-GRPO", "sa-ah-grpo": "SA-AH-GRPO"}.get(self.method, "")

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)

    @property
    def progress(self) -> str:
        """Steps done by the slowest run, of those planned where they are fewer: "30", "12 of 30"."""
        planned = self.runs[0].settings["run.steps"]
        return str(planned) if self.finished else f"{min(run.num_steps for run in self.runs)} of {planned}"

    @property
    def steps(self) -> list[int]:
        """Every step that a run recorded."""
        return sorted({int(step) for run in self.runs for step in run.steps})

    @property
    def evaluated_steps(self) -> list[int]:
        return sorted({step for run in self.runs for step in run.pass_at_1()})

    def per_seed(self, measure: Callable[[Run], float]) -> np.ndarray:
        """float [seeds], one number per seed: runs of the same seed repeat each other and are averaged."""
        values = {seed: [measure(run) for run in self.runs if run.seed == seed] for seed in self.seeds}
        return np.array([np.nanmean(v) if np.isfinite(v).any() else np.nan for v in map(np.array, values.values())])

    def curve(self, metric: str) -> np.ndarray:
        """float [seeds, steps] of a metric over `steps`; NaN where a run has none."""
        by_run = {id(run): dict(zip(run.steps.tolist(), run.series(metric).tolist(), strict=True)) for run in self.runs}

        def at(step: int) -> np.ndarray:
            return self.per_seed(lambda run: by_run[id(run)].get(step, np.nan))

        return np.array([at(step) for step in self.steps]).T.reshape(len(self.seeds), len(self.steps))


def group(runs: Sequence[Run]) -> list[Group]:
    """The runs grouped: by setting, then in the order of METHODS and of alpha."""
    identities: list[dict[str, Any]] = []
    for identity in map(_identity, runs):
        if identity not in identities:
            identities.append(identity)
    around = [{k: v for k, v in identity.items() if not k.startswith("method.")} for identity in identities]
    made = []
    for identity, setting in zip(identities, around, strict=True):
        found = [run for run in runs if _identity(run) == identity]
        name = identity["method.name"]
        peers = [other for other in identities if other["method.name"] == name]
        varying = {key.removeprefix("method.") for key in _varying(peers) if key.startswith("method.")}
        extra = (varying - {"alpha"}) | set(_composed(identity))
        changed = [f"{field}={identity.get(f'method.{field}')}" for field in sorted(extra)]
        elsewhere = [f"{k}={setting.get(k)}" for k in _varying(around) if k != "model.path"]
        alpha = [f"α {identity['method.alpha']:g}"] if identity.get("method.token_weight") == "horizon" else []
        made.append(
            Group(
                label=", ".join([str(name), *alpha, *changed]),
                setting=", ".join([found[0].model, *elsewhere]),
                runs=tuple(sorted(found, key=lambda run: (run.seed, run.name))),
            )
        )
    order = list(METHODS)
    return sorted(made, key=lambda g: (g.setting, order.index(g.method) if g.method in order else len(order), g.alpha))


def settings_of(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Setting -> its groups: those that may be compared. The groups are in the order of `group`."""
    return {setting: list(members) for setting, members in groupby(groups, key=attrgetter("setting"))}


def differences(runs: Sequence[Run]) -> list[str]:
    """The settings in which the runs differ, except their folders; what names an experiment comes first."""
    keys = [key for key in _varying([run.settings for run in runs]) if key not in ("run.dir", "run.resume")]
    first = ("model.path", "method.name", "method.alpha", "run.seed")
    return sorted(keys, key=lambda key: (first.index(key) if key in first else len(first), key))


def _identity(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if key not in OF_ONE_RUN}


def _composed(settings: Mapping[str, Any]) -> list[str]:
    """The fields of IDEAS that are not the method's defaults; none for a method that is not in METHODS."""
    method = METHODS.get(str(settings["method.name"]))
    return [field for field in IDEAS if method and settings[f"method.{field}"] != getattr(method, field)]


def _varying(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values differ between the tables, sorted."""
    keys = sorted({key for table in tables for key in table})
    return [key for key in keys if any(table.get(key) != tables[0].get(key) for table in tables)]
