"""What a person sees: a live panel on a terminal, plain lines elsewhere."""

import io

import pytest
import tiny
from rich.console import Console

from launch.recording.console import Display

METRICS = {
    "reward/mean": 1.25,
    "reward/std": 0.5,
    "reward/correct_fraction": 0.25,
    "reward/parts/correct": 0.75,
    "reward/parts/my [bold]own": -2.5,  # a name that a user chose: no markup
    "kl/mean": 0.0123,
    "entropy/normalized_mean": 0.0291,
    "weight/mean": 0.516,
    "completion/length_mean": 243.0,
    "staleness/mean": 4 / 3,
    "throughput/tokens_per_second": 61.0,
    "time/step_seconds": 9.5,
    "idle/mean_fraction": 0.376,
}

NUMBERS = {"pass_at_1": 0.5, "ci95": 0.1, "wilson95": [0.4, 0.6], "reward_mean": 3.0, "num_problems": 9} | {
    "num_truncated": 0
}


def shown(terminal: bool, **dimensions) -> str:
    out = io.StringIO()
    display = Display("a run", steps=4, console=Console(file=out, force_terminal=terminal, **dimensions))
    display.step(1, METRICS)
    display.step(2, {name: value for name, value in METRICS.items() if name != "kl/mean"})  # beta 0 measures none
    display.sample(2, tiny.group(1, [2, 3], [4.0, None]))
    display.evaluation(
        {"step": 2, "seconds": 1.0, "k": 4, "pass_at_k": 0.75, **NUMBERS, "mean_at_4": 0.6, "mean_at_4_ci95": 0.05}
        | {"sets": {"math500": NUMBERS | {"num_truncated": 3}}}
    )
    display.close()
    return out.getvalue()


def test_plain_lines():
    lines = shown(False, soft_wrap=True).splitlines()
    assert lines[0].startswith(
        "step 1/4 reward 1.25 ± 0.50 correct 0.25 kl 0.0123 entropy 0.0291 weight 0.516 length 243"
    )
    assert "(correct 0.75 my [bold]own -2.50) left" in lines[0]
    assert lines[0].endswith("left 0:28")  # three steps of 9.5 s
    assert " stale 1.3 " in lines[0]
    assert " s/step 9.5 idle 0.38 (" in lines[0]
    assert "kl -" in lines[1]
    assert any(line.startswith("best, reward 4 (correct 4), stop:") for line in lines)
    numbers = "Pass@1 0.500 ± 0.100 [0.400, 0.600]"
    assert lines[-2] == f"evaluation at step 2: {numbers}, mean@4 0.600 ± 0.050, reward 3.000, 9 problems, 1.0 s"
    assert lines[-1] == f"evaluation at step 2, math500: {numbers}, reward 3.000, 9 problems, 3 truncated"


@pytest.mark.parametrize("width", [140, 90])
def test_live_panel(width):
    panel = shown(True, width=width, height=40)
    assert "…" not in panel, "a column is cut off"
    assert "a run  step 2/4" in panel
    assert "reward of step 2: correct 0.75 my [bold]own -2.50" in panel
    for label in (
        "reward",
        "correct",
        "kl",
        "entropy",
        "weight",
        "length",
        "tok/s",
        "s/step",
        "1.25",
        "0.0123",
        "stale",
        "1.3",
        "idle",
        "0.38",
    ):
        assert label in panel


@pytest.mark.parametrize(("versions", "cell"), [(0.0, "0"), (0.5, "0.5"), (1.0, "1"), (1.3333, "1.3"), (2.0, "2")])
def test_a_synchronous_run_shows_a_plain_zero(versions, cell):
    out = io.StringIO()
    display = Display("a run", steps=4, console=Console(file=out, soft_wrap=True))
    display.step(1, METRICS | {"staleness/mean": versions})
    assert f" stale {cell} " in out.getvalue()


def test_a_reward_without_parts_shows_none():
    for terminal in (False, True):
        out = io.StringIO()
        display = Display("a run", steps=4, console=Console(file=out, force_terminal=terminal, width=300))
        display.step(1, {"reward/mean": 1.25, "time/step_seconds": 2.0})
        display.close()
        assert "()" not in out.getvalue()
        assert "reward of step" not in out.getvalue()
