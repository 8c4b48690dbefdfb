"""Tables: cells with intervals and footnotes, for the page and for CSV."""

import math
from dataclasses import dataclass

from launch.reporting.data.statistics import Estimate

ABSENT = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A word or a number, its interval, and its footnote."""

    value: str | Estimate
    digits: int = 3
    note: str = ""  # a key of paper.FOOTNOTES

    @property
    def text(self) -> str:
        """ "0.846 ± 0.032" with the interval of one evaluation, "0.846 [0.81, 0.86]" with one over seeds, or "-"."""
        return f"{self.number} {self.interval}".rstrip()

    @property
    def number(self) -> str:
        if isinstance(self.value, str):
            return self.value
        return f"{self.value.value:.{self.digits}f}" if math.isfinite(self.value.value) else ABSENT

    @property
    def interval(self) -> str:
        """Empty where there is none."""
        if isinstance(self.value, str) or not self.value.has_interval:
            return ""
        if self.value.num == 1:
            half = max(self.value.high - self.value.value, self.value.value - self.value.low)
            return f"± {half:.{self.digits}f}"
        return f"[{self.value.low:.{self.digits}f}, {self.value.high:.{self.digits}f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    cells: tuple[Cell, ...]
    of_paper: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table of the report; `key` names its file when it is exported."""

    key: str
    number: str = ""  # in the paper: "Table 2"
    title: str
    caption: str
    paper_caption: str = ""  # on the paper's rows
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def lines(self) -> list[list[str | float]]:
        """The table for a CSV file: a number and the ends of its interval have a column each."""
        wide = [any(isinstance(row.cells[i].value, Estimate) for row in self.rows) for i in range(len(self.columns))]
        head: list[str | float] = ["source"]
        for column, is_wide in zip(self.columns, wide, strict=True):
            head += [column, f"{column}, low", f"{column}, high"] if is_wide else [column]
        lines = [head]
        for row in self.rows:
            line: list[str | float] = ["paper" if row.of_paper else "runs"]
            for cell, is_wide in zip(row.cells, wide, strict=True):
                if isinstance(cell.value, Estimate):
                    numbers = (cell.value.value, cell.value.low, cell.value.high)
                    line += [x if math.isfinite(x) else "" for x in numbers]
                else:
                    line += [cell.value, "", ""] if is_wide else [cell.value]
            lines.append(line)
        return lines
