"""How far a value stands from the others: median absolute deviations."""

import jax.numpy as jnp

from advjax.core.typing import Array

MIN_VALUES = 3  # of fewer, none can stand apart from the others' median
NORMAL = 1.4826  # a normal distribution's standard deviation, in its median absolute deviations


def anomaly_indices(values: Array, where: Array | None = None) -> Array:
    """How far each value lies below the median: `(median - v_i) / (1.4826 MAD)`, signed.

    MAD is the median of `|v_i - median|`. Of an even number the median is the mean of the two in
    the middle, as in NumPy; `torch.median`, and so what is built on it, takes the lower one. Where
    more than half of the values are equal MAD is zero: it is then taken as float32's resolution of
    the largest value, so that an index is large but finite, and zero for the median itself.

    Args:
      values: f32[n].
      where: bool[n], the values that count; all if None.

    Returns:
      f32[n], positive for values below the median; 0 for values that do not count, and for all if
      fewer than three count.

    Raises:
      ValueError: fewer than three values.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(float(i), 2) for i in anomaly_indices(jnp.array([1.0, 9.0, 10.0, 11.0]))]
      [5.73, 0.34, -0.34, -1.01]

    Source: B. Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
    Networks", IEEE S&P 2019.
    """
    if jnp.ndim(values) != 1 or len(values) < MIN_VALUES:
        raise ValueError(
            f"anomaly_indices: need at least {MIN_VALUES} values, got shape {jnp.shape(values)}."
        )
    values = jnp.asarray(values, jnp.result_type(values, jnp.float32))
    median_of, max_of = jnp.median, jnp.max
    if where is not None:
        values = jnp.where(where, values, jnp.nan)
        median_of, max_of = jnp.nanmedian, jnp.nanmax
    median = median_of(values)
    limits = jnp.finfo(values.dtype)
    least = jnp.maximum(limits.eps * max_of(jnp.abs(values)), limits.tiny)
    indices = (median - values) / jnp.maximum(NORMAL * median_of(jnp.abs(values - median)), least)
    if where is None:
        return indices
    return jnp.where(where & (jnp.sum(where) >= MIN_VALUES), indices, 0)
