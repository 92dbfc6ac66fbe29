"""Pictures of FMPA's tables and figures."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from advjax.experiments.figures import plt
from advjax.experiments.grids import MISSING, Grid, deviation

_MARKERS = "osD^vPX*"


def panels(rows: Sequence[Mapping[str, Any]], title: str, axis: str, path: pathlib.Path) -> None:
    """Attack impact over the conditions, a panel a rule, a line an attack; bars over the seeds.

    Args:
      rows: rows with value, seed, attack, rule, impact.
      title: of the figure.
      axis: what the conditions are.
      path: where to.
    """
    rows = [row for row in rows if row["impact"] is not None]
    rules, attacks, values = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("rule", "attack", "value")
    )
    is_named = any(isinstance(value, str) for value in values)
    num_columns = min(4, max(1, len(rules)))
    num_rows = max(1, -(-len(rules) // num_columns))
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(3.1 * num_columns, 2.6 * num_rows + 0.7), squeeze=False,
        sharex=True, layout="constrained",
    )  # fmt: skip
    for panel in axes.flat[len(rules) :]:
        panel.set_axis_off()
    for panel, rule in zip(axes.flat, rules, strict=False):
        for number, attack in enumerate(attacks):
            points = {
                value: [
                    row["impact"]
                    for row in rows
                    if (row["rule"], row["attack"], row["value"]) == (rule, attack, value)
                ]
                for value in values
            }
            points = {value: impacts for value, impacts in points.items() if impacts}
            if not points:
                continue
            at = [values.index(value) if is_named else value for value in points]
            means = [np.mean(impacts) for impacts in points.values()]
            spread = [deviation(impacts) for impacts in points.values()]
            panel.errorbar(
                at, means, spread, label=attack, color=f"C{number}", capsize=2, linewidth=1.2,
                marker=_MARKERS[number % len(_MARKERS)], markersize=4,
                linestyle="none" if is_named else "-",
            )  # fmt: skip
        panel.set_title(rule, fontsize=9)
        panel.grid(alpha=0.3)
        panel.axhline(0, color="gray", linewidth=0.8)  # small impacts look small
        panel.set_xticks(
            range(len(values)) if is_named else values, values, fontsize=8,
            rotation=20 if is_named else 0,
        )  # fmt: skip
    for panel in axes[:, 0]:
        panel.set_ylabel("impact in %")
    # Not supxlabel, over which the legend would be drawn.
    for panel in axes[-1]:
        panel.set_xlabel(axis, fontsize=9)
    handles, labels = max(
        (panel.get_legend_handles_labels() for panel in axes.flat), key=lambda pair: len(pair[1])
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def bars(grid: Grid, path: pathlib.Path) -> None:
    """A table as groups of bars, a group a row, with one deviation over the seeds.

    Args:
      grid: the table.
      path: where to.
    """
    mean = grid.mean()
    num_rows, num_columns = mean.shape
    inches = max(6.0, 0.22 * num_rows * num_columns + 2)
    figure, axis = plt.subplots(figsize=(inches, 3.4), layout="constrained")
    width = 0.84 / num_columns
    for j, column in enumerate(grid.columns):
        at = np.arange(num_rows) + (j - (num_columns - 1) / 2) * width
        is_there = np.isfinite(mean[:, j])
        spread = [
            deviation(grid.values[row, column])
            for row, there in zip(grid.rows, is_there, strict=True)
            if there
        ]
        axis.bar(
            at[is_there], mean[is_there, j], width, yerr=spread, capsize=1.5,
            error_kw={"linewidth": 0.8}, label=column, color=f"C{j}",
        )  # fmt: skip
        for x in at[~is_there]:
            axis.text(x, 0, MISSING, ha="center", va="bottom", fontsize=7, color=f"C{j}")
    axis.set_xticks(range(num_rows), grid.rows, rotation=25, ha="right", fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    # A long title of a narrow figure would be cut off: some twelve letters an inch.
    figure.suptitle(textwrap.fill(grid.title, int(12 * inches)), fontsize=10)
    axis.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)
