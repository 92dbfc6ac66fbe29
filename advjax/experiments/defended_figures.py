"""Pictures of the defences at test time."""

import pathlib
from collections.abc import Sequence

import numpy as np

from advjax.core.typing import Array
from advjax.experiments.figures import plt


def accuracy_matrix(
    values: Array,
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
    path: pathlib.Path,
    *,
    row_label: str = "attacked",
    column_label: str = "shown to",
) -> None:
    """Heat map of accuracies, by default a row what was attacked, a column what it is shown to.

    Args:
      values: f32[rows, columns] in [0, 1].
      row_names: a name a row.
      column_names: a name a column.
      title: above it.
      path: where to.
      row_label: what the rows are.
      column_label: what the columns are.
    """
    figure, axis = plt.subplots(
        figsize=(2.2 + 0.7 * len(column_names), 1.8 + 0.5 * len(row_names)), layout="constrained"
    )
    picture = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(np.asarray(values)):
        axis.text(j, i, f"{value:.0%}", ha="center", va="center", fontsize=8,
                  color="black" if value > 0.6 else "white")  # fmt: skip
    axis.set_xticks(range(len(column_names)), column_names, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(row_names)), row_names, fontsize=8)
    axis.set(xlabel=column_label, ylabel=row_label)
    axis.set_title(title, fontsize=10)
    figure.colorbar(picture, ax=axis, shrink=0.8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
