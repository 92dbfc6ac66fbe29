"""Rules that keep one cluster of the rows and clip it to the median norm: SignGuard, FLAME."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.aggregation import geometry, requirements, weighing
from advjax.core import checks, vectors
from advjax.core.typing import Array, Key

# A mean-shift window that moves by less than this part of its radius has arrived.
_ARRIVED = 1e-3
_MOST_SHIFTS = 300
# Shares of d coordinates are often equally far apart; rounding must not tell them apart.
_TIE = 1 + 1e-5


def _clipped_mean_weights(is_kept: Array, lengths: Array, radius: Array) -> jax.Array:
    """Weights of the mean of the rows kept, each clipped to norm `radius`, f32[n]."""
    return weighing.equal(is_kept) * jnp.where(lengths > radius, radius / lengths, 1)


def _distances_between(points: Array, others: Array) -> jax.Array:
    return jnp.linalg.norm(points[:, None] - others[None, :], axis=-1)


def _largest_mode(points: Array, is_counted: Array, quantile: float) -> jax.Array:
    """Which points mean shift with a flat window moves to the most sought mode, bool[n].

    The window's radius is the mean distance of a point to its nearest `quantile` of all. Modes
    within a radius of each other are one.
    """
    distances = jnp.where(is_counted[None, :], _distances_between(points, points), jnp.inf)
    # The point itself is among its nearest.
    num_near = jnp.maximum(jnp.floor(quantile * jnp.sum(is_counted)).astype(jnp.int32), 1)
    reach = jnp.take(jnp.sort(distances, axis=1), num_near - 1, axis=1)
    radius = _TIE * jnp.sum(jnp.where(is_counted, reach, 0)) / jnp.maximum(jnp.sum(is_counted), 1)

    def shift(carry):
        modes, _, number = carry
        is_inside = (_distances_between(modes, points) <= radius) & is_counted[None, :]
        share = is_inside / jnp.maximum(jnp.sum(is_inside, axis=1, keepdims=True), 1)
        moved = share @ points
        is_moving = jnp.linalg.norm(moved - modes, axis=1) > _ARRIVED * radius
        return moved, jnp.any(is_moving & is_counted), number + 1

    modes, _, _ = jax.lax.while_loop(
        lambda carry: carry[1] & (carry[2] < _MOST_SHIFTS), shift, (points, True, 0)
    )
    is_same = (_distances_between(modes, modes) <= radius) & is_counted[None, :]
    most = jnp.argmax(jnp.where(is_counted, jnp.sum(is_same, axis=1), -1))
    return is_same[most]


def signguard_weights(
    updates: Array,
    *,
    lower: ArrayLike = 0.1,
    upper: ArrayLike = 3.0,
    quantile: float = 0.5,
    fraction: float = 0.1,
    key: Key | None = None,
) -> jax.Array:
    """The weights of `signguard`, f32[n]."""
    updates = requirements.updates("signguard", updates)
    checks.non_negative("signguard", "lower", lower)
    checks.non_negative("signguard", "upper", upper)
    for name, value in (("quantile", quantile), ("fraction", fraction)):
        if not 0 < value <= 1:
            raise ValueError(f"signguard: need 0 < {name} <= 1, got {name}={value}.")
    lengths = geometry.norms(updates)
    is_finite = jnp.isfinite(lengths)
    median = geometry.median_where(is_finite, lengths)
    is_usual = is_finite & (lengths >= lower * median) & (lengths <= upper * median)
    d = updates.shape[1]
    if key is None:
        chosen = updates
    else:
        # With replacement: without it all d coordinates would be shuffled.
        chosen = updates[:, jax.random.randint(key, (math.ceil(fraction * d),), 0, d)]
    signs = jnp.stack([jnp.mean(jnp.sign(chosen) == s, axis=1) for s in (1, 0, -1)], axis=1)
    is_kept = is_usual & _largest_mode(signs, is_finite, quantile)
    return _clipped_mean_weights(is_kept, lengths, median)


@weighing.weighted_by(signguard_weights)
def signguard(
    updates: Array,
    *,
    lower: ArrayLike = 0.1,
    upper: ArrayLike = 3.0,
    quantile: float = 0.5,
    fraction: float = 0.1,
    key: Key | None = None,
) -> jax.Array:
    """SignGuard: the mean of updates with a usual norm and usual signs, clipped to the median norm.

    Kept are the rows with `lower <= ||x_i|| / median norm <= upper` that also lie in the largest
    mean-shift cluster of the features (share of positive, zero and negative coordinates).

    The window of mean shift is scikit-learn's estimate, as we read the paper; a row belongs to the
    mode that its own window reaches. Of clusters of one size the one with the lowest row is taken.

    Args:
      updates: f32[n, d]; rows that are not finite are left out.
      lower: least norm, in units of the median norm.
      upper: largest norm, in the same units.
      quantile: the window reaches from a row to this part of all rows, in the mean.
      fraction: part of the coordinates whose signs are looked at, with a key.
      key: draws these coordinates, so that an attacker cannot know them; by default the signs of
        all coordinates are counted.

    Returns:
      The aggregate, [d].

    Static: quantile, fraction.

    Raises:
      ValueError: updates of the wrong rank, a negative bound, a part that is not in (0, 1].

    Source: J. Xu, S.-L. Huang, L. Song, T. Lan, "Byzantine-Robust Federated Learning through
    Collaborative Malicious Gradient Filtering", ICDCS 2022.
    """
    weights = signguard_weights(
        updates, lower=lower, upper=upper, quantile=quantile, fraction=fraction, key=key
    )
    return vectors.combine(weights, updates)


def _first_majority(distances: Array, size: Array) -> jax.Array:
    """The first component of single linkage to hold `size` points, bool[n].

    Args:
      distances: f32[n, n]; infinite from and to a point that does not count.
      size: more than half of the points that count.
    """
    n = distances.shape[0]

    def through(number, widest):
        return jnp.minimum(widest, jnp.maximum(widest[:, number, None], widest[None, number]))

    # Between two points: the widest step of the path whose widest step is least.
    widest = jax.lax.fori_loop(0, n, through, distances)
    reach = jnp.take(jnp.sort(widest, axis=1), size - 1, axis=1)
    first = jnp.argmin(reach)
    return widest[first] <= reach[first]


def flame_weights(updates: Array) -> jax.Array:
    """The weights of `flame`, f32[n]."""
    updates = requirements.updates("flame", updates)
    lengths = geometry.norms(updates)
    is_finite = jnp.isfinite(lengths)
    both_finite = is_finite[:, None] & is_finite[None, :]
    distances = jnp.where(both_finite, 1 - geometry.cosines(updates, lengths), jnp.inf)
    distances = jnp.where(jnp.eye(len(updates), dtype=bool), 0, distances)
    is_kept = is_finite & _first_majority(distances, jnp.sum(is_finite) // 2 + 1)
    return _clipped_mean_weights(is_kept, lengths, geometry.median_where(is_finite, lengths))


@weighing.weighted_by(flame_weights)
def flame(updates: Array) -> jax.Array:
    """FLAME: the mean of the majority that points alike, clipped to the median norm.

    Cosine distances are clustered by HDBSCAN with least cluster size n // 2 + 1 and one sample.
    There is no room for a second cluster then, and HDBSCAN (with a single cluster allowed) gives
    the first component of single linkage that holds so many rows; that is computed here directly.

    The paper takes cosines and norms of the clients' models in one place and of their updates in
    another; here both are of the updates. Its noise is a wrapper of its own, see `noising`.

    Args:
      updates: f32[n, d]; rows that are not finite are left out.

    Returns:
      The aggregate, [d].

    Raises:
      ValueError: updates of the wrong rank.

    Source: T. Nguyen et al., "FLAME: Taming Backdoors in Federated Learning", USENIX Security
    2022.
    """
    return vectors.combine(flame_weights(updates), updates)
