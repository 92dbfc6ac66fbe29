"""Rules that weigh the rows again and again: geometric median, covariance-bound agnostic filter."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.aggregation import geometry, requirements, weighing
from advjax.core import checks, random, vectors
from advjax.core.typing import Array, Key

# A row that lies on the centre counts for much, not for infinity, even without smoothing.
_LEAST_DISTANCE = 1e-20
# ByzFL draws CAF's directions anew each time: on its reference case (50 Gaussian rows) four draws
# in ten keep the plain mean, which is the reference's answer and the one of this key.
_DIRECTIONS = 1


def geometric_median_weights(
    updates: Array, *, smoothing: ArrayLike = 0.1, num_iters: int = 3
) -> jax.Array:
    """The weights of `geometric_median`, f32[n]; their sum is 1."""
    updates = requirements.updates("geometric_median", updates)
    checks.non_negative("geometric_median", "smoothing", smoothing)
    checks.at_least("geometric_median", "num_iters", num_iters, 1)
    rows = updates.astype(jnp.float32)
    squares = vectors.squared_norms(rows)

    def weigh(distances):
        inverse = 1 / jnp.maximum(distances, jnp.maximum(smoothing, _LEAST_DISTANCE))
        return geometry.normalised(jnp.where(jnp.isfinite(distances), inverse, 0))

    def iteration(_, weights):
        center = vectors.combine(weights, rows)
        return weigh(geometry.distances_to(center, rows, squares))

    return jax.lax.fori_loop(1, num_iters, iteration, weigh(jnp.sqrt(squares)))


@weighing.weighted_by(geometric_median_weights)
def geometric_median(
    updates: Array, *, smoothing: ArrayLike = 0.1, num_iters: int = 3
) -> jax.Array:
    """Smoothed Weiszfeld steps to the point with the least sum of distances to the updates.

    `v <- sum_i b_i x_i / sum_i b_i` with `b_i = 1 / max(smoothing, ||x_i - v||)`, from v = 0, the
    global model. Few steps do not reach the median of updates that share a large common part.

    Args:
      updates: f32[n, d]; rows that are not finite are left out.
      smoothing: the distance below which rows count alike, in the unit of the updates.
      num_iters: number of steps.

    Returns:
      The aggregate, [d].

    Static: num_iters.

    Raises:
      ValueError: updates of the wrong rank, a negative smoothing, no step.

    Example:
      >>> import jax.numpy as jnp
      >>> updates = jnp.array([[1.0], [1.0], [1.0], [1e6]])
      >>> bool(jnp.abs(geometric_median(updates) - 1) < 0.1)
      True

    Source: K. Pillutla, S. Kakade, Z. Harchaoui, "Robust Aggregation for Federated Learning", IEEE
    Transactions on Signal Processing 2022.
    """
    weights = geometric_median_weights(updates, smoothing=smoothing, num_iters=num_iters)
    return vectors.combine(weights, updates)


def caf_weights(
    updates: Array,
    *,
    num_byzantine: ArrayLike,
    num_power_steps: int | None = 1,
    key: Key | None = None,
) -> jax.Array:
    """The weights of `caf`, f32[n]; their sum is 1."""
    updates = requirements.updates("caf", updates)
    n, d = updates.shape
    requirements.minority("caf", num_byzantine, n)
    if num_power_steps is not None:
        checks.at_least("caf", "num_power_steps", num_power_steps, 1)
    is_counted = jnp.isfinite(geometry.norms(updates))
    distances = vectors.squared_distances(updates)
    distances = jnp.where(is_counted[:, None] & is_counted[None, :], distances, 0)
    key = jax.random.key(_DIRECTIONS) if key is None else random.as_typed(key)

    def along_random_direction(number):
        direction = jax.random.normal(jax.random.fold_in(key, number), (d,))
        lengths = updates.astype(jnp.float32) @ direction / jnp.linalg.norm(direction)
        return jnp.where(is_counted, lengths, 0)

    def principal_direction(counts, number):
        """The largest variance, and the rows along its direction."""
        shares = geometry.normalised(counts)
        # Inner products of the rows centred at their weighted mean, from the distances alone.
        squares = distances @ shares - shares @ distances @ shares / 2
        inner = (squares[:, None] + squares[None, :] - distances) / 2

        def along(combination):
            products = inner @ combination
            length = jnp.sqrt(jnp.maximum(combination @ products, 0))
            return length, products / jnp.where(length > 0, length, 1)

        if num_power_steps is None:
            roots = jnp.sqrt(shares)
            _, directions = jnp.linalg.eigh(roots[:, None] * inner * roots[None, :])
            _, projections = along(roots * directions[:, -1])
        else:
            projections = along_random_direction(number)
            projections -= shares @ projections
        return jax.lax.fori_loop(
            0, num_power_steps or 1,
            lambda _, carry: along(shares * carry[1]), (jnp.zeros(()), projections),
        )  # fmt: skip

    def is_heavy(carry):
        return jnp.sum(carry[0]) > n - 2 * num_byzantine

    def lighten(carry):
        counts, least, weights, number = carry
        variance, projections = principal_direction(counts, number)
        weights = jnp.where(variance < least, geometry.normalised(counts), weights)
        squares = jnp.where(counts > 0, projections**2, 0)
        farthest = jnp.max(squares)
        # The farthest row drops out to the last bit; where rows do not differ all are farthest.
        is_nearer = squares < farthest
        counts *= jnp.where(is_nearer, 1 - squares / jnp.where(is_nearer, farthest, 1), 0)
        return counts, jnp.minimum(variance, least), weights, number + 1

    counts = is_counted.astype(jnp.float32)
    carry = (counts, jnp.asarray(jnp.inf), geometry.normalised(counts), 0)
    return jax.lax.while_loop(is_heavy, lighten, carry)[2]


@weighing.weighted_by(caf_weights)
def caf(
    updates: Array,
    *,
    num_byzantine: ArrayLike,
    num_power_steps: int | None = 1,
    key: Key | None = None,
) -> jax.Array:
    """Covariance-bound agnostic filter: the weighted mean with the least spread on the way down.

    From counts c = 1: with the mean and the covariance under c, and the direction v of the largest
    variance, `c_i <- c_i (1 - t_i / max_j t_j)`, `t_i = <x_i - mean, v>^2`, until the counts sum
    to no more than `n - 2 num_byzantine`. The mean whose largest variance was least is returned.

    Args:
      updates: f32[n, d]; rows that are not finite are left out.
      num_byzantine: how many rows may be Byzantine; may be traced.
      num_power_steps: steps of the power method to v, each time from a new random direction; None
        for the exact v. One step is what the authors' own ByzFL takes; the exact v drops more of
        an attack that does not stand out.
      key: for the random directions, which by default are always the same.

    Returns:
      The aggregate, [d].

    Static: num_power_steps.

    Raises:
      ValueError: updates of the wrong rank, half of the rows or more Byzantine, no power step.

    Source: Y. Allouah, R. Guerraoui, J. Stephan, "Towards Trustworthy Federated Learning with
    Untrusted Participants", ICML 2025.
    """
    # The maximum of t is taken over the rows that still count: a row that was dropped would
    # otherwise stop the descent. ByzFL takes it over all.
    weights = caf_weights(
        updates, num_byzantine=num_byzantine, num_power_steps=num_power_steps, key=key
    )
    return vectors.combine(weights, updates)
