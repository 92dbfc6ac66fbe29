"""Differences of logits, and how many of them are small."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.core import checks, random
from advjax.core.typing import Array, Key

# Of float32 logits: what lies below cannot be told from a tie.
_SMALLEST = 1e-6


class LogitGaps(NamedTuple):
    """How far the largest logit is above the others.

    Attributes:
      gaps: Delta_1j for j = 2 ... k, f32[n, k - 1], ascending along the last axis.
      exponents: for each j the exponent of the density of Delta_1j near zero, f32[k - 1].
      deviations: the standard error of each, f32[k - 1].
      limits: up to where each was fitted, f32[k - 1].
    """

    gaps: Array
    exponents: Array
    deviations: Array
    limits: Array


def logit_gaps(logits: Array, *, share: ArrayLike = 0.05) -> LogitGaps:
    """Sorted logit differences, and the power of their density near zero.

    `Delta_1j = z_(1) - z_(j)`, where z_(1) >= z_(2) >= ... are an image's logits. Near zero the
    density is fitted by `p(Delta) ~ Delta ** exponent`, by maximum likelihood on the smallest
    `share` of the gaps: `exponent + 1 = m / sum log(limit / Delta)`. Independent logits have the
    exponent j - 2: Delta_12 has a finite density at zero, and the others none.

    Args:
      logits: f32[n, k], finite.
      share: the share of the gaps that the fit uses, in (0, 1].

    Returns:
      A `LogitGaps`.

    Raises:
      ValueError: logits of another shape, or of fewer than two classes, or no floats, a share
        outside (0, 1].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> logit_gaps(jnp.array([[1.0, 4.0, 3.0]]), share=1.0).gaps
      Array([[1., 3.]], dtype=float32)
      >>> iid = random_logits(jax.random.key(0), 100_000, 10)
      >>> [round(float(exponent)) for exponent in logit_gaps(iid, share=0.01).exponents[:3]]
      [0, 1, 2]

    Source: E. Cubuk, B. Zoph, S. Schoenholz, Q. Le, "Intriguing Properties of Adversarial
    Examples", 2017. The estimator is ours: B. Hill, "A Simple General Approach to Inference about
    the Tail of a Distribution", Annals of Statistics 1975, at zero instead of infinity.
    """
    logits = jnp.asarray(logits)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logit_gaps: need logits of shape [n, k] with k >= 2, got shape {logits.shape}."
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logit_gaps: need logits that are floats, got dtype {logits.dtype}.")
    if checks.is_concrete(share) and not 0 < np.asarray(share) <= 1:
        raise ValueError(f"logit_gaps: need 0 < share <= 1, got share={share}.")
    ordered = -jnp.sort(-logits, axis=-1)
    gaps = ordered[:, :1] - ordered[:, 1:]
    limits = jnp.quantile(gaps, jnp.asarray(share, gaps.dtype), axis=0)
    ratios = jnp.clip(gaps / limits, _SMALLEST, 1)
    number = jnp.sum(gaps <= limits, axis=0)
    total = jnp.sum(-jnp.log(ratios), axis=0)
    powers = jnp.where(total > 0, number / jnp.where(total > 0, total, 1), jnp.nan)
    return LogitGaps(gaps, powers - 1, powers / jnp.sqrt(number), limits)


def random_logits(key: Key, num_examples: int, num_classes: int) -> Array:
    """Independent logits, uniform in [0, 1], f32[n, k]: what trained networks are set against.

    Args:
      key: a key.
      num_examples: n.
      num_classes: k.
    """
    return jax.random.uniform(random.as_typed(key), (num_examples, num_classes))
