"""The results of launch/benchmarks/scaling.py as one JSON object, as tables and as a chart."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from launch.benchmarks import step_results
from launch.benchmarks.scaling_measured import PHASES, Measured, Point, Step
from launch.benchmarks.scaling_model import Model, Work, fitted, interval, ring_factors
from launch.planning.plan import Plan
from launch.reporting import figure, style

EXTRAPOLATED_DEVICES = (8, 64, 512)
FIXED_PROMPTS = 512  # of an extrapolated step at fixed work: fewer would leave devices without any
GOAL_SUMS_FRACTION, GOAL_PUBLISH_RATIO = 0.02, 1.5
COLOURS = {"growing": "#0069a8", "fixed": "#c65200"}
UNKNOWN = (
    "What the model cannot know: all points are of one machine, whose devices share memory bandwidth and caches and "
    "whose network is its loopback. What devices of their own gain, and what a real network costs, is in no point.",
    "The jitter of many shares is drawn from few: its tail may be longer. Sums are those of gloo's ring; one maximum "
    "per step stands for the waiting at each of them. The driver's line is extrapolated as it is: serial.",
    "The intervals (95 %) are of the coefficients; they hold where the model does.",
)


def work_of(measured: Measured, plan: Plan) -> Work:
    """The work of a step, counted: what the ranks sum, and the lengths that were sampled."""
    widest = max(measured.steps, key=lambda step: step.point.ranks)
    exchanges = [each for each in widest.ranks[0].sums if each.what == "exchange"]
    columns = [round(each.bytes / (4 * widest.tokens)) for each in exchanges]
    return Work(
        groups=tuple(group for step in measured.steps for group in step.groups),
        gradient_bytes=4 * plan.num_adapter_parameters,
        exchange_token_bytes=tuple(4 * number for number in columns),
        num_reduces=plan.config.learner.inner_updates * plan.config.learner.mini_batches,
    )


def summary(plan: Plan, measured: Measured) -> dict[str, Any]:
    """A row for each measured and each extrapolated point; `plan` is that of the first contender."""
    layout = plan.config.cluster.layout
    steps: dict[Point, list[Step]] = {}
    for step in measured.steps:
        steps.setdefault(step.point, []).append(step)
    model = fitted(measured, work_of(measured, plan))
    base = Point(ranks=plan.config.learner.num_ranks, actors=plan.config.actor.num_actors, prompts=0)
    fixed = min(point.prompts for point in steps)
    speed = {point: statistics.median(step.tokens / step.seconds for step in each) for point, each in steps.items()}
    rows = []
    for point in sorted(steps, key=lambda each: (each.devices(layout), each.prompts)):
        number = point.devices(layout)
        work = "fixed" if point.prompts == fixed else "growing" if point.prompts == fixed * number else "fit only"
        reference = _reference(point, base, work, number / base.devices(layout))
        efficiency = None
        if reference in speed:
            efficiency = speed[point] / speed[reference] * base.devices(layout) / number
        rows.append(
            _row(model, point, reference, work, number, base.devices(layout))
            | {"measured": _measured(steps[point]) | {"efficiency": efficiency}}
        )
    widest = max(steps, key=lambda each: each.devices(layout))
    for number in EXTRAPOLATED_DEVICES:
        ranks, actors = (max(1, round(n * number / widest.devices(layout))) for n in (widest.ranks, widest.actors))
        for work, prompts in (("growing", fixed * number), ("fixed", FIXED_PROMPTS)):
            point = Point(ranks=ranks, actors=actors, prompts=prompts)
            reference = _reference(point, base, work, number / base.devices(layout))
            rows.append(_row(model, point, reference, work, number, base.devices(layout)) | {"measured": None})
    return {
        "machine": step_results.machine(),
        "settings": plan.config.model_dump(mode="json"),
        "nodes": measured.num_nodes,
        "adapter_bytes": measured.adapter_bytes,
        "group_bytes_per_prompt": statistics.mean(step.group_bytes / step.point.prompts for step in measured.steps),
        "gradient_bytes": model.work.gradient_bytes,
        "exchange_token_bytes": model.work.exchange_token_bytes,
        "rows": rows,
        "coefficients": {
            name: {"fit": each.coefficients.tolist(), "intervals": [interval(column) for column in each.all.T]}
            for name, each in model.fits().items()
        },
        "sums": _sums(steps),
        "publish": _publishes(measured),
    }


def _reference(point: Point, base: Point, work: str, times: float) -> Point:
    """The point of the first contender with which one of `times` its devices is compared."""
    prompts = point.prompts if work == "fixed" else round(point.prompts / times)
    return Point(ranks=base.ranks, actors=base.actors, prompts=prompts)


def _row(model: Model, point: Point, reference: Point, work: str, number: int, base_devices: int) -> dict[str, Any]:
    seconds, speed = model.seconds(point), model.tokens_per_second(point)
    efficiency = speed / model.tokens_per_second(reference) * base_devices / number
    tokens = model.work.group_tokens * point.prompts
    statistics_bytes = sum(model.work.exchange_token_bytes) * tokens if point.ranks > 1 else 0
    gradient_bytes = model.work.gradient_bytes * model.work.num_reduces if point.ranks > 1 else 0
    return {
        **asdict(point),
        "devices": number,
        "work": work,
        "modelled": {
            "seconds": float(seconds[0]),
            "seconds_interval": interval(seconds),
            "tokens_per_second": float(speed[0]),
            "tokens_per_second_interval": interval(speed),
            "efficiency": float(efficiency[0]),
            "efficiency_interval": interval(efficiency),
            "phases": {name: float(each[0]) for name, each in model.phases(point).items()},
            "bytes": {
                "reduce": gradient_bytes,
                "exchange": statistics_bytes,
                "sent_by_a_rank": ring_factors(point.ranks, gradient_bytes + statistics_bytes)[1],
            },
        },
    }


def _measured(steps: Sequence[Step]) -> dict[str, Any]:
    """Medians of a point's steps."""
    seconds = [step.seconds for step in steps]
    summed = [each for step in steps for each in step.ranks[0].sums]
    return {
        "seconds": statistics.median(seconds),
        "seconds_range": (min(seconds), max(seconds)),
        "tokens_per_second": statistics.median(step.tokens / step.seconds for step in steps),
        "phases": {name: statistics.median(step.phases[name] for step in steps) for name in PHASES},
        "bytes": {
            what: sum(each.bytes for each in summed if each.what == what) / len(steps)
            for what in ("reduce", "exchange")
        }
        | {"groups": statistics.mean(step.group_bytes for step in steps)},
    }


def _sums(steps: Mapping[Point, Sequence[Step]]) -> list[dict[str, Any]]:
    """What the sums over the ranks take of a step, without the waiting for the slowest rank and with it."""
    return [
        asdict(point)
        | {
            "fraction_of_step": statistics.median(step.phases["sums"] / step.seconds for step in each),
            "wait_fraction_of_step": statistics.median(step.phases["wait"] / step.seconds for step in each),
        }
        for point, each in steps.items()
        if point.ranks > 1
    ]


def _publishes(measured: Measured) -> list[dict[str, Any]]:
    """Seconds of publishing to each number of actors, and the ratio to one actor in the same round."""
    seconds: dict[int, list[float]] = {}
    for each in measured.publishes:
        seconds.setdefault(each.actors, []).append(each.seconds)
    return [
        {
            "actors": actors,
            "seconds": statistics.median(each),
            "seconds_range": (min(each), max(each)),
            "ratio_to_one": statistics.median(a / b for a, b in zip(each, seconds[1], strict=True)),
        }
        for actors, each in seconds.items()
    ]


def findings(summary: Mapping[str, Any]) -> list[str]:
    """The two goals with what was measured, and what the model cannot know."""
    lines = []
    for row in summary["sums"]:
        met = "met" if row["fraction_of_step"] <= GOAL_SUMS_FRACTION else "missed"
        lines.append(
            f"reduce and exchange, {row['ranks']} ranks, {row['prompts']} prompts: "
            f"{100 * row['fraction_of_step']:.2f} % of a step (goal {100 * GOAL_SUMS_FRACTION:.0f} %: {met}); "
            f"waiting for the slowest rank {100 * row['wait_fraction_of_step']:.1f} %"
        )
    last = summary["publish"][-1]
    met = "met" if last["ratio_to_one"] <= GOAL_PUBLISH_RATIO else "missed"
    lines.append(
        f"publishing to {last['actors']} actors: {last['ratio_to_one']:.2f} times publishing to one "
        f"(goal {GOAL_PUBLISH_RATIO}: {met})"
    )
    return [*lines, *UNKNOWN]


def tables(summary: Mapping[str, Any]) -> Iterable[Table]:
    """Steps, phases, bytes and publishes."""
    yield _table_of_steps(summary["rows"])
    yield _table_of_phases(summary["rows"])
    yield _table_of_bytes(summary)
    drawn = Table("actors", "s/publish", "range", "times that of one", title="publishing, measured")
    for row in summary["publish"]:
        low, high = row["seconds_range"]
        drawn.add_row(
            str(row["actors"]), f"{row['seconds']:.3f}", f"{low:.3f}-{high:.3f}", f"{row['ratio_to_one']:.2f}"
        )
    yield drawn


def _table_of_steps(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Steps: measured columns on the left, modelled ones on the right."""
    each = ("s/step", "range", "tokens/s", "efficiency", "s/step", "[95 %]", "tokens/s", "efficiency", "[95 %]")
    columns = [f"{'measured' if i < 4 else 'modelled'}\n{name}" for i, name in enumerate(each)]
    drawn = Table("devices", "ranks", "actors", "prompts", "work", *columns)
    for row in rows:
        found, modelled = row["measured"], row["modelled"]
        measured = ["-"] * 4
        if found:
            efficiency = "-" if found["efficiency"] is None else f"{found['efficiency']:.2f}"
            measured = [f"{found['seconds']:.2f}", _range(found["seconds_range"]), f"{found['tokens_per_second']:.0f}"]
            measured.append(efficiency)
        drawn.add_row(
            *(str(row[name]) for name in ("devices", "ranks", "actors", "prompts", "work")),
            *measured,
            f"{modelled['seconds']:.2f}",
            _range(modelled["seconds_interval"]),
            f"{modelled['tokens_per_second']:.0f}",
            f"{modelled['efficiency']:.2f}",
            _range(modelled["efficiency_interval"]),
        )
    return drawn


def _range(values: Sequence[float]) -> str:
    return "-".join(f"{value:.2f}" for value in values)


def _table_of_phases(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds of each phase; the model has the waiting in its expected maxima."""
    sides = {"measured": PHASES, "modelled": tuple(name for name in PHASES if name != "wait")}
    columns = [f"{side}\n{name}" for side, names in sides.items() for name in names]
    drawn = Table("devices", "prompts", *columns, title="seconds by phase")
    for row in rows:
        cells = [
            f"{row[side]['phases'][name]:.3f}" if row[side] else "-" for side, names in sides.items() for name in names
        ]
        drawn.add_row(str(row["devices"]), str(row["prompts"]), *cells)
    return drawn


def _table_of_bytes(summary: Mapping[str, Any]) -> Table:
    """MB of a step: counted in the ranks, and by formula."""
    names = ("measured\ngradient", "measured\nstatistics", "measured\ngroups", "modelled\ngradient")
    more = ("modelled\nstatistics", "modelled\nsent by a rank", "modelled\ngroups", "adapter to a node")
    drawn = Table("devices", "prompts", *names, *more, title="MB per step")
    for row in summary["rows"]:
        counted, formula = row["measured"] and row["measured"]["bytes"], row["modelled"]["bytes"]
        cells = [counted[name] for name in ("reduce", "exchange", "groups")] if counted else [None] * 3
        cells += [formula[name] for name in ("reduce", "exchange", "sent_by_a_rank")]
        cells += [summary["group_bytes_per_prompt"] * row["prompts"], summary["adapter_bytes"]]
        texts = ["-" if each is None else f"{each / 1e6:.3f}" for each in cells]
        drawn.add_row(str(row["devices"]), str(row["prompts"]), *texts)
    return drawn


def keep(folder: Path, summary: Mapping[str, Any]) -> None:
    """scaling.json and scaling.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling.json").write_text(json.dumps(summary, indent=1))
    (folder / "scaling.png").write_bytes(style.png(chart(summary["rows"])))


def chart(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Throughput and efficiency by devices: measured points, and modelled ones with their intervals."""
    with mpl.rc_context(style.RC):
        drawn, panels = figure.panels(2, width=4.4, height=3.2)
        names = {"tokens_per_second": "tokens/s", "efficiency": "efficiency"}
        for axes, (name, label) in zip(panels, names.items(), strict=True):
            for work, colour in COLOURS.items():
                chosen = [row for row in rows if row["work"] == work or row is rows[0]]
                points = [(row["devices"], row["measured"][name]) for row in chosen if row["measured"]]
                axes.plot(*zip(*points, strict=True), "o", color=colour, label=f"{work} work, measured")
                modelled = [row for row in chosen if row["prompts"] == FIXED_PROMPTS or work == "growing"]
                values = np.array([(r["modelled"][name], *r["modelled"][f"{name}_interval"]) for r in modelled])
                at = [row["devices"] for row in modelled]
                axes.plot(at, values[:, 0], "-", color=colour, label=f"{work} work, modelled")
                axes.fill_between(at, values[:, 1], values[:, 2], color=colour, alpha=0.2, linewidth=0)
            axes.set(xscale="log", xlabel="devices (band: 95 % interval)", ylabel=label)
            axes.set_xticks(sorted({row["devices"] for row in rows}))
            axes.minorticks_off()
            axes.xaxis.set_major_formatter("{x:g}")
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_formatter("{x:g}")
        panels[1].set_ylim(bottom=0)
        figure.legend(drawn, panels)
    return drawn
