"""How far a value stands from the others: median absolute deviations."""

import jax.numpy as jnp

from advjax.core.typing import Array

NORMAL = 1.4826  # a normal distribution's standard deviation, in its median absolute deviations


def anomaly_indices(values: Array) -> Array:
    """How far each value lies below the median: `(median - v_i) / (1.4826 MAD)`, signed.

    MAD is the median of `|v_i - median|`. Of an even number the median is the mean of the two in
    the middle, as in NumPy; `torch.median`, and so what is built on it, takes the lower one. Where
    more than half of the values are equal MAD is zero: it is then taken as float32's resolution of
    the largest value, so that an index is large but finite, and zero for the median itself.

    Args:
      values: f32[n].

    Returns:
      f32[n], positive for values below the median.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(float(i), 2) for i in anomaly_indices(jnp.array([1.0, 9.0, 10.0, 11.0]))]
      [5.73, 0.34, -0.34, -1.01]

    Source: B. Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
    Networks", IEEE S&P 2019.
    """
    values = jnp.asarray(values)
    median = jnp.median(values)
    limits = jnp.finfo(values.dtype)
    least = jnp.maximum(limits.eps * jnp.max(jnp.abs(values)), limits.tiny)
    return (median - values) / jnp.maximum(NORMAL * jnp.median(jnp.abs(values - median)), least)
