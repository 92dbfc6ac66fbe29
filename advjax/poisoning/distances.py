"""Attacks that go as far as honest updates are apart: Min-Max and Min-Sum."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.core import checks, vectors
from advjax.core.typing import Array, Key
from advjax.poisoning import knowledge


def _length(vector: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(vector**2))


def _over(vector: jax.Array, length: jax.Array) -> jax.Array:
    return vector / jnp.where(length > 0, length, 1)


_DIRECTIONS = {
    "sign": lambda mean, std: -jnp.sign(mean),
    "std": lambda mean, std: -std,
    "unit": lambda mean, std: -_over(mean, _length(mean)),
}
_BOUNDS = ("max", "min")
# gamma0, and how many gammas are tried.
_Search = tuple[ArrayLike, int]


class _Ray(NamedTuple):
    """The points `mean + gamma direction`, gamma >= 0, with `direction = length * unit`."""

    view: knowledge.View
    mean: jax.Array
    unit: jax.Array
    length: jax.Array


def _ray(
    caller: str, updates: Array, is_byzantine: Array, knows: Array | None, direction: str
) -> _Ray:
    checks.known(caller, "direction", direction, _DIRECTIONS)
    view = knowledge.look(caller, updates, is_byzantine, knows)
    mean = knowledge.mean(view.rows, view.is_known)
    std = knowledge.std(view.rows, view.is_known)
    vector = _DIRECTIONS[direction](mean, std)
    length = _length(vector)
    return _Ray(view, mean, _over(vector, length), length)


def _from_mean(ray: _Ray) -> jax.Array:
    """`mean - x_i` of the known updates, f32[n, d]; zeros elsewhere."""
    return jnp.where(ray.view.is_known[:, None], ray.mean - ray.view.rows, 0)


def _halve(caller: str, largest: jax.Array, search: _Search) -> jax.Array:
    """The halving search for the largest gamma that keeps the bound, which those up to it do."""
    gamma0, num_halvings = search
    checks.non_negative(caller, "gamma0", gamma0)
    checks.at_least(caller, "num_halvings", num_halvings, 1)
    gamma = step = jnp.asarray(gamma0, largest.dtype)
    best = jnp.zeros_like(largest)
    for _ in range(num_halvings):
        step = step / 2
        holds = gamma <= largest
        best = jnp.where(holds, gamma, best)
        gamma = jnp.where(holds, gamma + step, gamma - step)
    return best


def _go(caller: str, ray: _Ray, distance: jax.Array, search: _Search | None) -> jax.Array:
    """The updates with malicious clients at that distance along the ray, or what `search` finds."""
    if search is not None:
        distance = _halve(caller, _over(distance, ray.length), search) * ray.length
    return knowledge.replace(ray.view, ray.mean + distance * ray.unit)


def min_max(
    key: Key,
    updates: Array,
    is_byzantine: Array,
    *,
    knows: Array | None = None,
    direction: str = "std",
    search: _Search | None = None,
) -> jax.Array:
    """Min-Max: the farthest `mean + gamma p` no farther from any update than two updates are.

    The largest gamma with `max_i ||mean + gamma p - x_i|| <= D = max_ij ||x_i - x_j||` over the
    known updates. The authors search for it by halving; it has a closed form. With
    `r_i = mean - x_i` and a unit vector p, it is the smallest root over i of
    `gamma^2 + 2 gamma <r_i, p> + ||r_i||^2 = D^2`.

    Knowledge: the known updates. The paper assumes all honest updates or those of the malicious
    clients alone, which is the default; for the former, `knows=~is_byzantine`.

    Args:
      key: not used; the attack is deterministic.
      updates: honest updates of all clients, f32[n, d].
      is_byzantine: which clients are malicious, bool[n].
      knows: whose honest updates the attacker sees, bool[n]; by default those of the malicious
        clients. Rows that are not finite are ignored.
      direction: p: "std" `-std`, "unit" `-mean / ||mean||`, or "sign" `-sign(mean)`.
      search: `(gamma0, num_halvings)` finds gamma as the authors' code does: gamma0 is tried, then
        steps gamma0 / 2, gamma0 / 4, ... up or down; the last gamma that kept the bound counts.
        It ends below 2 gamma0, however large the exact one is. They have gamma0 = 10, 30 or 50, in
        lengths of p.

    Returns:
      The updates with the Byzantine rows replaced, all by the same vector: the mean if only one
      update is known.

    Static: direction, num_halvings.

    Raises:
      ValueError: updates that are not floats [n, d], masks that are not bool[n], nobody known, an
        unknown direction, a negative gamma0 or no halvings.

    Source: V. Shejwalkar, A. Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning
    Attacks and Defenses for Federated Learning", NDSS 2021.
    """
    del key
    ray = _ray("min_max", updates, is_byzantine, knows, direction)
    from_mean = _from_mean(ray)
    # Zero rows stand at the mean, which is nearer to each update than the farthest update is.
    reach = jnp.max(vectors.squared_distances(from_mean))
    slack = jnp.maximum(reach - jnp.sum(from_mean**2, axis=1), 0)
    along = jnp.matmul(from_mean, ray.unit, precision="highest")
    # root - along without the cancellation where along > 0; elsewhere slack >= D^2 / n is enough.
    distances = _over(slack, along + jnp.sqrt(along**2 + slack))
    # Rows of zeros do not bind: the mean of r_i + gamma p has length gamma, so gamma <= D.
    return _go("min_max", ray, jnp.min(distances), search)


def min_sum(
    key: Key,
    updates: Array,
    is_byzantine: Array,
    *,
    knows: Array | None = None,
    direction: str = "std",
    bound: str = "max",
    search: _Search | None = None,
) -> jax.Array:
    """Min-Sum: the farthest `mean + gamma p` whose distances to all sum to no more than another's.

    The largest gamma with `sum_i ||mean + gamma p - x_i||^2 <= max_i sum_j ||x_i - x_j||^2` over
    the known updates. Both sums are those around the mean and n times a squared distance to it, so
    for a unit vector p it is `max_i ||x_i - mean||`.

    Knowledge: the known updates. The paper assumes all honest updates or those of the malicious
    clients alone, which is the default; for the former, `knows=~is_byzantine`.

    Args:
      key: not used; the attack is deterministic.
      updates: honest updates of all clients, f32[n, d].
      is_byzantine: which clients are malicious, bool[n].
      knows: whose honest updates the attacker sees, bool[n]; by default those of the malicious
        clients. Rows that are not finite are ignored.
      direction: p: "std" `-std`, "unit" `-mean / ||mean||`, or "sign" `-sign(mean)`.
      bound: "max" as in the paper, or "min" over i as in the authors' code, a weaker attack.
      search: `(gamma0, num_halvings)`, the authors' halving search as in `min_max`.

    Returns:
      The updates with the Byzantine rows replaced, all by the same vector: the mean if only one
      update is known.

    Static: direction, bound, num_halvings.

    Raises:
      ValueError: updates that are not floats [n, d], masks that are not bool[n], nobody known, an
        unknown direction or bound, a negative gamma0 or no halvings.

    Source: V. Shejwalkar, A. Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning
    Attacks and Defenses for Federated Learning", NDSS 2021.
    """
    del key
    checks.known("min_sum", "bound", bound, _BOUNDS)
    ray = _ray("min_sum", updates, is_byzantine, knows, direction)
    squares = jnp.sum(_from_mean(ray) ** 2, axis=1)
    largest = jnp.max(squares)
    smallest = jnp.min(jnp.where(ray.view.is_known, squares, largest))
    distance = jnp.sqrt(largest if bound == "max" else smallest)
    return _go("min_sum", ray, distance, search)
