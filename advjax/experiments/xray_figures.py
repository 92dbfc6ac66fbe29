"""Pictures of detection studies: maps of classes, ROC curves, scores, re-readings."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from advjax.boundary import Plane
from advjax.core.typing import Array
from advjax.detectors import Summary, Verdict

_MOST_NAMED = 10  # classes in the legend


def label_maps(
    maps: Sequence[Array],
    planes: Sequence[Plane],
    triples: Sequence[Sequence[int]],
    class_names: Sequence[str],
    titles: Sequence[str],
    path: pathlib.Path,
    *,
    columns: int = 5,
) -> None:
    """Planes in the colours of their classes, with the three images' places.

    Args:
      maps: int32[density, density] each; points without a class (-1) are black.
      planes: what they are maps of.
      triples: true classes of the three images, by plane.
      class_names: by class.
      titles: by plane.
      path: where to.
      columns: planes a row.
    """
    rows = -(-len(maps) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns + 1.6, 2.7 * rows), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    points = np.concatenate([np.ravel(m) for m in maps])
    sizes = np.bincount(points[points >= 0], minlength=len(class_names))
    # The large regions get the colours that differ most.
    order = np.argsort(-sizes, kind="stable")
    colours = np.empty((len(class_names) + 1, 4))
    colours[-1] = 0, 0, 0, 1
    colours[order] = plt.get_cmap("tab20")(np.arange(len(class_names)) % 20)
    for axis in axes.ravel()[len(maps) :]:
        axis.axis("off")
    for axis, labels, plane, triple, title in zip(
        axes.ravel(), maps, planes, triples, titles, strict=False
    ):
        across, down = np.asarray(plane.across), np.asarray(plane.down)
        picture = colours[np.asarray(labels)]
        axis.imshow(
            np.swapaxes(picture, 0, 1), origin="lower", interpolation="nearest", aspect="auto",
            extent=(across[0], across[-1], down[0], down[-1]),
        )  # fmt: skip
        for corner, label in zip(np.asarray(plane.corners), triple, strict=True):
            axis.plot(*corner, "o", color=colours[label], markeredgecolor="black", markersize=6)
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=6)
    shown = [label for label in order if sizes[label]][:_MOST_NAMED]
    handles = [plt.Line2D([], [], marker="s", linestyle="", color=colours[k]) for k in shown]
    figure.legend(
        handles, [class_names[k] for k in shown], fontsize=7, loc="outside right center",
        title="largest regions", title_fontsize=7,
    )  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)


def roc(summaries: Mapping[str, Summary], path: pathlib.Path) -> None:
    """ROC curves, a panel a detector and a curve an attack.

    Args:
      summaries: by detector.
      path: where to.
    """
    shown = {name: summary for name, summary in summaries.items() if summary.attacks}
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.2 * len(shown) + 0.4, 3.4), squeeze=False, layout="constrained"
    )
    for axis, (name, summary) in zip(axes[0], shown.items(), strict=True):
        for attack, found in summary.attacks.items():
            axis.plot(*found.roc.T, label=f"{attack} {found.auroc:.2f}", linewidth=1.4)
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="clean models flagged", ylabel="infected models flagged")
        axis.legend(fontsize=7, title="AUROC", title_fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def scores(verdicts: Sequence[Verdict], path: pathlib.Path) -> None:
    """Each model's score as a point, a panel a detector and a column a kind of model.

    Args:
      verdicts: one a detector and model.
      path: where to.
    """
    names = list(dict.fromkeys(v.detector for v in verdicts if v.score is not None))
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.2 * len(names) + 0.4, 3.2), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        mine = [v for v in verdicts if v.detector == name and v.score is not None]
        kinds = list(dict.fromkeys(v.attack for v in mine))
        for place, kind in enumerate(kinds):
            values = [v.score for v in mine if v.attack == kind]
            spread = np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else [0.0]
            axis.plot(place + np.asarray(spread), values, "o", markersize=3.5, alpha=0.7)
        axis.set_xticks(range(len(kinds)), kinds, rotation=30, fontsize=7)
        axis.set_title(f"{name}, higher: more likely infected", fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def readings(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Mean AUROC over the attacks against each setting that varies, both readings.

    Args:
      rows: of readings.csv.
      path: where to.
    """
    varied = [v for v in dict.fromkeys(row["varies"] for row in rows) if v != "base"] or ["base"]
    figure, axes = plt.subplots(
        1, len(varied), figsize=(2.7 * len(varied) + 0.6, 2.8), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], varied, strict=True):
        column = "planes" if name == "base" else name
        for reading in dict.fromkeys(row["reading"] for row in rows):
            mine = [
                row for row in rows if row["reading"] == reading and row["varies"] in (name, "base")
            ]
            values = sorted({row[column] for row in mine})
            means = [np.mean([r["auroc"] for r in mine if r[column] == v]) for v in values]
            axis.plot(values, means, "o-", markersize=3.5, label=reading)
        axis.axhline(0.5, color="0.7", linewidth=0.8)
        axis.set(xlabel=column, ylabel="mean AUROC", ylim=(-0.02, 1.02))
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
