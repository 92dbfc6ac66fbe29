"""Keys: one an example, so that no result depends on how examples are batched."""

import functools
import zlib

import jax
import jax.numpy as jnp

from advjax.core.typing import Array, Key


def as_typed(key: Key) -> Key:
    """The key as a typed key; the raw uint32 keys of `jax.random.PRNGKey` are wrapped.

    Raises:
      ValueError: something else, such as a number.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if dtype != jnp.uint32:
        raise ValueError(f"key: need a key such as jax.random.key(0), got {key!r}.")
    return jax.random.wrap_key_data(key)


def example_keys(key: Key, num_examples: int) -> Key:
    """One key an example: `fold_in(key, i)` for example i, or the keys given if they are [b].

    Args:
      key: a key, or one key an example [b].
      num_examples: b.

    Raises:
      ValueError: keys for another number of examples.
    """
    key = as_typed(key)
    if key.ndim == 0:
        return fold_in_each(key, jnp.arange(num_examples))
    if key.shape != (num_examples,):
        raise ValueError(
            f"key: need one key or one key an example ({num_examples}), got shape {key.shape}."
        )
    return key


def fold_in_each(key: Key, index: Array) -> Key:
    """Keys `fold_in(key, i)` for each i of `index`, int32[n]."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(index)


def named(key: Key, name: str) -> Key:
    """The key for a thing of that name: independent of order and of what else is computed."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
