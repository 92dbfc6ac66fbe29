"""What an attacker sees of the honest updates, and how crafted rows take their places."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advjax.core import checks, vectors
from advjax.core.typing import Array


class View(NamedTuple):
    """A round as the attacker sees it.

    Attributes:
      updates: the honest updates of all clients as they came, [n, d].
      is_byzantine: which clients are malicious, bool[n].
      rows: the updates that are known, f32[n, d]; zeros elsewhere.
      is_known: which updates are known and finite, bool[n].
    """

    updates: jax.Array
    is_byzantine: jax.Array
    rows: jax.Array
    is_known: jax.Array


def _mask(caller: str, name: str, value: Array, n: int) -> None:
    if not hasattr(value, "dtype") or value.dtype != bool or value.shape != (n,):
        got = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else repr(value)
        raise ValueError(f"{caller}: need {name} as an array bool[{n}], one a client, got {got}.")


def look(
    caller: str, updates: Array, is_byzantine: Array, knows: Array | None, *, needs: bool = True
) -> View:
    """Checks what every attack is given, and covers what the attacker does not know.

    Args:
      caller: name of the attack.
      updates: honest updates of all clients, f32[n, d].
      is_byzantine: bool[n].
      knows: whose honest updates the attacker sees, bool[n]; by default its own.
      needs: whether the attack is made of what it knows.

    Raises:
      ValueError: updates of another rank or dtype, masks of another length or dtype, an attack
        that needs knowledge and has none.
    """
    checks.updates(caller, updates)
    n = len(updates)
    _mask(caller, "is_byzantine", is_byzantine, n)
    if knows is None:
        knows = is_byzantine
    _mask(caller, "knows", knows, n)
    # np.asarray, since np.any of a constant jax array would be traced under jit.
    if needs and checks.is_concrete(knows, is_byzantine) and not np.any(np.asarray(knows)):
        num_byzantine = int(np.sum(np.asarray(is_byzantine)))
        if num_byzantine:
            raise ValueError(
                f"{caller}: need at least one client in knows, got none of n={n} with "
                f"num_byzantine={num_byzantine}."
            )
    updates, is_byzantine = jnp.asarray(updates), jnp.asarray(is_byzantine)
    is_known = jnp.asarray(knows) & vectors.finite_rows(updates)
    rows = updates.astype(jnp.promote_types(updates.dtype, jnp.float32))
    return View(updates, is_byzantine, jnp.where(is_known[:, None], rows, 0), is_known)


def replace(view: View, crafted: Array) -> jax.Array:
    """The updates with the crafted f32[d] or f32[n, d] in the Byzantine rows."""
    crafted = jnp.asarray(crafted).astype(view.updates.dtype)
    return jnp.where(view.is_byzantine[:, None], crafted, view.updates)


def mean(rows: Array, counts: Array) -> jax.Array:
    """The mean f32[d] of the rows that count, bool[n]; 0 if none does."""
    return vectors.combine(counts / jnp.maximum(jnp.sum(counts), 1), rows)


def std(rows: Array, counts: Array) -> jax.Array:
    """The standard deviation f32[d] (ddof = 1) of the rows that count; 0 if one does."""
    squares = (rows - mean(rows, counts)) ** 2
    return jnp.sqrt(vectors.combine(counts / jnp.maximum(jnp.sum(counts) - 1, 1), squares))
