"""Attacks made of the mean and the standard deviation of honest updates: LIE and IPM."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.core import checks
from advjax.core.typing import Array, Key
from advjax.poisoning import knowledge


def _supported_quantile(caller: str, is_byzantine: Array) -> jax.Array:
    """How far from the mean an update may lie with s honest ones, enough for a majority, beyond."""
    n = len(is_byzantine)
    majority = n // 2 + 1
    if n < 3:
        raise ValueError(f"{caller}: need n >= 3 to choose z, got n={n}; give z.")
    num_byzantine = jnp.sum(is_byzantine)
    if checks.is_concrete(is_byzantine) and np.sum(is_byzantine) >= majority:
        raise ValueError(
            f"{caller}: need 2 * num_byzantine <= n to choose z, got "
            f"num_byzantine={np.sum(is_byzantine)} and n={n}; give z."
        )
    # n - m - s honest clients of n - m, where s = majority - m. A majority needs none of them.
    share = (n - majority) / jnp.maximum(n - num_byzantine, n - majority + 1)
    return jnp.where(num_byzantine < majority, jax.scipy.stats.norm.ppf(share), 0)


def lie(
    key: Key,
    updates: Array,
    is_byzantine: Array,
    *,
    knows: Array | None = None,
    z: ArrayLike | None = None,
    sign: ArrayLike = 1.0,
) -> jax.Array:
    """A little is enough (LIE): `mean + sign z std` of the known updates, coordinate by coordinate.

    z is small enough that s honest clients lie farther out, which makes a majority with the m
    malicious ones: the normal quantile of `(n - m - s) / (n - m)`, `s = floor(n / 2 + 1) - m`.
    For n = 50 and m = 10 it is 0.2533. The code of "Manipulating the Byzantine" (NDSS 2021), which
    others copied, has z = 0.72575 there: the normal distribution's function of that fraction in
    place of its quantile.

    Knowledge: mean and standard deviation (ddof = 1) of the known updates. The paper assumes that
    the malicious clients' own honest updates suffice to estimate them, which is the default;
    benchmarks often give it all updates.

    Args:
      key: not used; the attack is deterministic.
      updates: honest updates of all clients, f32[n, d].
      is_byzantine: which clients are malicious, bool[n].
      knows: whose honest updates the attacker sees, bool[n]; by default those of the malicious
        clients. Rows that are not finite are ignored.
      z: number of standard deviations; by default from n and m as above. Under tracing it is
        0 where 2 m > n, as in a round of drawn clients of whom most are malicious.
      sign: 1 to add, as here and in most code, or -1 to subtract.

    Returns:
      The updates with the Byzantine rows replaced, all by the same vector.

    Raises:
      ValueError: updates that are not floats [n, d], masks that are not bool[n], nobody known;
        without z, fewer than three clients or more than half of them malicious.

    Source: M. Baruch, G. Baruch, Y. Goldberg, "A Little Is Enough: Circumventing Defenses for
    Distributed Learning", NeurIPS 2019.
    """
    del key
    view = knowledge.look("lie", updates, is_byzantine, knows)
    if z is None:
        z = _supported_quantile("lie", is_byzantine)
    mean = knowledge.mean(view.rows, view.is_known)
    std = knowledge.std(view.rows, view.is_known)
    return knowledge.replace(view, mean + jnp.asarray(sign) * jnp.asarray(z) * std)


def ipm(
    key: Key,
    updates: Array,
    is_byzantine: Array,
    *,
    epsilon: ArrayLike,
    knows: Array | None = None,
) -> jax.Array:
    """Inner product manipulation: `-epsilon mean` of the known updates.

    A small epsilon (0.1, 0.5) hides among honest updates; from `(n - m) / m` on the mean of all
    updates changes its sign.

    Knowledge: the mean of the known updates. The paper assumes all honest updates, which is
    `knows=~is_byzantine`; by default the attacker uses those of the malicious clients.

    Args:
      key: not used; the attack is deterministic.
      updates: honest updates of all clients, f32[n, d].
      is_byzantine: which clients are malicious, bool[n].
      epsilon: strength. There is no usual value: code has 0.1, 0.5, 1, 2 and 100.
      knows: whose honest updates the attacker sees, bool[n]; by default those of the malicious
        clients. Rows that are not finite are ignored.

    Returns:
      The updates with the Byzantine rows replaced, all by the same vector.

    Raises:
      ValueError: updates that are not floats [n, d], masks that are not bool[n], nobody known, a
        negative epsilon.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> updates = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> is_byzantine = jnp.array([True, False])
      >>> ipm(jax.random.key(0), updates, is_byzantine, epsilon=0.5, knows=~is_byzantine)
      Array([[-1.5, -2. ],
             [ 3. ,  4. ]], dtype=float32)

    Source: C. Xie, O. Koyejo, I. Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner
    Product Manipulation", UAI 2019.
    """
    del key
    view = knowledge.look("ipm", updates, is_byzantine, knows)
    checks.non_negative("ipm", "epsilon", epsilon)
    mean = knowledge.mean(view.rows, view.is_known)
    return knowledge.replace(view, -jnp.asarray(epsilon) * mean)
