"""Fang's attacks, tailored to the aggregation rule of the server."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.core import checks, vectors
from advjax.core.typing import Array, Key
from advjax.poisoning import knowledge

# Bulyan and Multi-Krum select as Krum does, and what moves a median moves a trimmed mean.
_SELECTING = ("krum", "multi_krum", "bulyan")
_COORDINATE = ("median", "trimmed_mean")


def _selected_far(
    rows: Array, crowd: Array, direction: Array, num_crafted: Array, num_neighbors: Array,
    num_halvings: int,
) -> jax.Array:  # fmt: skip
    """The update `-lambda direction` with the largest lambda of the grid that Krum selects.

    Krum chooses among the crowd (rows where bool[n]) and `num_crafted` equal crafted updates. The
    squared distances from these to the crowd are quadratics in lambda, and those within the crowd
    are sorted once, so that the scores for all lambdas follow without another look at the rows.
    """
    num_honest = jnp.sum(crowd)
    num_neighbors = jnp.clip(num_neighbors, 1, jnp.maximum(num_honest + num_crafted - 1, 1))
    squares = jnp.sum(rows**2, axis=1)
    along = jnp.matmul(rows, direction, precision="highest")
    length = jnp.sum(direction**2)
    distances = vectors.squared_distances(jnp.where(crowd[:, None], rows, jnp.inf))
    is_self = jnp.eye(len(rows), dtype=bool)
    others = jnp.sort(jnp.where(is_self, jnp.inf, distances), axis=1)
    # sums[i, j]: from row i to the j nearest others of the crowd.
    sums = jnp.pad(jnp.cumsum(others, axis=1), ((0, 0), (1, 0)))
    num_seen = jnp.maximum(num_neighbors - (num_crafted - 1), 0)

    def is_selected(size):
        to_crafted = jnp.maximum(squares + 2 * size * along + size**2 * length, 0)
        # Among the neighbours of an honest row are the honest ones nearer than the crafted ones.
        num_nearer = jnp.sum(others < to_crafted[:, None], axis=1)
        num_copies = jnp.clip(num_neighbors - num_nearer, 0, num_crafted)
        nearest = jnp.take_along_axis(sums, (num_neighbors - num_copies)[:, None], axis=1)[:, 0]
        honest = jnp.where(crowd, nearest + num_copies * to_crafted, jnp.inf)
        from_crafted = jnp.sort(jnp.where(crowd, to_crafted, jnp.inf))
        crafted = jnp.sum(jnp.where(jnp.arange(len(rows)) < num_seen, from_crafted, 0))
        return crafted < jnp.min(honest)

    # No larger one is selected: the score of the crafted update is at least num_seen times its
    # squared distance to the nearest honest one, (lambda |direction| - farthest)^2.
    within = jnp.where(crowd, sums[:, 1:], jnp.inf)
    last = jnp.clip(jnp.minimum(num_neighbors, num_honest - 1) - 1, 0)
    score = jnp.min(jnp.take(within, last, axis=1))
    score = jnp.where(jnp.isfinite(score), score, 0)
    farthest = jnp.sqrt(jnp.max(jnp.where(crowd, squares, 0)))
    largest = jnp.sqrt(score / jnp.maximum(num_seen, 1)) + farthest
    largest = largest / jnp.sqrt(jnp.maximum(length, 1))
    sizes = largest * 0.5 ** jnp.arange(num_halvings + 1)
    hits = jax.vmap(is_selected)(sizes)
    first = jnp.where(jnp.any(hits), jnp.argmax(hits), num_halvings)
    return -sizes[first] * direction


def _beyond(
    key: Key, view: knowledge.View, crowd: Array, is_full: Array, factor: Array
) -> jax.Array:
    """Updates f32[n, d] on the far side of the honest ones, each drawn on its own."""
    rows, dtype = view.rows, view.rows.dtype
    mean, std = knowledge.mean(rows, crowd), knowledge.std(rows, crowd)
    share = jax.random.uniform(key, rows.shape, dtype)
    low = jnp.min(jnp.where(crowd[:, None], rows, jnp.inf), axis=0)
    high = jnp.max(jnp.where(crowd[:, None], rows, -jnp.inf), axis=0)
    lower = jnp.where(low > 0, low / factor, low * factor)
    higher = jnp.where(high > 0, high * factor, high / factor)
    is_rising = mean > 0
    nearest = jnp.where(is_rising, low, high)
    farthest = jnp.where(is_rising, lower, higher)
    full = nearest + share * (farthest - nearest)
    partial = mean + jnp.where(is_rising, -1, 1) * (3 + share) * std
    return jnp.where(is_full, full, partial)


def fang(
    key: Key,
    updates: Array,
    is_byzantine: Array,
    *,
    rule: str,
    knows: Array | None = None,
    neighbors: ArrayLike | None = None,
    num_halvings: int = 40,
    factor: ArrayLike = 2.0,
) -> jax.Array:
    """Fang's local model poisoning, against the direction in which the honest mean would go.

    With `s = sign(mean)` of the honest updates, coordinate by coordinate:

    - krum, multi_krum, bulyan: every malicious client sends `-lambda s`, with the largest lambda
      of a halving grid that Krum selects. The paper's bound on lambda, which starts the grid, is
      for plain distances; here it is the one for squared distances, which Krum sums. If none is
      selected, lambda is the smallest of the grid (in the paper, one below 1e-5).
    - trimmed_mean, median: each malicious client draws, where s > 0, from `[low / factor, low]`
      if the least honest value low is positive, else from `[factor low, low]`; where s < 0 from
      `[high, factor high]` or `[high, high / factor]`. In partial knowledge the range is
      `mean - 4 std ... mean - 3 std` or `mean + 3 std ... mean + 4 std`.

    Knowledge: the form is the paper's full-knowledge one where all honest clients are known: its
    crowd of honest updates is theirs, and m crafted updates stand with them before Krum. Otherwise
    it is the partial one, in the paper with the malicious clients' own honest updates alone, which
    is the default: the crowd is all that is known, and `max(1, floor(m^2 / n))` crafted updates
    stand with it, the number in the code of "Manipulating the Byzantine" (NDSS 2021).

    Args:
      key: draws the values of the median and trimmed-mean form.
      updates: honest updates of all clients, f32[n, d].
      is_byzantine: which clients are malicious, bool[n].
      rule: the server's rule: "krum", "multi_krum", "bulyan", "trimmed_mean" or "median".
      knows: whose honest updates the attacker sees, bool[n]; by default those of the malicious
        clients. Rows that are not finite are ignored.
      neighbors: how many neighbours the server's Krum sums, by default `n - m - 2`. In partial
        knowledge Krum is given as many more or fewer than fit the smaller crowd.
      num_halvings: lambda is halved so often at most.
      factor: how far the range of full knowledge goes beyond the honest values.

    Returns:
      The updates with the Byzantine rows replaced.

    Static: rule, num_halvings.

    Raises:
      ValueError: updates that are not floats [n, d], masks that are not bool[n], nobody known, a
        rule without a tailored attack, a factor below 1, fewer than one neighbour or halving.

    Source: M. Fang, X. Cao, J. Jia, N. Gong, "Local Model Poisoning Attacks to Byzantine-Robust
    Federated Learning", USENIX Security 2020.
    """
    tailored = (*_SELECTING, *_COORDINATE)
    if rule not in tailored:
        raise ValueError(
            f"fang: no attack is tailored to the rule {rule!r}; there is one for each of "
            f"{', '.join(tailored)}."
        )
    view = knowledge.look("fang", updates, is_byzantine, knows)
    checks.at_least("fang", "num_halvings", num_halvings, 1)
    if checks.is_concrete(factor) and not np.all(np.asarray(factor) >= 1):
        raise ValueError(f"fang: need factor >= 1, got factor={factor}.")
    if neighbors is not None and checks.is_concrete(neighbors):
        checks.at_least("fang", "neighbors", int(np.asarray(neighbors)), 1)
    n, num_byzantine = len(view.rows), jnp.sum(view.is_byzantine)
    is_honest = ~view.is_byzantine
    # An honest client that is asked about counts as known, even if its update is not finite.
    asked = view.is_byzantine if knows is None else jnp.asarray(knows)
    is_full = jnp.any(view.is_known & is_honest) & jnp.all(asked | view.is_byzantine)
    crowd = view.is_known & (is_honest | ~is_full)
    if rule in _COORDINATE:
        crafted = _beyond(key, view, crowd, is_full, jnp.asarray(factor, view.rows.dtype))
        return knowledge.replace(view, crafted)
    stands_in = jnp.maximum(num_byzantine**2 // n, 1)
    usual = n - num_byzantine - 2
    crafted = _selected_far(
        jnp.where(crowd[:, None], view.rows, 0),
        crowd,
        jnp.sign(knowledge.mean(view.rows, crowd)),
        jnp.where(is_full, num_byzantine, stands_in),
        jnp.sum(crowd) - 2 + (0 if neighbors is None else neighbors - usual),
        num_halvings,
    )
    return knowledge.replace(view, crafted)
