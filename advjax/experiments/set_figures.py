"""Pictures of the attacks over a set of images or of networks."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from advjax.core import metrics
from advjax.core.typing import Array, LogitsFn
from advjax.experiments.figures import _grey, _show, plt


def fooling_curves(rows: Sequence[Mapping[str, Any]], config: Any, path: pathlib.Path) -> None:
    """Share of fooled images over epsilon, on the images fitted to and on held-out ones.

    Args:
      rows: rows with method, epsilon, fooling_rate_fit, fooling_rate.
      config: has dataset, model and ball, for the title.
      path: where to.
    """
    figure, axis = plt.subplots(figsize=(5.2, 4.0), layout="constrained")
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = [row for row in rows if row["method"] == method]
        mine.sort(key=lambda row: row["epsilon"])
        epsilons = [row["epsilon"] for row in mine]
        for column, style, images in (
            ("fooling_rate", "o-", "held out"), ("fooling_rate_fit", "--", "fitted to"),
        ):  # fmt: skip
            axis.plot(
                epsilons, [row[column] for row in mine], style, color=f"C{number}", markersize=4,
                label=f"{method}, {images}",
            )  # fmt: skip
    axis.set(
        xlabel=f"epsilon ({config.ball})", ylabel="share of images fooled", ylim=(-0.02, 1.02),
        title=f"Universal perturbations: {config.dataset}, {config.model}",
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def perturbations(
    logits_fn: LogitsFn,
    x: Array,
    deltas: Mapping[str, Array],
    epsilon: float,
    class_names: Sequence[str],
    path: pathlib.Path,
) -> None:
    """Clean images in the first row; then one perturbation a row and the images with it.

    Args:
      logits_fn: classifier.
      x: clean images, f32[b, h, w, c].
      deltas: perturbation f32[h, w, c] of each method.
      epsilon: the radius, for the title and for the scale of the perturbation.
      class_names: a name a class.
      path: where to.
    """
    figure, axes = plt.subplots(
        1 + len(deltas), 1 + len(x), figsize=(1.5 * (1 + len(x)), 1.75 * (1 + len(deltas))),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    scale = max(float(epsilon), 1e-6)

    def show_images(row: int, images: Array) -> None:
        answers = np.asarray(metrics.predictions(jax.jit(logits_fn)(images)))
        for axis, image, answer in zip(axes[row, 1:], images, answers, strict=True):
            _show(axis, image, class_names[answer] if answer >= 0 else "not finite", **_grey(image))

    axes[0, 0].set_axis_off()
    show_images(0, np.asarray(x))
    for row, (method, delta) in enumerate(deltas.items(), start=1):
        if delta.shape[-1] == 1:
            _show(axes[row, 0], delta, method, cmap="RdBu_r", vmin=-scale, vmax=scale)
        else:
            _show(axes[row, 0], np.clip(0.5 + delta / (2 * scale), 0, 1), method)
        show_images(row, np.clip(x + delta, 0, 1))
    figure.suptitle(f"One perturbation (scaled to ±{epsilon:g}) for all images", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def transfer_matrix(rates: Array, names: Sequence[str], title: str, path: pathlib.Path) -> None:
    """Heat map: a row a source, a column a target.

    Args:
      rates: f32[sources, targets] in [0, 1].
      names: of the networks.
      title: above it.
      path: where to.
    """
    side = 1.6 + 0.75 * len(names)
    figure, axis = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    picture = axis.imshow(rates, vmin=0, vmax=1, cmap="viridis")
    for (i, j), rate in np.ndenumerate(np.asarray(rates)):
        axis.text(j, i, f"{rate:.0%}", ha="center", va="center", fontsize=8,
                  color="black" if rate > 0.6 else "white")  # fmt: skip
    ticks = range(len(names))
    axis.set_xticks(ticks, names, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(ticks, names, fontsize=8)
    axis.set(xlabel="target", ylabel="source (substitute)")
    axis.set_title(title, fontsize=10)
    figure.colorbar(picture, ax=axis, shrink=0.8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def confidence_curves(
    confidences: Sequence[float], rates: Mapping[str, Sequence[float]], path: pathlib.Path
) -> None:
    """Transfer rate over the confidence kappa of Carlini and Wagner's attack.

    Args:
      confidences: the kappas.
      rates: a rate a kappa, for each relation of source and target.
      path: where to.
    """
    figure, axis = plt.subplots(figsize=(5.2, 4.0), layout="constrained")
    for relation, values in rates.items():
        axis.plot(confidences, values, "o-", markersize=4, label=relation)
    axis.set(
        xlabel="confidence kappa", ylabel="share of images that transfer", ylim=(-0.02, 1.02),
        title="Carlini-Wagner L2: confidence and transfer",
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
