"""Pictures of a study."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import matplotlib

matplotlib.use("agg", force=False)

import matplotlib.pyplot as plt
import numpy as np

from advjax.core import metrics
from advjax.core.typing import Array, LogitsFn
from advjax.experiments.grids import deviation

_NORMS = {"linf": r"$L_\infty$", "l2": r"$L_2$", "l1": r"$L_1$"}


def curves(rows: Sequence[Mapping[str, Any]], config: Any, path: pathlib.Path) -> None:
    """Robust accuracy over epsilon, one panel a ball; the band is one deviation over seeds.

    Args:
      rows: rows with seed, attack, ball, epsilon, robust_accuracy.
      config: has dataset and model, for the title.
      path: where to.
    """
    present = [ball for ball in _NORMS if any(row["ball"] == ball for row in rows)]
    figure, axes = plt.subplots(
        1, len(present), figsize=(5.2 * len(present), 4.0), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis, ball in zip(axes[0], present, strict=True):
        names = dict.fromkeys(row["attack"] for row in rows if row["ball"] == ball)
        for number, name in enumerate(names):
            mine = [row for row in rows if row["attack"] == name]
            epsilons = sorted({row["epsilon"] for row in mine})
            values = [
                [row["robust_accuracy"] for row in mine if row["epsilon"] == e] for e in epsilons
            ]
            mean = np.array([np.mean(v) for v in values])
            axis.plot(
                epsilons, mean, label=name, color=f"C{number % 10}", markersize=3.5,
                marker="osD^vPX<>*"[number % 10],
            )  # fmt: skip
            spread = np.array([deviation(v) for v in values])
            if np.any(spread):
                axis.fill_between(epsilons, mean - spread, mean + spread, alpha=0.2)
        axis.set(xlabel=f"epsilon ({_NORMS[ball]})", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("robust accuracy")
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        f"{config.dataset}, {config.model}, {rows[0]['num_examples']} test images"
        + (f", {seeds} seeds" if seeds > 1 else "")
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _wrapped(text: str) -> str:
    """The text in lines that fit above a small image: class names may be whole sentences."""
    return "\n".join(
        textwrap.fill(line, 16, max_lines=3, placeholder=" ...") for line in text.split("\n")
    )


def _show(axis: Any, image: Array, title: str, **options: Any) -> None:
    pixels = np.asarray(image, np.float32)
    axis.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, **options)
    axis.set_title(_wrapped(title), fontsize=8)
    axis.set_axis_off()


def _grey(image: Array) -> dict[str, Any]:
    return {"cmap": "gray", "vmin": 0, "vmax": 1} if image.shape[-1] == 1 else {}


def examples(
    logits_fn: LogitsFn,
    x: Array,
    x_adv: Array,
    y: Array,
    epsilon: float,
    class_names: Sequence[str],
    path: pathlib.Path,
) -> None:
    """Clean image, perturbation, adversarial image, with the network's answers and confidences.

    Args:
      logits_fn: classifier.
      x: clean images, f32[b, h, w, c].
      x_adv: adversarial images, like `x`.
      y: labels, int32[b].
      epsilon: the radius, for the title and for the scale of the perturbation.
      class_names: a name a class.
      path: where to.
    """
    answers = [
        (np.asarray(metrics.predictions(logits)), np.asarray(metrics.confidence(logits)))
        for logits in (jax.jit(logits_fn)(x), jax.jit(logits_fn)(x_adv))
    ]
    figure, axes = plt.subplots(
        3, len(x), figsize=(1.5 * len(x), 5.0), squeeze=False, layout="constrained"
    )

    def caption(which: int, i: int) -> str:
        answer, confidence = answers[which][0][i], answers[which][1][i]
        name = class_names[int(answer)] if answer >= 0 else "not finite"
        return f"{name}{'' if answer == y[i] else ' ✗'}\n{confidence:.1%}"

    scale = max(float(epsilon), 1e-6)
    for i in range(len(x)):
        _show(axes[0, i], x[i], f"true: {class_names[int(y[i])]}\n{caption(0, i)}", **_grey(x[i]))
        delta = np.asarray(x_adv[i] - x[i])
        if delta.shape[-1] == 1:
            _show(axes[1, i], delta, "", cmap="RdBu_r", vmin=-scale, vmax=scale)
        else:
            _show(axes[1, i], 0.5 + delta / (2 * scale), "")
        _show(axes[2, i], x_adv[i], caption(1, i), **_grey(x_adv[i]))
    figure.suptitle(
        f"clean + perturbation (scaled to ±{epsilon:g}) = adversarial (PGD)", fontsize=10
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def fooling(result: Any, class_names: Sequence[str], path: pathlib.Path) -> None:
    """Noise, and what one sign step makes of it in the eyes of the network.

    Args:
      result: an `evasion.Fooling`.
      class_names: a name a class.
      path: where to.
    """
    figure, axes = plt.subplots(1, 2, figsize=(4.4, 2.7), layout="constrained")
    _show(axes[0], result.noise, "uniform noise", **_grey(result.noise))
    _show(
        axes[1], result.image,
        f"FGSM toward {class_names[result.target]!r}: the network sees "
        f"{class_names[result.answer]!r}\nwith {result.confidence:.1%} (surest of 64 draws)",
        **_grey(result.image),
    )  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    path: pathlib.Path,
) -> None:
    """Curves by name in one panel; the vertical axis is a share.

    Args:
      series: name to its abscissas and ordinates.
      xlabel: what the abscissa is.
      ylabel: what the ordinate is.
      title: of the figure.
      path: where to.
    """
    figure, axis = plt.subplots(figsize=(5.6, 4.0), layout="constrained")
    for number, (name, (x, y)) in enumerate(series.items()):
        # Of equal curves the later would hide the earlier: it is thinner.
        axis.plot(
            x, y, label=name, marker="osD^vPX<>*"[number % 10], markersize=3.5,
            linewidth=1 + 0.7 * (len(series) - 1 - number), markevery=max(1, len(x) // 10),
        )  # fmt: skip
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(-0.02, 1.02))
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def image_grid(
    images: Sequence[Sequence[Array]],
    captions: Sequence[Sequence[str]],
    *,
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
    path: pathlib.Path,
) -> None:
    """A table of images with a caption each and names on its sides.

    Args:
      images: rows of images f32[h, w, c].
      captions: a caption an image.
      row_names: a name a row.
      column_names: a name a column.
      title: of the figure.
      path: where to.
    """
    num_rows, num_columns = len(images), len(images[0])
    titles = [[_wrapped(caption) for caption in row] for row in captions]
    titles[0] = [
        f"{_wrapped(name)}\n{title}" for name, title in zip(column_names, titles[0], strict=True)
    ]
    lines = sum(max(title.count("\n") + 1 for title in row) for row in titles)
    figure, axes = plt.subplots(
        num_rows, num_columns,
        figsize=(1.05 * num_columns + 0.6, 1.05 * num_rows + 0.15 * lines + 0.5),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            axis = axes[i, j]
            _show(axis, image, titles[i][j], **_grey(image))
            if j == 0:
                axis.annotate(
                    row_names[i], (-0.15, 0.5), xycoords="axes fraction", ha="right", va="center",
                    fontsize=9,
                )  # fmt: skip
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def histograms(
    panels: Mapping[str, Array], *, xlabel: str, path: pathlib.Path, num_bins: int = 30
) -> None:
    """Histograms side by side, each with its median.

    Args:
      panels: title to values.
      xlabel: what the values are.
      path: where to.
      num_bins: of each.
    """
    figure, axes = plt.subplots(
        1, max(len(panels), 1), figsize=(4.6 * max(len(panels), 1), 3.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (title, values) in zip(axes[0], panels.items(), strict=False):
        axis.hist(values, bins=num_bins, color="C0", alpha=0.8)
        axis.axvline(np.median(values), color="C1", linewidth=1.5)
        axis.set(xlabel=xlabel, ylabel="number")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def power_laws(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], float | None, float | None]],
    *,
    title: str,
    path: pathlib.Path,
) -> None:
    """Errors over epsilon, both logarithmic, each with its fitted line.

    Args:
      curves: label to epsilons, errors, amplitude and exponent; None for no line.
      title: of the figure.
      path: where to.
    """
    figure, axis = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    for number, (label, (epsilons, errors, amplitude, exponent)) in enumerate(curves.items()):
        x, y = np.asarray(epsilons), np.asarray(errors)
        axis.plot(
            x[y > 0], y[y > 0], label=label, color=f"C{number}", linestyle="none",
            marker="osD^vPX<>*"[number % 10], markersize=4,
        )  # fmt: skip
        if amplitude is not None and exponent is not None:
            line = amplitude * x**exponent
            axis.plot(x[line <= 1], line[line <= 1], color=f"C{number}", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="epsilon", ylabel="adversarial error")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curve_panels(
    panels: Mapping[str, Mapping[str, tuple[Array, Array]]],
    *,
    xlabel: str,
    ylabel: str,
    path: pathlib.Path,
    is_logarithmic: bool = False,
    points: Sequence[str] = (),
) -> None:
    """Curves by name, one panel beside the other.

    Args:
      panels: title to curves, each a name to its abscissas and ordinates.
      xlabel: what the abscissa is.
      ylabel: what the ordinate is.
      path: where to.
      is_logarithmic: both axes.
      points: names of those that are points without a line.
    """
    figure, axes = plt.subplots(
        1, max(len(panels), 1), figsize=(4.4 * max(len(panels), 1), 3.8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    scale = "log" if is_logarithmic else "linear"
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=False):
        for name, (x, y) in curves.items():
            is_points = name in points
            axis.plot(
                x, y, label=name, linestyle="none" if is_points else "-",
                marker="." if is_points else None, markersize=2, linewidth=1.3,
            )  # fmt: skip
        axis.set(xlabel=xlabel, ylabel=ylabel, xscale=scale, yscale=scale)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
