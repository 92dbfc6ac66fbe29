"""Planes through three images, and a classifier's answers on them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.boundary import affine
from advjax.core import checks
from advjax.core.typing import Array

LabelsFn = Callable[[Array], Array]

# Below this share of its length an edge's part across the first edge is only rounding.
_LEAST_ANGLE = 1e-5


class Plane(NamedTuple):
    """A grid of points `origin + across[i] * first + down[j] * second`.

    Attributes:
      origin: the first image, f32[h, w, c].
      first: first direction, f32[h, w, c].
      second: second direction, f32[h, w, c].
      across: coordinates along `first`, f32[density].
      down: coordinates along `second`, f32[density].
      corners: coordinates of the three images, f32[3, 2].
    """

    origin: Array
    first: Array
    second: Array
    across: Array
    down: Array
    corners: Array

    def at(self, across: Array, down: Array) -> Array:
        """The images at coordinates f32[m] and f32[m]: f32[m, h, w, c]."""
        return (
            self.origin
            + across[:, None, None, None] * self.first
            + down[:, None, None, None] * self.second
        )


def plane(
    x1: Array,
    x2: Array,
    x3: Array,
    *,
    expansion: ArrayLike = 5.0,
    density: int = 100,
    std: ArrayLike = 1.0,
) -> Plane:
    """The plane through three images, as a grid that reaches beyond them.

    The basis is orthonormal: `first` leads from x1 to x2, `second` is what is left of x3 - x1
    across it. The grid covers the bounding box of the three images, longer by `expansion` times its
    own length on each of its four sides, and includes both ends. Points are not clipped: most lie
    outside [0, 1].

    Args:
      x1: an image, f32[h, w, c] in [0, 1].
      x2: another.
      x3: a third, not on a line with them.
      expansion: per side, in lengths of the box; 5 makes the grid eleven boxes wide. Programs
        differ here: dbViz extends by 0.1, and its figures by 0.5.
      density: points a side.
      std: per channel: the plane is orthonormal in the space of images divided by it, as where
        images are normalised before they are stored (dbViz); 1 is the space of the pixels. The
        points returned are pixels either way.

    Returns:
      A `Plane`.

    Static: density.

    Raises:
      ValueError: images that are not floats in [0, 1] or of different shapes, that are equal or on
        a line, a density below 2, a std that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from advjax import boundary
      >>> x1, x2, x3 = jnp.eye(3).reshape(3, 3, 1, 1)
      >>> boundary.plane(x1, x2, x3, expansion=0.0, density=3).across.round(2)
      Array([0.  , 0.71, 1.41], dtype=float32)

    Source: Somepalli et al., "Can Neural Nets Learn the Same Model Twice?", CVPR 2022; Su et al.,
    "Model X-ray: Detecting Backdoored Models via Decision Boundary", ACM MM 2024.
    """
    images = [jnp.asarray(x) if hasattr(x, "dtype") else x for x in (x1, x2, x3)]
    for x in images:
        checks.images("plane", x)
    shapes = [x.shape for x in images]
    if len(set(shapes)) > 1 or len(shapes[0]) != 3:
        raise ValueError(f"plane: need three images of one shape [h, w, c], got {shapes}.")
    checks.at_least("plane", "density", density, 2)
    checks.non_negative("plane", "expansion", expansion)
    if checks.is_concrete(std) and not np.all(np.asarray(std) > 0):
        raise ValueError(f"plane: need std > 0, got std={np.asarray(std).tolist()}.")
    if jnp.shape(std) not in ((), (1,), shapes[0][-1:]):
        raise ValueError(
            f"plane: need one std or one for each of {shapes[0][-1]} channels, got shape "
            f"{jnp.shape(std)}."
        )
    origin, x2, x3 = (x.astype(jnp.float32) for x in images)
    std = jnp.asarray(std, jnp.float32)
    edge, other = (x2 - origin) / std, (x3 - origin) / std
    length = jnp.sqrt(jnp.sum(edge**2))
    first = edge / length
    along = jnp.sum(other * first)
    rest = other - along * first
    height = jnp.sqrt(jnp.sum(rest**2))
    # Under jit these are traced, even of images that are known.
    if checks.is_concrete(length, height):
        size = float(jnp.sqrt(jnp.sum(other**2)))
        if not (float(length) > 0 and float(height) > _LEAST_ANGLE * size):
            raise ValueError(
                "plane: need three images that are not on a line, got edges of length "
                f"{float(length):.4g} and {size:.4g}, {np.nan_to_num(float(height)):.4g} apart."
            )
    zero = jnp.zeros(())
    corners = jnp.array([[zero, zero], [length, zero], [along, height]])
    low, high = corners.min(axis=0), corners.max(axis=0)
    margin = expansion * (high - low)
    across, down = jnp.linspace(low - margin, high + margin, density, axis=1)
    return Plane(origin, first * std, rest / height * std, across, down, corners)


def label_map(
    labels_fn: LabelsFn, plane: Plane, *, batch_size: int = 1000, clip: bool = False
) -> Array:
    """The class at each point of a plane; nothing but the classes is asked of the classifier.

    Points are made where they are needed, `batch_size` at a time, so that memory does not depend
    on the density. What is affine in the image at the start of a network (normalisation, the first
    layer) is computed for the plane and not for each point.

    Args:
      labels_fn: images f32[b, h, w, c] to classes int[b], or to logits f[b, k], whose largest is
        taken. Each image by itself, whatever its place in the batch: of noise that is drawn by
        place, points would share a draw. Anything that jax cannot trace, such as a model behind an
        API, is called with numpy arrays.
      plane: what `plane` returned.
      batch_size: points at a time.
      clip: clips each point to [0, 1]. The published method does not.

    Returns:
      int32[density, density], entry [i, j] at `plane.across[i]` and `plane.down[j]`; -1 where
      logits are NaN.

    Static: batch_size, clip.

    Raises:
      ValueError: a `labels_fn` that returns something else, a batch_size below 1, inside a jax
        transformation a `labels_fn` that cannot be traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from advjax import boundary
      >>> grid = boundary.plane(*jnp.eye(3).reshape(3, 3, 1, 1), density=50)
      >>> boundary.label_map(lambda x: x.reshape(-1, 3), grid).shape
      (50, 50)
    """
    checks.at_least("label_map", "batch_size", batch_size, 1)
    shape = (plane.across.size, plane.down.size)
    size = shape[0] * shape[1]
    batch_size = min(batch_size, size)
    if not is_traceable(labels_fn, plane.origin.shape):
        return label_map_on_host(labels_fn, plane, batch_size=batch_size, clip=clip)
    answers = on_plane(labels_fn, plane, clip=clip)

    def labels(start: Array) -> Array:
        points = jnp.minimum(start + jnp.arange(batch_size), size - 1)
        return _as_labels(
            answers(plane.across[points // shape[1]], plane.down[points % shape[1]]), batch_size
        )

    # On GPUs and TPUs a product of float32 is rounded to fewer bits, which moves the boundary.
    with jax.default_matmul_precision("highest"):
        mapped = jax.lax.map(labels, jnp.arange(0, size, batch_size))
    return mapped.reshape(-1)[:size].reshape(shape)


def on_plane(
    function: Callable[[Array], Array], plane: Plane, *, clip: bool = False
) -> Callable[[Array, Array], Array]:
    """A function of images as a function of coordinates on a plane.

    Args:
      function: images f32[b, h, w, c] to something with a leading axis [b], one for each image by
        itself; traceable.
      plane: the plane.
      clip: clips each point to [0, 1], which forgoes the shared computation.

    Returns:
      `(across f32[m], down f32[m]) -> function(plane.at(across, down))`, computed with everything
      shared that is affine in the image.

    Static: clip.
    """
    if clip:
        return lambda across, down: function(jnp.clip(plane.at(across, down), 0, 1))
    return functools.partial(affine.on_points, function, plane.origin, plane.first, plane.second)


def is_traceable(labels_fn: LabelsFn, image_shape: tuple[int, ...]) -> bool:
    """Whether jax can trace the classifier, or it has to be called with numpy arrays."""
    try:
        jax.eval_shape(labels_fn, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
        return False
    except Exception:
        # What is not JAX refuses a tracer in its own words, and by its own exception; what is wrong
        # with any image raises again.
        labels_fn(np.zeros((1, *image_shape), np.float32))
        return False
    return True


def label_map_on_host(labels_fn: LabelsFn, plane: Plane, *, batch_size: int, clip: bool) -> Array:
    """`label_map` of a classifier that takes numpy arrays."""
    if not checks.is_concrete(*plane):
        raise ValueError(
            "label_map: need a labels_fn that jax can trace inside jit, vmap and the like; this "
            "one needs the values of its images."
        )
    points = np.stack(np.meshgrid(plane.across, plane.down, indexing="ij"), -1).reshape(-1, 2)
    host = Plane(*(np.asarray(part) for part in plane))
    labels = []
    for start in range(0, len(points), batch_size):
        batch = points[start : start + batch_size]
        x = host.at(batch[:, 0], batch[:, 1])
        x = np.clip(x, 0, 1) if clip else x
        labels.append(np.asarray(_as_labels(np.asarray(labels_fn(x)), len(batch))))
    return jnp.asarray(np.concatenate(labels).reshape(plane.across.size, plane.down.size))


def _as_labels(answers: Array, size: int) -> Array:
    """Classes int32[b] from classes or logits; -1 where a logit is NaN."""
    if answers.ndim == 2 and jnp.issubdtype(answers.dtype, jnp.floating):
        answers = jnp.where(jnp.isnan(answers).any(-1), -1, jnp.argmax(answers, axis=-1))
    if answers.shape != (size,) or not jnp.issubdtype(answers.dtype, jnp.integer):
        raise ValueError(
            f"label_map: need a labels_fn that returns classes int[{size}] or logits "
            f"f32[{size}, k] for {size} images, got {answers.dtype}{list(answers.shape)}."
        )
    return answers.astype(jnp.int32)
