"""Landscapes: the loss on a plane through models, and where models lie on it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advjax.core.typing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart; shapes differ as well.
_BENIGN, _PRESENT, _PREDICTED, _POISONED = "#56B4E9", "#009E73", "#000000", "#D55E00"
_SHORTEST = 1e-6  # of a direction, relative to the points' distances


class Plane(NamedTuple):
    """A plane in the space of models.

    Attributes:
      origin: a point of it, f32[d].
      axes: two orthonormal directions, f32[2, d].
    """

    origin: np.ndarray
    axes: np.ndarray


def span(origin: Array, first: Array, second: Array) -> Plane:
    """The plane through three points: `first` lies on its x axis, `second` above it.

    Args:
      origin: f32[d].
      first: f32[d].
      second: f32[d].

    Raises:
      ValueError: points on one line.

    Example:
      >>> import numpy as np
      >>> from advjax.experiments import landscapes
      >>> landscapes.span(np.zeros(3), np.array([2, 0, 0]), np.array([1, 0, -3])).axes
      array([[ 1.,  0.,  0.],
             [ 0.,  0., -1.]], dtype=float32)
    """
    # In float64: the differences are small beside the models.
    points = np.asarray([origin, first, second], np.float64)
    x, y = points[1:] - points[0]
    size = max(np.linalg.norm(x), np.linalg.norm(y))
    x_axis = x / max(np.linalg.norm(x), np.finfo(float).tiny)
    y = y - np.dot(y, x_axis) * x_axis
    if not min(np.linalg.norm(x), np.linalg.norm(y)) > _SHORTEST * size:
        raise ValueError("span: need three points that are not on one line.")
    axes = np.stack([x_axis, y / np.linalg.norm(y)])
    return Plane(points[0].astype(np.float32), axes.astype(np.float32))


def coordinates(plane: Plane, models: Array) -> np.ndarray:
    """Where models lie when they are projected on the plane, f32[n, 2].

    Args:
      plane: the plane.
      models: f32[n, d].
    """
    return (np.asarray(models) - plane.origin) @ plane.axes.T


def losses(
    loss_fn: Callable[[Array], Array], plane: Plane, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """The loss of the models of a grid on the plane, f32[len(y), len(x)].

    Args:
      loss_fn: a model f32[d] to its loss, f32[].
      plane: the plane.
      x: first coordinates, ascending.
      y: second coordinates, ascending.
    """
    places = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)
    origin, axes = jnp.asarray(plane.origin), jnp.asarray(plane.axes)
    values = jax.jit(lambda p: jax.lax.map(lambda place: loss_fn(origin + place @ axes), p))(places)
    return np.asarray(values).reshape(len(y), len(x))


def landscape(
    axis: "Axes",
    loss_fn: Callable[[Array], Array],
    *,
    present: Array,
    benign: Array,
    predicted: Array,
    poisoned: Array,
    radius: float,
    num_points: int = 41,
) -> Plane:
    """Draws a round under FMPA on the plane through the predicted, mean benign and poisoned model.

    These three and the circle are where they are drawn. The other models are projected on the
    plane, so they seem nearer to each other than they are.

    Args:
      axis: of matplotlib, to draw on; its aspect becomes equal, and its title is left alone.
      loss_fn: a model f32[d] to its loss f32[], for the contours.
      present: the global model that the server sent, f32[d].
      benign: the models of the benign clients, f32[n, d].
      predicted: what the attackers think the next model would be, f32[d].
      poisoned: the model that they send, f32[d].
      radius: of the certified ball round the predicted model.
      num_points: of the contours, along each axis.

    Returns:
      The plane.
    """
    plane = span(predicted, np.mean(np.asarray(benign), axis=0), poisoned)
    marked = {
        "present global model": (present, _PRESENT, "s", 60),
        "predicted model": (predicted, _PREDICTED, "*", 130),
        "poisoned model": (poisoned, _POISONED, "X", 90),
    }
    dots = coordinates(plane, benign)
    marks = coordinates(plane, np.stack([np.asarray(model) for model, *_ in marked.values()]))
    corners = np.array([[-radius, -radius], [radius, radius]])
    everything = np.concatenate([dots, marks, corners])
    low, high = everything.min(axis=0), everything.max(axis=0)
    margin = 0.08 * np.max(high - low)
    x, y = np.linspace(low - margin, high + margin, num_points).T
    loss = losses(loss_fn, plane, x, y)

    filled = axis.contourf(x, y, loss, levels=14, cmap="cividis", alpha=0.85)
    axis.contour(x, y, loss, levels=filled.levels, colors="white", linewidths=0.4, alpha=0.6)
    axis.figure.colorbar(filled, ax=axis, shrink=0.85, label="loss on the malicious clients' data")
    turn = np.linspace(0, 2 * np.pi, 200)
    axis.plot(
        radius * np.cos(turn), radius * np.sin(turn), color=_PREDICTED, linestyle="--",
        linewidth=1.4, label="certified ball",
    )  # fmt: skip
    axis.scatter(
        *dots.T, s=26, color=_BENIGN, edgecolor="black", linewidth=0.5, label="benign models",
        zorder=3,
    )  # fmt: skip
    for (label, (_, colour, marker, size)), place in zip(marked.items(), marks, strict=True):
        axis.scatter(
            *place, s=size, color=colour, marker=marker, edgecolor="white", linewidth=0.9,
            label=label, zorder=4,
        )  # fmt: skip
    axis.set(
        aspect="equal", xlabel="distance towards the mean of the benign models",
        ylabel="across, towards the poisoned model",
    )  # fmt: skip
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    return plane
