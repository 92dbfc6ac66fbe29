"""Pictures of defences."""

import pathlib
from collections.abc import Mapping

import numpy as np

from advjax.core.typing import Array
from advjax.experiments.figures import plt
from advjax.experiments.grids import Grid


def grouped_bars(grid: Grid, *, ylabel: str, path: pathlib.Path) -> None:
    """A table as bars: a group a column, a bar a row.

    Args:
      grid: of percentages.
      ylabel: what they are of.
      path: where to.
    """
    values = grid.mean()
    num_rows, num_columns = values.shape
    figure, axis = plt.subplots(
        figsize=(max(5.2, 0.9 * num_columns + 0.15 * num_rows * num_columns), 4.0),
        layout="constrained",
    )
    width = 0.8 / num_rows
    for number, (name, row) in enumerate(zip(grid.rows, values, strict=True)):
        left = np.arange(num_columns) + (number - (num_rows - 1) / 2) * width
        axis.bar(left, row, width, label=name, color=f"C{number % 10}")
    axis.set(ylabel=ylabel, ylim=(0, 105))
    axis.set_xticks(np.arange(num_columns), grid.columns, rotation=20, ha="right", fontsize=8)
    axis.set_title(grid.title, fontsize=9)
    axis.grid(alpha=0.3, axis="y")
    # Beside the bars, which may fill the panel.
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def gradient_norms(
    norms: Mapping[str, Mapping[str, Array]], *, title: str, path: pathlib.Path
) -> None:
    """Histograms of gradient norms on a logarithmic axis; what is exactly zero has its own bar.

    Args:
      norms: loss to network to the norm of each image's gradient, f32[n]; a panel a loss.
      title: of the figure.
      path: where to.
    """
    everything = np.concatenate([n for by_name in norms.values() for n in by_name.values()])
    positive = np.log10(everything[everything > 0])
    low, high = (np.floor(positive.min()), np.ceil(positive.max())) if positive.size else (-1, 0)
    edges = np.linspace(low, high + (low == high), 41)
    at_zero = low - 0.1 * (high - low)
    figure, axes = plt.subplots(
        1, len(norms), figsize=(4.6 * len(norms), 3.6), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis, (loss, by_name) in zip(axes[0], norms.items(), strict=True):
        for number, (name, values) in enumerate(by_name.items()):
            values = np.asarray(values, np.float64)
            logarithms = np.log10(values[values > 0])
            axis.hist(
                logarithms, edges, weights=np.ones_like(logarithms) / len(values), alpha=0.6,
                color=f"C{number}", label=name,
            )  # fmt: skip
            shift = 0.03 * (high - low) * (number - (len(by_name) - 1) / 2)
            axis.bar(at_zero + shift, np.mean(values == 0), 0.03 * (high - low), color=f"C{number}")
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        axis.set_xticks([at_zero, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
        axis.set(xlabel="log10 of the L2 norm of the gradient")
        axis.set_title(loss, fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("share of the images")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
