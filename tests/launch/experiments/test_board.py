"""What a person sees of a grid: the board of its cells, and why one of them failed."""

import io

import pytest
from ray.exceptions import RayError, RayTaskError, WorkerCrashedError
from rich.console import Console

from launch import experiment
from launch.runtime.console import Board, Progress


def shown(console: Console) -> None:
    board = Board("a grid", console=console)
    done = Progress(name="a_seed-1", state="finished", step=20, steps=20, reward=3.25)
    for step in (0, 1, 2):
        now = Progress(name="b_seed-1", state="running", step=step, steps=20, reward=1.5, left_seconds=61.0)
        board.show([done, now, Progress(name="c_seed-1", state="waiting", step=0, steps=20)], 3600.0)
    board.close()


def test_the_board_off_a_terminal_prints_what_is_new() -> None:
    out = io.StringIO()
    shown(Console(file=out, soft_wrap=True))
    assert out.getvalue().splitlines() == [
        "a_seed-1: finished 20/20 3.25 -; the grid left 60:00",
        "b_seed-1: running 0/20 1.50 1:01; the grid left 60:00",
        "c_seed-1: waiting 0/20 - -; the grid left 60:00",
        "b_seed-1: running 2/20 1.50 1:01; the grid left 60:00",
    ]


def test_the_board_shows_brackets_as_they_are() -> None:
    out = io.StringIO()
    board = Board("grid in runs/[red]", console=Console(file=out, force_terminal=True, width=100, height=30))
    board.show([Progress(name="a_[bold]_seed-1", state="running", step=0, steps=2)], None)
    board.close()
    assert "runs/[red]" in out.getvalue() and "a_[bold]_seed-1" in out.getvalue()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RayTaskError("f", "Traceback:\n  File x\nValueError: it is off\n", ValueError("it is off")),
            "ValueError: it is off",
        ),
        (WorkerCrashedError(), "The worker died unexpectedly"),
        (RayError(""), "RayError"),
    ],
)
def test_the_reason_of_a_task_that_ray_ended(error: RayError, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(_: object) -> None:
        raise error

    monkeypatch.setattr(experiment.ray, "get", get)
    assert str(experiment._reason_of(None)).startswith(f"Ray: {reason}")


def test_the_board_on_a_terminal_is_a_table_with_the_running_cells_first() -> None:
    out = io.StringIO()
    shown(Console(file=out, force_terminal=True, width=100, height=30))
    last = out.getvalue().rsplit("a grid", 1)[1]
    assert "1 running, 1 waiting, 1 finished  left 60:00" in last
    assert last.index("b_seed-1") < last.index("c_seed-1") < last.index("a_seed-1")
    for text in ("2/20", "1:01", "20/20", "3.25"):
        assert text in last
