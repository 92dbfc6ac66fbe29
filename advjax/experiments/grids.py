"""Tables of two axes, such as attacks x rules: in the terminal, as CSV, Markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table

from advjax.experiments.runs import Run

MISSING = "–"  # what stands in a cell without a number


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation (over n - 1); 0 of a single value.

    Example:
      >>> deviation([1.0, 3.0]), deviation([2.0])
      (1.4142135623730951, 0.0)
    """
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


class Grid(NamedTuple):
    """A table of numbers that were measured several times.

    Attributes:
      title: what it shows.
      corner: what the rows are.
      rows: names of the rows.
      columns: names of the columns.
      values: the measurements of each (row, column); a cell without any is a dash.
      digits: decimals that are shown.
      marks: what stands after the number of a (row, column), such as " *".
    """

    title: str
    corner: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[str, str], Sequence[float]]
    digits: int = 1
    marks: Mapping[tuple[str, str], str] = {}

    def mean(self) -> np.ndarray:
        """Means f64[rows, columns]; NaN where there is none."""
        return np.array(
            [
                [np.mean(self.values.get((row, column)) or np.nan) for column in self.columns]
                for row in self.rows
            ]
        )

    def texts(self, plus_minus: str = " ± ", missing: str = MISSING) -> list[list[str]]:
        """Cells as "mean ± standard deviation", the deviation only where there are several."""

        def text(values: Sequence[float]) -> str:
            if not len(values):
                return missing
            mean = f"{np.mean(values):.{self.digits}f}"
            if len(values) == 1:
                return mean
            return f"{mean}{plus_minus}{deviation(values):.{self.digits}f}"

        return [
            [
                text(self.values.get((row, column), ())) + self.marks.get((row, column), "")
                for column in self.columns
            ]
            for row in self.rows
        ]


def to_markdown(grid: Grid) -> str:
    """The table for a README."""
    lines = [
        f"{grid.title}", "",
        f"| {grid.corner} | " + " | ".join(grid.columns) + " |",
        "|---" + "|---:" * len(grid.columns) + "|",
        *(
            f"| {row} | " + " | ".join(cells) + " |"
            for row, cells in zip(grid.rows, grid.texts(), strict=True)
        ), "",
    ]  # fmt: skip
    return "\n".join(lines)


def to_latex(grid: Grid) -> str:
    """The table for a paper; it needs the package booktabs."""

    def escape(text: str) -> str:
        for character in "_%&#":
            text = text.replace(character, "\\" + character)
        return text

    cells = [
        [f"${cell}$" if r"\pm" in cell else cell for cell in row]
        for row in grid.texts(r" \pm ", "--")
    ]
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{escape(grid.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(grid.columns)}}}", r"\toprule",
        " & ".join(map(escape, (grid.corner, *grid.columns))) + r" \\", r"\midrule",
        *(
            " & ".join((escape(row), *texts)) + r" \\"
            for row, texts in zip(grid.rows, cells, strict=True)
        ),
        r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ]  # fmt: skip
    return "\n".join(lines)


def to_rich(grid: Grid, width: int) -> Group:
    """The table for a terminal `width` characters wide: blocks of columns that fit, one below
    another, each with the names of the rows.
    """
    columns = list(zip(grid.columns, *grid.texts(), strict=True))

    def needed(texts: Sequence[str]) -> int:
        return max(map(cell_len, texts)) + 3  # a space at both sides and a line

    room = width - 1 - needed((grid.corner, *grid.rows))
    blocks, left = [[]], room
    for column in columns:
        if needed(column) > left and blocks[-1]:
            blocks.append([])
            left = room
        blocks[-1].append(column)
        left -= needed(column)
    return Group(*(_block(grid, block, is_first=i == 0) for i, block in enumerate(blocks)))


def _block(grid: Grid, columns: Sequence[Sequence[str]], *, is_first: bool) -> Table:
    table = Table(title=grid.title if is_first else None)
    table.add_column(grid.corner, no_wrap=True)
    for name, *_ in columns:
        # Where even one column does not fit, nothing of its name is lost.
        table.add_column(name, justify="right", overflow="fold")
    for i, row in enumerate(grid.rows):
        table.add_row(row, *(cells[1 + i] for cells in columns))
    return table


def write(run: Run, name: str, grid: Grid) -> None:
    """Writes NAME.csv (mean, deviation and number of each cell), NAME.md and NAME.tex."""
    run.table(
        f"{name}.csv",
        [
            {
                "row": row,
                "column": column,
                "mean": float(np.mean(values)),
                "standard_deviation": deviation(values) if len(values) > 1 else None,
                "runs": len(values),
            }
            for (row, column), values in grid.values.items()
        ],
    )
    run.text(f"{name}.md", to_markdown(grid))
    run.text(f"{name}.tex", to_latex(grid))
