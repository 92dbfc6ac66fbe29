"""Rules that remove outliers and average the rest: FABA and divide-and-conquer."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.aggregation import requirements, weighing
from advjax.core import checks, random, vectors
from advjax.core.typing import Array, Key


def faba_weights(updates: Array, *, num_byzantine: ArrayLike) -> jax.Array:
    """The weights of `faba`, f32[n]: equal for the clients that are left."""
    updates = requirements.updates("faba", updates)
    requirements.minority("faba", num_byzantine, len(updates))
    distances = vectors.squared_distances(updates)
    is_finite = jnp.isfinite(vectors.squared_norms(updates))

    def remove(_, is_left):
        # Up to what all clients share, ||x_i - mean||^2 is the mean of ||x_i - x_j||^2 over j.
        spread = jnp.sum(jnp.where(is_left & is_finite, distances, 0), axis=1)
        spread = jnp.where(is_finite, spread, jnp.inf)
        return is_left.at[jnp.argmax(jnp.where(is_left, spread, -1))].set(False)

    is_left = jax.lax.fori_loop(0, num_byzantine, remove, jnp.ones(len(updates), bool))
    return weighing.equal(is_left & is_finite)


@weighing.weighted_by(faba_weights)
def faba(updates: Array, *, num_byzantine: ArrayLike) -> jax.Array:
    """FABA: `num_byzantine` times, the update farthest from the mean of those left is removed.

    Updates that are not finite are removed first, and never counted.

    Args:
      updates: one row a client, f32[n, d].
      num_byzantine: how many are removed; may be traced.

    Returns:
      The mean of those left, f32[d] in the dtype of the updates.

    Raises:
      ValueError: updates that are not floats [n, d], 2 * num_byzantine >= n.

    Example:
      >>> import jax.numpy as jnp
      >>> faba(jnp.array([[0.0], [1.0], [9.0]]), num_byzantine=1)
      Array([0.5], dtype=float32)

    Source: Q. Xia et al., "FABA: An Algorithm for Fast Aggregation against Byzantine Attacks in
    Distributed Neural Networks", IJCAI 2019.
    """
    return vectors.combine(faba_weights(updates, num_byzantine=num_byzantine), updates)


def _spread_coordinates(key: Key, d: int, count: int) -> jax.Array:
    """One random coordinate from each of `count` equal stretches of 0 ... d - 1."""
    bounds = np.arange(count + 1) * d // count
    return jax.random.randint(key, (count,), bounds[:-1], bounds[1:])


def dnc_weights(
    key: Key,
    updates: Array,
    *,
    num_byzantine: ArrayLike,
    num_coordinates: int = 10_000,
    num_iters: int = 1,
    filter_fraction: ArrayLike = 1.0,
) -> jax.Array:
    """The weights of `dnc`, f32[n]: equal for the clients that no iteration removed."""
    updates = requirements.updates("dnc", updates)
    n, d = updates.shape
    requirements.minority("dnc", num_byzantine, n)
    checks.at_least("dnc", "num_coordinates", num_coordinates, 1)
    checks.at_least("dnc", "num_iters", num_iters, 1)
    checks.non_negative("dnc", "filter_fraction", filter_fraction)
    if checks.is_concrete(filter_fraction, num_byzantine) and filter_fraction * num_byzantine >= n:
        raise ValueError(
            f"dnc: need filter_fraction * num_byzantine < n, got filter_fraction="
            f"{filter_fraction}, num_byzantine={num_byzantine} and n={n}."
        )
    num_kept = n - jnp.floor(jnp.asarray(filter_fraction) * num_byzantine)
    is_finite = jnp.isfinite(vectors.squared_norms(updates))

    def keep(key):
        rows = updates
        if d > num_coordinates:
            rows = updates[:, _spread_coordinates(key, d, num_coordinates)]
        rows = jnp.where(is_finite[:, None], rows.astype(jnp.float32), 0)
        centred = rows - vectors.combine(weighing.equal(is_finite), rows)
        centred = jnp.where(is_finite[:, None], centred, 0)
        # Scaled, so that huge updates do not overflow; the order of the scores is the same.
        centred = centred / jnp.maximum(jnp.max(jnp.abs(centred)), jnp.finfo(jnp.float32).tiny)
        gram = jnp.matmul(centred, centred.T, precision="highest")
        # With the singular vector v = centred^T u / s, the projection on v is s u.
        projections = jnp.linalg.eigh(gram)[1][:, -1]
        return weighing.nearest(jnp.where(is_finite, projections**2, jnp.inf), num_kept)

    is_kept = jax.vmap(keep)(jax.random.split(random.as_typed(key), num_iters))
    return weighing.equal(jnp.all(is_kept, axis=0) & is_finite)


@weighing.weighted_by(dnc_weights)
def dnc(
    key: Key,
    updates: Array,
    *,
    num_byzantine: ArrayLike,
    num_coordinates: int = 10_000,
    num_iters: int = 1,
    filter_fraction: ArrayLike = 1.0,
) -> jax.Array:
    """Divide and conquer (DnC): removes the clients that stand out along the main direction.

    In each iteration some coordinates are drawn, the updates there are centred, and the
    `floor(filter_fraction * num_byzantine)` clients with the largest squared projections on the top
    right singular vector are removed. The result is the mean of the clients that no iteration
    removed, and 0 if none is left.

    The coordinates are drawn one from each of `num_coordinates` equal stretches of the vector: no
    two are the same, as in the paper, and nothing of length d has to be shuffled.

    Args:
      key: a key.
      updates: one row a client, f32[n, d].
      num_byzantine: how many clients are assumed to be Byzantine; may be traced.
      num_coordinates: how many coordinates an iteration looks at; all if there are no more.
      num_iters: number of iterations.
      filter_fraction: how many clients an iteration removes, in units of num_byzantine; may be
        traced.

    Returns:
      f32[d] in the dtype of the updates.

    Static: num_coordinates, num_iters.

    Raises:
      ValueError: updates that are not floats [n, d], 2 * num_byzantine >= n, a count below 1, a
        filter_fraction that removes everyone.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> dnc(jax.random.key(0), jnp.array([[0.0], [1.0], [9.0]]), num_byzantine=1)
      Array([0.5], dtype=float32)

    Source: V. Shejwalkar, A. Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning
    Attacks and Defenses for Federated Learning", NDSS 2021.
    """
    weights = dnc_weights(
        key,
        updates,
        num_byzantine=num_byzantine,
        num_coordinates=num_coordinates,
        num_iters=num_iters,
        filter_fraction=filter_fraction,
    )
    return vectors.combine(weights, updates)
