"""Pictures of federated training."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from advjax.data import Dataset
from advjax.experiments.figures import plt
from advjax.experiments.grids import Grid, deviation
from advjax.federated import Partition

_LINES = ("-", "--", ":")  # ten colours with each


def heatmap(grid: Grid, path: pathlib.Path, *, lower_is_better: bool = False) -> None:
    """A table in colours, with its numbers.

    Args:
      grid: values in percent.
      path: where to.
      lower_is_better: whether a small number is good for the rule.
    """
    mean = grid.mean()
    num_rows, num_columns = mean.shape
    figure, axis = plt.subplots(
        figsize=(1.6 + 0.85 * num_columns, 1.2 + 0.42 * num_rows), layout="constrained"
    )
    colours = "viridis_r" if lower_is_better else "viridis"
    image = axis.imshow(mean, cmap=colours, vmin=0, vmax=100, aspect="auto")
    for i in range(num_rows):
        for j in range(num_columns):
            if np.isfinite(mean[i, j]):
                is_dark = (mean[i, j] > 60) if lower_is_better else (mean[i, j] < 60)
                axis.text(
                    j, i, f"{mean[i, j]:.1f}", ha="center", va="center", fontsize=8,
                    color="white" if is_dark else "black",
                )  # fmt: skip
    axis.set_xticks(range(num_columns), grid.columns, rotation=30, ha="right", fontsize=9)
    axis.set_yticks(range(num_rows), grid.rows, fontsize=9)
    axis.set_title(grid.title, fontsize=10)
    figure.colorbar(image, ax=axis, shrink=0.8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves(rows: Sequence[Mapping[str, Any]], config: Any, path: pathlib.Path) -> None:
    """Accuracy over rounds, a panel a rule, a line an attack; the band is one deviation over seeds.

    Args:
      rows: rows with seed, attack, rule, round, accuracy.
      config: has rules, dataset and model.
      path: where to.
    """
    num_columns = min(4, len(config.rules))
    num_rows = -(-len(config.rules) // num_columns)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(3.1 * num_columns, 2.5 * num_rows + 0.6), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(config.rules) :]:
        axis.set_axis_off()
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    for axis, rule in zip(axes.flat, config.rules, strict=False):
        for number, attack in enumerate(attacks):
            by_round: dict[int, list[float]] = {}
            for row in rows:
                if row["rule"] == rule and row["attack"] == attack:
                    by_round.setdefault(row["round"], []).append(row["accuracy"])
            if not by_round:
                continue
            rounds = sorted(by_round)
            mean = np.array([np.mean(by_round[r]) for r in rounds])
            spread = np.array([deviation(by_round[r]) for r in rounds])
            axis.plot(
                rounds, mean, label=attack, color=f"C{number % 10}", linewidth=1.2,
                linestyle=_LINES[number // 10 % len(_LINES)],
            )  # fmt: skip
            if np.any(spread):
                axis.fill_between(
                    rounds, mean - spread, mean + spread, color=f"C{number % 10}", alpha=0.2
                )
        axis.set_title(rule, fontsize=9)
        axis.grid(alpha=0.3)
        axis.set_ylim(0, 1)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy")
    for axis in axes[-1]:
        axis.set_xlabel("round")
    handles, labels = max(
        (axis.get_legend_handles_labels() for axis in axes.flat), key=lambda pair: len(pair[1])
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"{config.dataset}, {config.model}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def partition(clients: Partition, dataset: Dataset, num_byzantine: int, path: pathlib.Path) -> None:
    """How many images of which class each client holds, as stacked bars.

    Args:
      clients: the partition.
      dataset: the training images.
      num_byzantine: the first of the clients are malicious.
      path: where to.
    """
    n = len(clients.counts)
    held = np.zeros((n, dataset.num_classes), int)
    for client in range(n):
        mine = np.asarray(clients.index[client])[: int(clients.counts[client])]
        held[client] = np.bincount(dataset.labels[mine], minlength=dataset.num_classes)
    figure, axis = plt.subplots(figsize=(max(5.0, 0.16 * n + 2), 3.2), layout="constrained")
    below = np.zeros(n, int)
    colours = plt.get_cmap("tab20")(np.linspace(0, 1, dataset.num_classes))
    for label in range(dataset.num_classes):
        axis.bar(
            range(n), held[:, label], bottom=below, color=colours[label], width=0.9,
            label=dataset.class_names[label],
        )  # fmt: skip
        below += held[:, label]
    if num_byzantine:
        axis.axvspan(-0.5, num_byzantine - 0.5, color="red", alpha=0.12, zorder=0)
        axis.set_xlabel("client (shaded: malicious)")
    else:
        axis.set_xlabel("client")
    axis.set(ylabel="images", title=f"Labels of the clients: {dataset.name}", xlim=(-0.5, n - 0.5))
    if dataset.num_classes <= 20:
        axis.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)
