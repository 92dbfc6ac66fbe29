"""Pictures of the study of the physical world."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from advjax.core import metrics
from advjax.core.typing import Array, LogitsFn
from advjax.experiments import figures

_CASES = {"destruction_rate": "average case", "prefiltered_destruction_rate": "prefiltered case"}


def destruction_rates(rows: Sequence[Mapping[str, Any]], config: Any, path: pathlib.Path) -> None:
    """Bars of the destruction rates, a panel a case; dots are the published rates.

    Args:
      rows: rows of the study.
      config: has dataset, model, attacks and epsilons.
      path: where to.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), sharey=True, layout="constrained")
    width = 0.8 / len(config.epsilons)
    for axis, (column, case) in zip(axes, _CASES.items(), strict=True):
        for number, epsilon in enumerate(config.epsilons):
            cells = {row["attack"]: row for row in rows if row["epsilon"] == epsilon}
            places = np.arange(len(config.attacks)) + (number + 0.5) * width - 0.4

            def heights(name: str, cells=cells) -> np.ndarray:
                return np.array([cells[attack][name] for attack in config.attacks], float)

            label = f"epsilon {255 * epsilon:.3g}/255"
            axis.bar(places, heights(column), width, label=label, color=f"C{number}")
            is_last = number == len(config.epsilons) - 1
            axis.plot(
                places, heights(f"published_{column}"), "ko", markersize=4,
                label="published (ImageNet)" if is_last else None,
            )  # fmt: skip
        axis.set(title=case, ylim=(0, 1.02))
        axis.set_xticks(range(len(config.attacks)), config.attacks)
        axis.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("destruction rate")
    axes[1].legend(fontsize=8)
    figure.suptitle(
        f"Adversarial images that a photograph makes harmless: {config.dataset}, {config.model}, "
        f"{rows[0]['num_examples']} images x {rows[0]['num_photos']} photographs"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def photographs(
    logits_fn: LogitsFn,
    kinds: Mapping[str, Array],
    photos: Mapping[str, Array],
    y: Array,
    epsilon: float,
    class_names: Sequence[str],
    path: pathlib.Path,
) -> None:
    """A line for each kind of image: sources and photographs, with answers and confidences.

    Args:
      logits_fn: classifier.
      kinds: images f32[n, h, w, c] by name.
      photos: a photograph of each, by the same names.
      y: labels, int32[n].
      epsilon: the radius, for the title.
      class_names: a name a class.
      path: where to.
    """
    figure, axes = plt.subplots(
        len(kinds), 2 * len(y), figsize=(2.9 * len(y), 1.75 * len(kinds)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    ask = jax.jit(logits_fn)
    for line, name in zip(axes, kinds, strict=True):
        for side, images in enumerate((kinds[name], photos[name])):
            logits = ask(images)
            answers, confidence = metrics.predictions(logits), metrics.confidence(logits)
            for i, axis in enumerate(line[side::2]):
                what = class_names[int(answers[i])] if answers[i] >= 0 else "not finite"
                mark = "" if answers[i] == y[i] else " ✗"
                title = f"{what}{mark} {float(confidence[i]):.0%}"
                figures._show(axis, images[i], title, **figures._grey(images[i]))
        line[0].text(
            -0.1, 0.5, name, transform=line[0].transAxes, rotation=90, ha="right", va="center"
        )
    figure.suptitle(f"Each image and a photograph of it, epsilon {255 * epsilon:.3g}/255")
    figure.savefig(path, dpi=130)
    plt.close(figure)
