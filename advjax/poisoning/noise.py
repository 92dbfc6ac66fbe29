"""Attacks that need no other client: none at all, the own update turned, and noise."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.core import checks
from advjax.core.typing import Array, Key
from advjax.poisoning import knowledge


def no_attack(
    key: Key, updates: Array, is_byzantine: Array, *, knows: Array | None = None
) -> jax.Array:
    """Malicious clients that behave: the updates come back.

    Args:
      key: not used.
      updates: honest updates of all clients, f32[n, d].
      is_byzantine: which clients are malicious, bool[n].
      knows: not used.

    Returns:
      The updates.

    Raises:
      ValueError: updates that are not floats [n, d], masks that are not bool[n].
    """
    del key
    return knowledge.look("no_attack", updates, is_byzantine, knows, needs=False).updates


def sign_flip(
    key: Key,
    updates: Array,
    is_byzantine: Array,
    *,
    knows: Array | None = None,
    scale: ArrayLike = -1.0,
) -> jax.Array:
    """Sign flip: a malicious client sends `scale` times its own honest update.

    Knowledge: its own update, here and in the paper; `knows` is not used. Some libraries flip the
    mean of the honest updates instead; that is `ipm` with epsilon 1.

    Args:
      key: not used; the attack is deterministic.
      updates: honest updates of all clients, f32[n, d].
      is_byzantine: which clients are malicious, bool[n].
      knows: not used.
      scale: factor of the update; the paper's experiments take -4.

    Returns:
      The updates with the Byzantine rows replaced.

    Raises:
      ValueError: updates that are not floats [n, d], masks that are not bool[n].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> updates = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> sign_flip(jax.random.key(0), updates, jnp.array([True, False]))
      Array([[-1., -2.],
             [ 3.,  4.]], dtype=float32)

    Source: L. Li et al., "RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed
    Learning from Heterogeneous Datasets", AAAI 2019.
    """
    del key
    view = knowledge.look("sign_flip", updates, is_byzantine, knows, needs=False)
    return knowledge.replace(view, jnp.asarray(scale, view.rows.dtype) * view.updates)


def gaussian(
    key: Key,
    updates: Array,
    is_byzantine: Array,
    *,
    knows: Array | None = None,
    stddev: ArrayLike = 200.0,
) -> jax.Array:
    """Gaussian attack: a malicious client sends `N(0, stddev^2 I)` in place of its update.

    Knowledge: none, here and in the papers; `knows` is not used.

    Args:
      key: a key; each malicious client draws its own noise.
      updates: honest updates of all clients, f32[n, d].
      is_byzantine: which clients are malicious, bool[n].
      knows: not used.
      stddev: standard deviation of a coordinate. The papers take 200; public libraries 1 or 0.1.

    Returns:
      The updates with the Byzantine rows replaced.

    Raises:
      ValueError: updates that are not floats [n, d], masks that are not bool[n], a negative stddev.

    Source: P. Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent", NeurIPS 2017; C. Xie et al., "Generalized Byzantine-tolerant SGD", 2018.
    """
    view = knowledge.look("gaussian", updates, is_byzantine, knows, needs=False)
    checks.non_negative("gaussian", "stddev", stddev)
    dtype = view.rows.dtype
    noise = jax.random.normal(key, view.updates.shape, dtype)
    return knowledge.replace(view, jnp.asarray(stddev, dtype) * noise)
