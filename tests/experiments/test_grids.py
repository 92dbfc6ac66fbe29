"""Grids in the terminal: everything is there, whole and in order, however narrow it is."""

import numpy as np
import pytest
from rich.console import Console

from advjax.experiments import grids

ROWS = ["mean", "centered_clipping", "norm_bounding"]
COLUMNS = [
    "none", "sign_flip", "gaussian", "label_flip", "lie", "ipm", "min_max", "min_sum", "fang",
    "mpaf", "i_fmpa",
]  # fmt: skip
VALUES = {
    (row, column): np.array([-1, 0, 1]) / 4 + 10 * i + j
    for i, row in enumerate(ROWS, 2)
    for j, column in enumerate(COLUMNS)
    if (row, column) != ("mean", "fang")
}
GRID = grids.Grid("Test accuracy", "rule", ROWS, COLUMNS, VALUES)


def printed(grid, width):
    console = Console(width=width, force_terminal=False, record=False)
    with console.capture() as capture:
        console.print(grids.to_rich(grid, width))
    return capture.get().splitlines()


def split(lines, bars="│┃"):
    """The cells of each line that has any."""
    lines = [line for line in lines if line and line[0] in bars]
    return [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in lines]


@pytest.mark.parametrize("width, num_blocks", [(40, 11), (80, 3), (120, 2), (200, 1)])
def test_a_wide_grid_is_printed_in_blocks_that_fit(width, num_blocks):
    lines = printed(GRID, width)
    assert max(map(len, lines)) <= width
    assert " ".join(lines).count(GRID.title) == 1
    cells = split(lines)
    assert len(cells) == num_blocks * (1 + len(ROWS))  # no name and no number is folded
    blocks = [cells[i : i + 1 + len(ROWS)] for i in range(0, len(cells), 1 + len(ROWS))]
    for block in blocks:
        assert [line[0] for line in block] == ["rule", *ROWS]
    for i, expected in enumerate([COLUMNS, *GRID.texts()]):
        assert [cell for block in blocks for cell in block[i][1:]] == expected


def test_where_one_column_does_not_fit_its_name_is_folded():
    name = "an_attack_with_a_long_name"
    lines = printed(grids.Grid("T", "rule", ["krum"], [name], {("krum", name): [1.0]}), 20)
    assert max(map(len, lines)) <= 20
    assert "".join(line[1] for line in split(lines)) == name + "1.0"
