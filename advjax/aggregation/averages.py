"""Rules that count every client: the mean, and the mean of updates of bounded length."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.aggregation import requirements, weighing
from advjax.core import checks, vectors
from advjax.core.typing import Array


def mean_weights(updates: Array, weights: Array | None = None) -> jax.Array:
    """The weights of `mean`, f32[n]."""
    updates = requirements.updates("mean", updates)
    n = len(updates)
    if weights is None:
        return jnp.full(n, 1 / n, jnp.float32)
    if jnp.shape(weights) != (n,):
        raise ValueError(
            f"mean: need one weight a client ({n}), got weights of shape {jnp.shape(weights)}."
        )
    checks.non_negative("mean", "weights", weights)
    if checks.is_concrete(weights) and not np.any(np.asarray(weights)):
        raise ValueError("mean: need a positive weight, got weights that are all 0.")
    weights = jnp.asarray(weights, jnp.float32)
    return weights / jnp.sum(weights)


@weighing.weighted_by(mean_weights)
def mean(updates: Array, weights: Array | None = None) -> jax.Array:
    """Federated averaging: `sum_i weights_i updates_i / sum_i weights_i`.

    A single Byzantine client moves it anywhere.

    Args:
      updates: one row a client, f32[n, d].
      weights: such as the sizes of the clients' data sets, [n]; equal by default.

    Returns:
      f32[d] in the dtype of the updates.

    Raises:
      ValueError: updates that are not floats [n, d], weights that are not [n], negative or all 0.

    Example:
      >>> import jax.numpy as jnp
      >>> updates = jnp.array([[0.0, 4.0], [2.0, 0.0]])
      >>> mean(updates)
      Array([1., 2.], dtype=float32)
      >>> mean(updates, jnp.array([3, 1]))
      Array([0.5, 3. ], dtype=float32)

    Source: B. McMahan et al., "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS 2017.
    """
    return vectors.combine(mean_weights(updates, weights), updates)


def _bound_factors(caller: str, updates: jax.Array, radius: ArrayLike | str) -> jax.Array:
    """`min(1, radius / ||update_i||)`, f32[n]; 0 for a row that is not finite."""
    lengths = jnp.sqrt(vectors.squared_norms(updates))
    if isinstance(radius, str):
        checks.known(caller, "radius", radius, ("mean", "median"))
        average = jnp.nanmean if radius == "mean" else jnp.nanmedian
        bound = average(jnp.where(jnp.isfinite(lengths), lengths, jnp.nan))
    else:
        checks.non_negative(caller, "radius", radius)
        bound = jnp.asarray(radius, lengths.dtype)
    # Written so that a length of 0 gives 1; where no row is finite, their average is NaN.
    factors = jnp.where(lengths > bound, bound / lengths, 1)
    return jnp.where(jnp.isfinite(lengths), factors, 0)


def clipping(updates: Array, radius: ArrayLike | str) -> jax.Array:
    """Each update no longer than the radius: `updates_i min(1, radius / ||updates_i||)`.

    To be put before another rule; `mean` of it is `norm_bounding`. An update that is not finite has
    no direction and becomes 0.

    Args:
      updates: one row a client, f32[n, d].
      radius: a length, or the "mean" or "median" length of the finite updates.

    Returns:
      Updates like those given.

    Raises:
      ValueError: updates that are not floats [n, d], a radius that is negative or unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> clipping(jnp.array([[0.0, 4.0], [1.0, 0.0]]), 2.0)
      Array([[0., 2.],
             [1., 0.]], dtype=float32)

    Source: see `norm_bounding`.
    """
    updates = requirements.updates("clipping", updates)
    factors = _bound_factors("clipping", updates, radius)[:, None]
    return jnp.where(factors != 0, factors * updates, 0).astype(updates.dtype)


def norm_bounding_weights(updates: Array, radius: ArrayLike | str) -> jax.Array:
    """The weights of `norm_bounding`, f32[n], which sum to less than 1 where it clips."""
    updates = requirements.updates("norm_bounding", updates)
    return _bound_factors("norm_bounding", updates, radius) / len(updates)


@weighing.weighted_by(norm_bounding_weights)
def norm_bounding(updates: Array, radius: ArrayLike | str) -> jax.Array:
    """Norm bounding: the mean of the updates, each scaled to a length of at most `radius`.

    `mean_i updates_i min(1, radius / ||updates_i||)`. It bounds what a client can do; it does not
    remove one. An update that is not finite counts as 0.

    Args:
      updates: one row a client, f32[n, d], as differences to the global model: it matters where
        0 is.
      radius: a length, or the "mean" or "median" length of the round's finite updates. The paper
        uses a fixed length; only the median withstands clients of huge length.

    Returns:
      f32[d] in the dtype of the updates.

    Raises:
      ValueError: updates that are not floats [n, d], a radius that is negative or unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> norm_bounding(jnp.array([[0.0, 4.0], [1.0, 0.0]]), 2.0)
      Array([0.5, 1. ], dtype=float32)

    Source: Z. Sun et al., "Can You Really Backdoor Federated Learning?", 2019.
    """
    return vectors.combine(norm_bounding_weights(updates, radius), updates)
