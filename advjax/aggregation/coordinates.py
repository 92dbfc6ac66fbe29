"""Rules that look at each coordinate by itself: median, trimmed mean, mean around the median.

The values of a coordinate are sorted over the clients. NaN and infinity come last and minus
infinity first, so rules that leave out the ends leave them out.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.aggregation import requirements
from advjax.core import checks, vectors
from advjax.core.typing import Array

# What the median of an even number of values is: the mean of the middle two, or the lower one.
Even = Literal["midpoint", "lower"]


def _median(rows: Sequence[jax.Array], even: Even) -> jax.Array:
    lower, upper = rows[(len(rows) - 1) // 2], rows[len(rows) // 2]
    return lower if even == "lower" else 0.5 * lower + 0.5 * upper


def check_even(caller: str, even: str) -> None:
    """`even` is "midpoint" or "lower"."""
    checks.known(caller, "even", even, ("midpoint", "lower"))


def nearest_window(
    rows: Sequence[jax.Array], count: int, even: Even
) -> tuple[Sequence[jax.Array], jax.Array]:
    """Which of the sorted values are the `count` nearest to their median, and their mean.

    They are neighbours in the order. Their window starts at the lowest value and moves up as long
    as the value that it would gain is nearer to the median than the one that it would lose.

    Args:
      rows: m sorted rows f32[c].
      count: how many values are kept, at most m.
      even: see `median`.

    Returns:
      Whether each row is kept, m times bool[c]; the mean of what is kept, f32[c].
    """
    middle = _median(rows, even)
    moves = [
        gained - middle < middle - lost for lost, gained in zip(rows, rows[count:], strict=False)
    ]
    never = jnp.zeros_like(middle, bool)
    is_lost = moves + [never] * count
    is_gained = [~never] * count + moves
    is_kept = [gained & ~lost for gained, lost in zip(is_gained, is_lost, strict=True)]
    total = sum(jnp.where(kept, row, 0) for kept, row in zip(is_kept, rows, strict=True))
    return is_kept, total / count


def median(updates: Array, *, even: Even = "midpoint") -> jax.Array:
    """Coordinatewise median of the updates.

    Args:
      updates: one row a client, f32[n, d].
      even: what it is for even n: the "midpoint" of the middle two values, as NumPy, JAX and most
        papers have it, or the "lower" one, as PyTorch and code built on it have it.

    Returns:
      f32[d] in the dtype of the updates.

    Static: even.

    Raises:
      ValueError: updates that are not floats [n, d], an unknown `even`.

    Example:
      >>> import jax.numpy as jnp
      >>> updates = jnp.array([[0.0], [1.0], [3.0], [jnp.inf]])
      >>> median(updates), median(updates, even="lower")
      (Array([2.], dtype=float32), Array([1.], dtype=float32))

    Source: D. Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
    Rates", ICML 2018.
    """
    updates = requirements.updates("median", updates)
    check_even("median", even)
    return vectors.over_sorted(lambda rows: _median(rows, even), updates)


def trimmed_mean(updates: Array, *, num_byzantine: ArrayLike) -> jax.Array:
    """Coordinatewise trimmed mean: without the `num_byzantine` lowest and as many highest values.

    Args:
      updates: one row a client, f32[n, d].
      num_byzantine: how many values are left out on each side; may be traced.

    Returns:
      f32[d] in the dtype of the updates.

    Raises:
      ValueError: updates that are not floats [n, d], 2 * num_byzantine >= n.

    Example:
      >>> import jax.numpy as jnp
      >>> trimmed_mean(jnp.array([[0.0], [1.0], [3.0], [jnp.nan]]), num_byzantine=1)
      Array([2.], dtype=float32)

    Source: D. Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
    Rates", ICML 2018.
    """
    updates = requirements.updates("trimmed_mean", updates)
    n = len(updates)
    requirements.minority("trimmed_mean", num_byzantine, n)

    def average(rows):
        if checks.is_concrete(num_byzantine):  # then what is left out is not even sorted
            dropped = requirements.static("trimmed_mean", num_byzantine)
            kept = rows[dropped : n - dropped]
        else:
            is_kept = [(num_byzantine <= rank) & (rank < n - num_byzantine) for rank in range(n)]
            kept = [jnp.where(is_kept[rank], rows[rank], 0) for rank in range(n)]
        return sum(kept) / (n - 2 * num_byzantine)

    return vectors.over_sorted(average, updates)


def meamed(updates: Array, *, num_byzantine: int, even: Even = "midpoint") -> jax.Array:
    """Mean around the median: in each coordinate of the `n - num_byzantine` values nearest to it.

    Args:
      updates: one row a client, f32[n, d].
      num_byzantine: how many values are left out.
      even: see `median`.

    Returns:
      f32[d] in the dtype of the updates. Of two values equally far the lower one is kept.

    Static: num_byzantine, even.

    Raises:
      ValueError: updates that are not floats [n, d], 2 * num_byzantine >= n, an unknown `even`.

    Example:
      >>> import jax.numpy as jnp
      >>> meamed(jnp.array([[0.0], [1.0], [2.0], [9.0]]), num_byzantine=1)
      Array([1.], dtype=float32)

    Source: C. Xie, O. Koyejo, I. Gupta, "Generalized Byzantine-Tolerant SGD", 2018.
    """
    updates = requirements.updates("meamed", updates)
    requirements.minority("meamed", num_byzantine, len(updates))
    check_even("meamed", even)
    count = len(updates) - requirements.static("meamed", num_byzantine)
    return vectors.over_sorted(lambda rows: nearest_window(rows, count, even)[1], updates)
