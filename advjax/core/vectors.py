"""Client updates as rows of a matrix: distances, sorting, weighted sums, and trees as vectors.

Rows that are not finite are legal attacks: they are infinitely far from every other row, and a row
of weight 0 does not count whatever it holds.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.core.typing import Array


def ravel(tree: Any) -> tuple[jax.Array, Callable[[Array], Any]]:
    """A tree of arrays as one vector f32[d], and the function back."""
    return jax.flatten_util.ravel_pytree(tree)


def finite_rows(updates: Array) -> jax.Array:
    """Which rows are finite throughout, bool[n]."""
    return jnp.all(jnp.isfinite(updates), axis=1)


def combine(weights: Array, updates: Array) -> jax.Array:
    """The weighted sum of the rows, f32[d]; rows of weight 0 may hold anything.

    Args:
      weights: f32[n].
      updates: f32[n, d].
    """
    counted = jnp.where((weights != 0)[:, None], updates, 0)
    return weights @ counted


def squared_distances(updates: Array) -> jax.Array:
    """Squared Euclidean distances between rows, f32[n, n]; rows that are not finite are at
    infinity.

    The rows are centred before the Gram matrix, which otherwise cancels where they share a large
    common part.

    Args:
      updates: f32[n, d].
    """
    is_finite = finite_rows(updates)
    kept = jnp.where(is_finite[:, None], updates, 0)
    mean = jnp.sum(kept, axis=0) / jnp.maximum(jnp.sum(is_finite), 1)
    centred = jnp.where(is_finite[:, None], kept - mean, 0)
    gram = jnp.matmul(centred, centred.T, precision="highest")
    squares = jnp.diagonal(gram)
    distances = jnp.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0)
    distances = jnp.where(is_finite[:, None] & is_finite[None, :], distances, jnp.inf)
    return jnp.where(jnp.eye(len(updates), dtype=bool), 0, distances)


def nearest_sums(distances: Array, num_neighbors: ArrayLike) -> jax.Array:
    """For each row the sum of the distances to its nearest others, f32[n].

    Args:
      distances: f32[n, n], zero on the diagonal.
      num_neighbors: how many others; may be traced.
    """
    n = distances.shape[0]
    others = jnp.sort(jnp.where(jnp.eye(n, dtype=bool), jnp.inf, distances), axis=1)
    return jnp.sum(jnp.where(jnp.arange(n) < num_neighbors, others, 0), axis=1)


def sort_rows(updates: Array) -> jax.Array:
    """Every coordinate sorted over the rows, f32[n, d]; NaN counts as infinity.

    Args:
      updates: f32[n, d].
    """
    return jnp.sort(jnp.where(jnp.isnan(updates), jnp.inf, updates), axis=0)
