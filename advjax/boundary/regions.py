"""What is read off a map of classes: shares, entropy, areas, fragments, agreement of two maps."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.core import checks
from advjax.core.typing import Array


def _classes(caller: str, label_map: Array, axes: int | None = None) -> Array:
    if not hasattr(label_map, "dtype") or not jnp.issubdtype(label_map.dtype, jnp.integer):
        kind = getattr(label_map, "dtype", type(label_map).__name__)
        raise ValueError(f"{caller}: need a map of integer classes, got {kind}.")
    if jnp.ndim(label_map) < 2 or (axes is not None and jnp.ndim(label_map) != axes):
        wanted = "[rows, columns]" if axes == 2 else "[..., rows, columns]"
        raise ValueError(f"{caller}: need a map of shape {wanted}, got {jnp.shape(label_map)}.")
    return jnp.asarray(label_map)


def region_shares(label_map: Array, num_classes: int) -> Array:
    """The share of a plane that belongs to each class.

    Args:
      label_map: int32[..., rows, columns], classes from 0 to k - 1.
      num_classes: k.

    Returns:
      f32[..., k], which sums to 1.

    Static: num_classes.

    Raises:
      ValueError: a map that is not one of integers, classes outside 0 ... k - 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from advjax import boundary
      >>> boundary.region_shares(jnp.array([[0, 0], [0, 2]]), num_classes=3)
      Array([0.75, 0.  , 0.25], dtype=float32)
    """
    labels = _classes("region_shares", label_map)
    checks.at_least("region_shares", "num_classes", num_classes, 1)
    if checks.is_concrete(labels) and labels.size:
        host = np.asarray(labels)
        if host.min() < 0 or host.max() >= num_classes:
            wrong = int(np.sum((host < 0) | (host >= num_classes)))
            raise ValueError(
                f"region_shares: need classes from 0 ... {num_classes - 1}, got "
                f"{host.min()} ... {host.max()} at {wrong} of {host.size} points (-1 is where "
                "logits are NaN)."
            )
    return shares_of(labels, num_classes)


def shares_of(labels: Array, num_classes: int) -> Array:
    """`region_shares` of any integers; points outside 0 ... k - 1 are missing from the sum."""
    flat = labels.reshape(*labels.shape[:-2], -1)
    is_class = flat[..., None, :] == jnp.arange(num_classes)[:, None]
    return jnp.mean(is_class, axis=-1, dtype=jnp.float32)


def renyi_entropy(shares: Array, order: ArrayLike = 10.0) -> Array:
    """Renyi entropy `log(sum_m p_m^order) / (1 - order)`, in nats.

    Order 1 is its limit, Shannon's entropy, infinity is `-log(max p)`. At order 10 it lies between
    `-log(max p)` and 10 / 9 of that: it measures the largest region.

    Args:
      shares: f32[..., k], not negative, sum 1.
      order: at least 0; may be traced.

    Returns:
      f32[...], between 0 and log(k).

    Raises:
      ValueError: shares that are not a distribution, an order below 0 or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from advjax import boundary
      >>> boundary.renyi_entropy(jnp.full(4, 0.25)).round(3)
      Array(1.386, dtype=float32)

    Source: Su et al., "Model X-ray: Detecting Backdoored Models via Decision Boundary", ACM MM
    2024, equation 2.
    """
    _check_shares("renyi_entropy", shares)
    if checks.is_concrete(order) and not np.all(np.asarray(order) >= 0):
        raise ValueError(f"renyi_entropy: need order >= 0, got order={order}.")
    p, order = jnp.asarray(shares, jnp.float32), jnp.asarray(order, jnp.float32)
    log_p = jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1)), -jnp.inf)
    most = jnp.max(log_p, axis=-1)
    # Near order 1 the quotient loses its digits; Shannon's entropy is its limit there.
    is_limit, is_most = jnp.abs(order - 1) < 1e-3, jnp.isinf(order)
    safe = jnp.where(is_limit | is_most, 2.0, order)
    # Without its largest share the sum cannot underflow; shares of 0 count for nothing.
    relative = jnp.where(p > 0, jnp.exp(safe * jnp.where(p > 0, log_p - most[..., None], 0)), 0)
    entropy = (safe * most + jnp.log(jnp.sum(relative, axis=-1))) / (1 - safe)
    shannon = -jnp.sum(jnp.where(p > 0, p * jnp.where(p > 0, log_p, 0), 0), axis=-1)
    entropy = jnp.where(is_limit, shannon, jnp.where(is_most, -most, entropy))
    return jnp.maximum(entropy, 0.0)  # and not -0 or a rounding below it


def triple_area(shares: Array, triple_labels: Array, limit: ArrayLike = 0.5) -> Array:
    """The area of the three images' classes, without classes that fill `limit` of the plane.

    `sum_k A_k [A_k < limit]` over the three images, `A_k` the share of the k-th one's class.

    Args:
      shares: f32[..., k].
      triple_labels: int32[..., 3], the class of each image: the true one, or what the model answers
        (programs differ; they agree where the model is right). A class named twice counts twice.
      limit: a share, not included; may be traced.

    Returns:
      f32[...].

    Raises:
      ValueError: shares that are not a distribution, labels that are not classes, a limit below 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from advjax import boundary
      >>> boundary.triple_area(jnp.array([0.625, 0.25, 0.125, 0]), jnp.array([0, 1, 3]))
      Array(0.25, dtype=float32)

    Source: Su et al., "Model X-ray: Detecting Backdoored Models via Decision Boundary", ACM MM
    2024, equation 4.
    """
    _check_shares("triple_area", shares)
    labels = jnp.asarray(triple_labels)
    num_classes = jnp.shape(shares)[-1]
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape[-1:] != (3,):
        raise ValueError(
            "triple_area: need triple_labels int32[..., 3], got "
            f"{labels.dtype}{list(labels.shape)}."
        )
    if checks.is_concrete(labels):
        host = np.asarray(labels)  # numpy, since jnp would trace even a constant under jit
        if not np.all((host >= 0) & (host < num_classes)):
            raise ValueError(
                f"triple_area: need labels from 0 ... {num_classes - 1}, got {host.tolist()}."
            )
    checks.non_negative("triple_area", "limit", limit)
    return counted_area(jnp.take_along_axis(jnp.asarray(shares), labels, axis=-1), limit)


def counted_area(areas: Array, limit: ArrayLike) -> Array:
    """`triple_area` of areas that are known, f32[..., 3] to f32[...]."""
    return jnp.sum(jnp.where(areas < limit, areas, 0), axis=-1)


def _check_shares(caller: str, shares: Array) -> None:
    if jnp.ndim(shares) < 1:
        raise ValueError(f"{caller}: need shares of shape [..., k], got {jnp.shape(shares)}.")
    if checks.is_concrete(shares):
        host = np.asarray(shares, np.float64)
        if not (np.all(host >= 0) and np.allclose(host.sum(-1), 1, atol=1e-3)):
            raise ValueError(
                f"{caller}: need shares that are not negative and sum to 1, got sums "
                f"{host.sum(-1).min():.4g} ... {host.sum(-1).max():.4g}."
            )


def components(label_map: Array) -> Array:
    """Numbers the connected pieces of a map: neighbours in a row or column of the same class.

    Args:
      label_map: int32[rows, columns].

    Returns:
      int32[rows, columns], equal within a piece: the place of its first point, counted by rows.
    """
    labels = _classes("components", label_map, axes=2)
    places = jnp.arange(labels.size, dtype=jnp.int32).reshape(labels.shape)

    def sweep(numbers: Array, axis: int, reverse: bool) -> Array:
        """Each point takes the least number of the run of its class that leads to it."""

        def step(carry, line):
            last_label, last_number = carry
            label, number = line
            number = jnp.where(label == last_label, jnp.minimum(number, last_number), number)
            return (label, number), number

        lines = (jnp.moveaxis(labels, axis, 0), jnp.moveaxis(numbers, axis, 0))
        start = jax.tree.map(lambda part: part[-1 if reverse else 0], lines)
        _, swept = jax.lax.scan(step, start, lines, reverse=reverse)
        return jnp.moveaxis(swept, 0, axis)

    def spread(state):
        numbers, _ = state
        new = numbers
        for axis in (0, 1):
            for reverse in (False, True):
                new = sweep(new, axis, reverse)
        return new, jnp.any(new != numbers)

    numbers, _ = jax.lax.while_loop(lambda state: state[1], spread, spread((places, True)))
    return numbers


def fragmentation(label_map: Array) -> Array:
    """How many connected pieces a map falls into, int32[]; diagonal neighbours do not touch.

    Args:
      label_map: int32[rows, columns].

    Raises:
      ValueError: a map of another shape or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from advjax import boundary
      >>> boundary.fragmentation(jnp.array([[0, 1], [1, 0]]))
      Array(4, dtype=int32)

    Source: Somepalli et al., "Can Neural Nets Learn the Same Model Twice?", CVPR 2022.
    """
    numbers = components(label_map)
    places = jnp.arange(numbers.size).reshape(numbers.shape)
    return jnp.sum(numbers == places, dtype=jnp.int32)


def connected_shares(label_map: Array, positions: Array) -> Array:
    """The share of the connected piece around each of some grid points.

    Args:
      label_map: int32[rows, columns].
      positions: rows and columns of the points, int32[m, 2].

    Returns:
      f32[m].
    """
    numbers = components(label_map)
    own = numbers[positions[:, 0], positions[:, 1]]
    return jnp.mean(numbers == own[:, None, None], axis=(1, 2), dtype=jnp.float32)


def reproducibility(first: Array, second: Array, *, measure: str = "agreement") -> Array:
    """How alike two models' maps of the same plane are.

    Args:
      first: int32[..., rows, columns].
      second: the other model's.
      measure: "agreement", the share of points with the same class (the published score), or "iou",
        points with the same class over all pairs of a point and a class in either map.

    Returns:
      f32[...], 1 for equal maps.

    Static: measure.

    Raises:
      ValueError: maps of different shapes, an unknown measure.

    Example:
      >>> import jax.numpy as jnp
      >>> from advjax import boundary
      >>> boundary.reproducibility(jnp.array([[0, 1], [1, 2]]), jnp.array([[0, 1], [1, 0]]))
      Array(0.75, dtype=float32)

    Source: Somepalli et al., "Can Neural Nets Learn the Same Model Twice?", CVPR 2022.
    """
    checks.known("reproducibility", "measure", measure, ("agreement", "iou"))
    first, second = _classes("reproducibility", first), _classes("reproducibility", second)
    if first.shape != second.shape:
        raise ValueError(
            f"reproducibility: need maps of one shape, got {first.shape} and {second.shape}."
        )
    same = jnp.mean(first == second, axis=(-2, -1), dtype=jnp.float32)
    return same if measure == "agreement" else same / (2 - same)
