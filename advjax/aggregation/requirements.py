"""What every rule asks of its updates and of the number of Byzantine clients."""

import jax
import jax.numpy as jnp
import numpy as np

from advjax.core import checks
from advjax.core.typing import Array

# A number of clients; an array may be traced.
Count = int | Array


def updates(caller: str, value: Array) -> jax.Array:
    """Updates are floats f32[n, d] of at least one client; returns them as a jax array."""
    checks.updates(caller, value)
    return jnp.asarray(value)


def num_byzantine(caller: str, value: Count, n: int, *, most: int, bound: str) -> None:
    """The number of Byzantine clients is an integer in 0 ... most, where it is concrete.

    Args:
      caller: name of the rule.
      value: the number; may be traced.
      n: number of clients.
      most: the largest number that the rule bears with n clients.
      bound: the same in words, such as "n > 2 * num_byzantine + 2".
    """
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f"{caller}: need an integer num_byzantine, got num_byzantine={value}.")
    if not checks.is_concrete(value):
        return
    number = int(np.asarray(value))
    if number < 0:
        raise ValueError(f"{caller}: need num_byzantine >= 0, got num_byzantine={number}.")
    if number > most:
        raise ValueError(f"{caller}: need {bound}, got num_byzantine={number} and n={n}.")


def minority(caller: str, value: Count, n: int) -> None:
    """Fewer than half of the clients are Byzantine."""
    num_byzantine(caller, value, n, most=(n - 1) // 2, bound="0 <= 2 * num_byzantine < n")


def static(caller: str, value: Count) -> int:
    """The number of Byzantine clients as an integer, for rules whose program depends on it."""
    if not checks.is_concrete(value):
        raise ValueError(f"{caller}: need a static num_byzantine, got a traced one.")
    return int(np.asarray(value))
