"""Lengths and angles of updates, of which any may be not finite.

A row that is not finite, or whose squared norm float32 cannot hold, has an infinite norm; the
rules leave such rows out.
"""

import jax
import jax.numpy as jnp

from advjax.core import vectors
from advjax.core.typing import Array


def norms(updates: Array) -> jax.Array:
    """Euclidean norms of the rows, f32[n]."""
    rows = jnp.asarray(updates, jnp.float32)
    lengths = jnp.sqrt(jnp.einsum("nd,nd->n", rows, rows, precision="highest"))
    return jnp.where(jnp.isnan(lengths), jnp.inf, lengths)


def distances_to(point: Array, updates: Array) -> jax.Array:
    """Euclidean distances of the rows from a point, f32[n].

    They are subtracted before they are squared: rows far away cost the others no digit.
    """
    return norms(jnp.asarray(updates, jnp.float32) - point)


def cosines(updates: Array, lengths: Array) -> jax.Array:
    """Cosines between rows, f32[n, n]; 0 with a row of length 0 or infinity.

    Args:
      updates: f32[n, d].
      lengths: their norms, f32[n].
    """
    has_direction = (lengths > 0) & jnp.isfinite(lengths)
    directions = jnp.asarray(updates, jnp.float32) / jnp.where(has_direction, lengths, 1)[:, None]
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
