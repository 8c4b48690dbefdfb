"""The board of a grid: a table on a terminal, plain lines elsewhere."""

import io

from rich.console import Console

from launch.experiments.board import Board, Progress


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
        "a_seed-1: finished 20/20 3.25 -; grid: 60:00 left",
        "b_seed-1: running 0/20 1.50 1:01; grid: 60:00 left",
        "c_seed-1: waiting 0/20 - -; grid: 60:00 left",
        "b_seed-1: running 2/20 1.50 1:01; grid: 60:00 left",
    ]


def test_the_board_shows_brackets_as_they_are() -> None:
    out = io.StringIO()
    board = Board("grid in runs/[red]", console=Console(file=out, force_terminal=True, width=100, height=30))
    board.show([Progress(name="a_[bold]_seed-1", state="running", step=0, steps=2)], None)
    board.close()
    assert "runs/[red]" in out.getvalue() and "a_[bold]_seed-1" in out.getvalue()


def test_the_board_on_a_terminal_is_a_table_with_the_running_cells_first() -> None:
    out = io.StringIO()
    shown(Console(file=out, force_terminal=True, width=100, height=30))
    last = out.getvalue().rsplit("a grid", 1)[1]
    assert "1 running, 1 waiting, 1 finished  left 60:00" in last
    assert last.index("b_seed-1") < last.index("c_seed-1") < last.index("a_seed-1")
    for text in ("2/20", "1:01", "20/20", "3.25"):
        assert text in last
