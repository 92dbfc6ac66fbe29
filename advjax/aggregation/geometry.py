"""Lengths and angles of updates, of which any may be not finite.

A row that is not finite, or whose squared norm float32 cannot hold, has an infinite norm; the
rules leave such rows out.
"""

import jax
import jax.numpy as jnp

from advjax.core import vectors
from advjax.core.typing import Array

# A square that is this part of its terms has lost two of float32's seven digits.
_CANCELS = 0.01


def norms(updates: Array) -> jax.Array:
    """Euclidean norms of the rows, f32[n]."""
    return jnp.sqrt(vectors.squared_norms(updates))


def distances_to(point: Array, updates: Array, squares: Array) -> jax.Array:
    """Euclidean distances of the rows from a point, f32[n].

    Args:
      point: f32[d].
      updates: f32[n, d].
      squares: squared norms of the rows, f32[n].
    """
    # On CPU two products take half the time of a difference, but near the point they cancel.
    sums = squares + jnp.vdot(point, point, precision="highest")
    estimates = sums - 2 * jnp.matmul(updates, point, precision="highest")
    cancels = jnp.any(estimates < _CANCELS * sums)
    squared = jax.lax.cond(
        cancels, lambda: vectors.squared_norms(updates - point), lambda: estimates
    )
    return jnp.where(jnp.isnan(squared), jnp.inf, jnp.sqrt(squared))


def cosines(updates: Array, lengths: Array) -> jax.Array:
    """Cosines between rows, f32[n, n]; 0 with a row of length 0 or infinity.

    Args:
      updates: f32[n, d].
      lengths: their norms, f32[n].
    """
    has_direction = (lengths > 0) & jnp.isfinite(lengths)
    rows = jnp.where(has_direction[:, None], updates, 0)
    directions = rows / jnp.where(has_direction, lengths, 1)[:, None]
    cosine = 1 - vectors.squared_distances(directions) / 2
    return jnp.where(has_direction[:, None] & has_direction[None, :], cosine, 0)


def normalised(weights: jax.Array) -> jax.Array:
    """Weights f32[n] with sum 1, or all zero where they are."""
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1)


def median_where(is_counted: Array, values: Array) -> jax.Array:
    """The median of the values f32[n] that count, 0 of none."""
    median = jnp.nanmedian(jnp.where(is_counted, values, jnp.nan))
    return jnp.where(jnp.any(is_counted), median, 0)
