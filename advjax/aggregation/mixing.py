"""What is put before a rule: functions from updates to updates that make honest ones more alike.

`krum(nearest_neighbour_mixing(updates, num_byzantine=2), num_byzantine=2)`; see also `clipping`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.aggregation import requirements, weighing
from advjax.core import checks, random, vectors
from advjax.core.typing import Array, Key


def bucketing(key: Key, updates: Array, *, bucket_size: int) -> jax.Array:
    """The means of random buckets of at most `bucket_size` clients, whose sizes differ by one.

    A bucket with one Byzantine client is Byzantine: the rule that follows needs the same
    num_byzantine for fewer rows.

    Args:
      key: a key.
      updates: one row a client, f32[n, d].
      bucket_size: clients in a bucket.

    Returns:
      One row a bucket, f32[ceil(n / bucket_size), d] in the dtype of the updates.

    Static: bucket_size.

    Raises:
      ValueError: updates that are not floats [n, d], bucket_size not in 1 ... n.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> bucketing(jax.random.key(0), jnp.ones((5, 3)), bucket_size=2).shape
      (3, 3)

    Source: S. P. Karimireddy, L. He, M. Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets
    via Bucketing", ICLR 2022.
    """
    updates = requirements.updates("bucketing", updates)
    n = len(updates)
    checks.at_least("bucketing", "bucket_size", bucket_size, 1)
    if bucket_size > n:
        raise ValueError(
            f"bucketing: need bucket_size <= n, got bucket_size={bucket_size} and n={n}."
        )
    num_buckets = -(-n // bucket_size)
    order = jax.random.permutation(random.as_typed(key), n)
    # One member of each bucket at a time; in the end some buckets have none left.
    total = jnp.zeros((num_buckets, updates.shape[1]), jnp.float32)
    for members in np.array_split(np.arange(num_buckets * bucket_size), bucket_size):
        rows = updates[order[np.minimum(members, n - 1)]].astype(jnp.float32)
        total = total + jnp.where((members < n)[:, None], rows, 0)
    sizes = np.bincount(np.arange(n) % num_buckets, minlength=num_buckets)
    return (total / sizes[:, None].astype(np.float32)).astype(updates.dtype)


def nearest_neighbour_mixing(updates: Array, *, num_byzantine: ArrayLike) -> jax.Array:
    """Nearest neighbour mixing (NNM): each update becomes the mean of the n - f nearest to it.

    The update itself is one of them. Updates that are not finite stay as they are.

    Args:
      updates: one row a client, f32[n, d].
      num_byzantine: f, how many updates each client leaves out; may be traced.

    Returns:
      Updates like those given.

    Raises:
      ValueError: updates that are not floats [n, d], 2 * num_byzantine >= n.

    Example:
      >>> import jax.numpy as jnp
      >>> nearest_neighbour_mixing(jnp.array([[0.0], [1.0], [9.0]]), num_byzantine=1).ravel()
      Array([0.5, 0.5, 5. ], dtype=float32)

    Source: Y. Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under
    Heterogeneity", AISTATS 2023.
    """
    updates = requirements.updates("nearest_neighbour_mixing", updates)
    n = len(updates)
    requirements.minority("nearest_neighbour_mixing", num_byzantine, n)
    is_finite = jnp.isfinite(vectors.squared_norms(updates))[:, None]
    is_near = weighing.nearest(vectors.squared_distances(updates), n - num_byzantine)
    rows = jnp.where(is_finite, updates, 0).astype(jnp.float32)
    mixed = jnp.matmul(is_near.astype(jnp.float32), rows, precision="highest") / (n - num_byzantine)
    return jnp.where(is_finite, mixed, updates).astype(updates.dtype)
