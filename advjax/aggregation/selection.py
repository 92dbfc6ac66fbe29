"""Rules that choose clients by the distances between their updates: the Krum family, MDA, MoNNA."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from advjax.aggregation import coordinates, requirements, weighing
from advjax.aggregation.requirements import Count
from advjax.core import checks, vectors
from advjax.core.typing import Array

_LARGEST_NUM_SUBSETS = 100_000


def _krum_inputs(
    caller: str,
    updates: Array,
    num_byzantine: Count,
    neighbors: Count | None,
) -> tuple[jax.Array, Count]:
    """Checks what the Krum family is given; returns the updates and the number of neighbours."""
    updates = requirements.updates(caller, updates)
    n = len(updates)
    requirements.num_byzantine(
        caller, num_byzantine, n, most=(n - 3) // 2, bound="n > 2 * num_byzantine + 2"
    )
    if neighbors is None:
        return updates, n - num_byzantine - 2
    is_concrete = checks.is_concrete(neighbors, num_byzantine)
    if is_concrete and not 1 <= neighbors <= n - num_byzantine - 1:
        raise ValueError(
            f"{caller}: need 1 <= neighbors < n - num_byzantine, got neighbors={neighbors}, "
            f"num_byzantine={num_byzantine} and n={n}."
        )
    return updates, neighbors


def krum_weights(
    updates: Array,
    *,
    num_byzantine: Count,
    neighbors: Count | None = None,
) -> jax.Array:
    """The weights of `krum`, f32[n]: 1 for the client chosen."""
    updates, neighbors = _krum_inputs("krum", updates, num_byzantine, neighbors)
    scores = vectors.nearest_sums(vectors.squared_distances(updates), neighbors)
    return jax.nn.one_hot(jnp.argmin(scores), len(updates), dtype=jnp.float32)


@weighing.weighted_by(krum_weights)
def krum(
    updates: Array,
    *,
    num_byzantine: Count,
    neighbors: Count | None = None,
) -> jax.Array:
    """Krum: the update whose nearest others are nearest.

    The score of client i is `sum_j ||x_i - x_j||^2` over its `neighbors` nearest others j; the
    update with the smallest score is returned as it is, the first one of equals.

    Args:
      updates: one row a client, f32[n, d].
      num_byzantine: how many clients are assumed to be Byzantine; may be traced.
      neighbors: how many others a score counts, by default the paper's n - num_byzantine - 2; may
        be traced. ByzFL and FLPoison count one more; code that counts the client itself as one of
        its neighbours, as that of NDSS 2021, has one less.

    Returns:
      One of the updates, [d].

    Raises:
      ValueError: updates that are not floats [n, d], n <= 2 * num_byzantine + 2, neighbors not in
        1 ... n - num_byzantine - 1.

    Example:
      >>> import jax.numpy as jnp
      >>> krum(jnp.array([[0.0], [9.0], [1.0], [2.0], [1.5]]), num_byzantine=1)
      Array([1.5], dtype=float32)

    Source: P. Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent", NIPS 2017.
    """
    weights = krum_weights(updates, num_byzantine=num_byzantine, neighbors=neighbors)
    return jnp.asarray(updates)[jnp.argmax(weights)]


def _one_by_one(distances: jax.Array, num_selected: Count, neighbors: Count) -> jax.Array:
    """Krum's choice, removed from the clients, time after time: which were chosen, bool[n].

    Every time a score counts one neighbour less, since one client less is left.
    """
    n = len(distances)
    distances = jnp.where(jnp.eye(n, dtype=bool), jnp.inf, distances)
    order = jnp.argsort(distances, axis=1)
    ordered = jnp.take_along_axis(distances, order, axis=1)

    def select(number, is_left):
        is_near = is_left[order]  # the others that are left, nearest first
        counted = is_near & (jnp.cumsum(is_near, axis=1) <= jnp.maximum(neighbors - number, 1))
        scores = jnp.sum(jnp.where(counted, ordered, 0), axis=1)
        # Infinite scores, such as that of the last client, come before those that are taken.
        scores = jnp.minimum(scores, jnp.finfo(scores.dtype).max)
        return is_left.at[jnp.argmin(jnp.where(is_left, scores, jnp.inf))].set(False)

    return ~jax.lax.fori_loop(0, num_selected, select, jnp.ones(n, bool))


def multi_krum_weights(
    updates: Array,
    *,
    num_byzantine: Count,
    neighbors: Count | None = None,
    num_selected: Count | None = None,
    iterative: bool = False,
) -> jax.Array:
    """The weights of `multi_krum`, f32[n]: equal for the clients chosen."""
    updates, neighbors = _krum_inputs("multi_krum", updates, num_byzantine, neighbors)
    n = len(updates)
    most = n - 2 * num_byzantine - 2 if iterative else n - num_byzantine
    if num_selected is None:
        num_selected = most
    elif checks.is_concrete(num_selected, num_byzantine) and not 1 <= num_selected <= most:
        raise ValueError(
            f"multi_krum: need 1 <= num_selected <= {most}, got num_selected={num_selected} for "
            f"n={n}, num_byzantine={num_byzantine} and iterative={iterative}."
        )
    distances = vectors.squared_distances(updates)
    if iterative:
        return weighing.equal(_one_by_one(distances, num_selected, neighbors))
    return weighing.equal(
        weighing.nearest(vectors.nearest_sums(distances, neighbors), num_selected)
    )


@weighing.weighted_by(multi_krum_weights)
def multi_krum(
    updates: Array,
    *,
    num_byzantine: Count,
    neighbors: Count | None = None,
    num_selected: Count | None = None,
    iterative: bool = False,
) -> jax.Array:
    """Multi-Krum: the mean of the updates with the best scores of Krum.

    In the iterative form, that of Shejwalkar and Houmansadr's code, the best update is chosen and
    removed and the others are scored anew, with one neighbour less, while more than
    2 * num_byzantine + 2 clients are left.

    Args:
      updates: one row a client, f32[n, d].
      num_byzantine: how many clients are assumed to be Byzantine; may be traced.
      neighbors: see `krum`; in the iterative form those of the first choice.
      num_selected: how many updates are averaged, by default n - num_byzantine, and
        n - 2 * num_byzantine - 2 in the iterative form; may be traced.
      iterative: score anew after each choice.

    Returns:
      f32[d] in the dtype of the updates.

    Static: iterative.

    Raises:
      ValueError: updates that are not floats [n, d], n <= 2 * num_byzantine + 2, neighbors not in
        1 ... n - num_byzantine - 1, num_selected not between 1 and its default.

    Example:
      >>> import jax.numpy as jnp
      >>> multi_krum(jnp.array([[0.0], [9.0], [1.0], [2.0], [1.0]]), num_byzantine=1)
      Array([1.], dtype=float32)

    Source: P. Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent", NIPS 2017; V. Shejwalkar, A. Houmansadr, "Manipulating the Byzantine", NDSS 2021 (the
    iterative form).
    """
    weights = multi_krum_weights(
        updates,
        num_byzantine=num_byzantine,
        neighbors=neighbors,
        num_selected=num_selected,
        iterative=iterative,
    )
    return vectors.combine(weights, updates)


def _bulyan_selection(
    updates: Array, num_byzantine: int, neighbors: Count | None, even: coordinates.Even
) -> tuple[jax.Array, jax.Array, int]:
    """Whom Krum selected, bool[n], their updates, and how many values of a coordinate are kept."""
    updates = requirements.updates("bulyan", updates)
    n = len(updates)
    num_byzantine = requirements.static("bulyan", num_byzantine)
    requirements.num_byzantine(
        "bulyan", num_byzantine, n, most=(n - 3) // 4, bound="n >= 4 * num_byzantine + 3"
    )
    coordinates.check_even("bulyan", even)
    updates, neighbors = _krum_inputs("bulyan", updates, num_byzantine, neighbors)
    num_selected = n - 2 * num_byzantine
    is_selected = _one_by_one(vectors.squared_distances(updates), num_selected, neighbors)
    selected = updates[jnp.nonzero(is_selected, size=num_selected)[0]]
    return is_selected, selected, num_selected - 2 * num_byzantine


def bulyan_weights(
    updates: Array,
    *,
    num_byzantine: int,
    neighbors: Count | None = None,
    even: coordinates.Even = "midpoint",
) -> jax.Array:
    """How much each client had its way in `bulyan`, f32[n]: a report, not the rule's weights.

    The share of the kept values that are the client's, over all coordinates; clients whose values
    are equal share alike. The rule is no weighted sum of the updates.
    """
    is_selected, selected, count = _bulyan_selection(updates, num_byzantine, neighbors, even)

    def end(of_two, beyond):
        def kept_end(rows):
            is_kept, _ = coordinates.nearest_window(rows, count, even)
            pairs = zip(is_kept, rows, strict=True)
            return functools.reduce(of_two, [jnp.where(kept, row, beyond) for kept, row in pairs])

        return vectors.over_sorted(kept_end, selected)

    lowest, highest = end(jnp.minimum, jnp.inf), end(jnp.maximum, -jnp.inf)
    is_inside = is_selected[:, None] & (lowest <= updates) & (updates <= highest)
    is_inside = is_inside.astype(jnp.float32)
    num_inside = jnp.ones(len(is_inside)) @ is_inside
    return is_inside @ (1 / num_inside) / len(num_inside)


@weighing.weighted_by(bulyan_weights, is_sum=False)
def bulyan(
    updates: Array,
    *,
    num_byzantine: int,
    neighbors: Count | None = None,
    even: coordinates.Even = "midpoint",
) -> jax.Array:
    """Bulyan: Krum selects n - 2f clients, then their values nearest to the median are averaged.

    The clients are chosen one by one, as in the iterative `multi_krum`; of a coordinate the
    n - 4f values nearest to the median of those of the clients chosen are kept.

    Args:
      updates: one row a client, f32[n, d].
      num_byzantine: f, how many clients are assumed to be Byzantine.
      neighbors: see `krum`; those of the first choice. A score counts at least one.
      even: see `median`.

    Returns:
      f32[d] in the dtype of the updates.

    Static: num_byzantine, even.

    Raises:
      ValueError: updates that are not floats [n, d], n < 4 * num_byzantine + 3, neighbors not in
        1 ... n - num_byzantine - 1, an unknown `even`.

    Example:
      >>> import jax.numpy as jnp
      >>> updates = jnp.array([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [99.0]])
      >>> bulyan(updates, num_byzantine=1)
      Array([2.], dtype=float32)

    Source: E. M. El Mhamdi, R. Guerraoui, S. Rouault, "The Hidden Vulnerability of Distributed
    Learning in Byzantium", ICML 2018.
    """
    _, selected, count = _bulyan_selection(updates, num_byzantine, neighbors, even)
    return vectors.over_sorted(
        lambda rows: coordinates.nearest_window(rows, count, even)[1], selected
    )


def mda_weights(updates: Array, *, num_byzantine: int) -> jax.Array:
    """The weights of `mda`, f32[n]: equal for the clients of the subset."""
    updates = requirements.updates("mda", updates)
    n = len(updates)
    requirements.minority("mda", num_byzantine, n)
    size = n - requirements.static("mda", num_byzantine)
    if math.comb(n, size) > _LARGEST_NUM_SUBSETS:
        raise ValueError(
            f"mda: need at most {_LARGEST_NUM_SUBSETS} subsets of n - num_byzantine clients, got "
            f"{math.comb(n, size)} for num_byzantine={num_byzantine} and n={n}."
        )
    members = np.array(list(itertools.combinations(range(n), size)))
    is_member = np.zeros((len(members), n), bool)
    np.put_along_axis(is_member, members, True, axis=1)
    is_member = jnp.asarray(is_member)
    distances = vectors.squared_distances(updates)

    def widen(client, diameters):
        farthest = jnp.max(jnp.where(is_member, distances[client], 0), axis=1)
        return jnp.where(is_member[:, client], jnp.maximum(diameters, farthest), diameters)

    diameters = jax.lax.fori_loop(0, n, widen, jnp.zeros(len(members), distances.dtype))
    return weighing.equal(is_member[jnp.argmin(diameters)])


@weighing.weighted_by(mda_weights)
def mda(updates: Array, *, num_byzantine: int) -> jax.Array:
    """Minimum diameter averaging: the mean of the n - f updates that lie closest together.

    The diameter of a subset is the largest distance in it. All subsets are looked at, so n or f
    must be small.

    Args:
      updates: one row a client, f32[n, d].
      num_byzantine: f, how many clients are left out.

    Returns:
      f32[d] in the dtype of the updates. Of equal diameters the first subset in lexicographic
      order counts.

    Static: num_byzantine.

    Raises:
      ValueError: updates that are not floats [n, d], 2 * num_byzantine >= n, more than 100,000
        subsets.

    Example:
      >>> import jax.numpy as jnp
      >>> mda(jnp.array([[0.0], [1.0], [9.0]]), num_byzantine=1)
      Array([0.5], dtype=float32)

    Source: P. J. Rousseeuw, "Multivariate Estimation with High Breakdown Point", 1985;
    E. M. El Mhamdi et al., "Distributed Momentum for Byzantine-Resilient Stochastic Gradient
    Descent", ICLR 2021.
    """
    return vectors.combine(mda_weights(updates, num_byzantine=num_byzantine), updates)


def monna_weights(updates: Array, *, num_byzantine: Count, reference: Count = 0) -> jax.Array:
    """The weights of `monna`, f32[n]: equal for the clients near the reference."""
    updates = requirements.updates("monna", updates)
    n = len(updates)
    requirements.minority("monna", num_byzantine, n)
    if checks.is_concrete(reference) and not 0 <= reference < n:
        raise ValueError(f"monna: need 0 <= reference < n, got reference={reference} and n={n}.")
    differences = updates.astype(jnp.float32) - updates[reference].astype(jnp.float32)
    return weighing.equal(weighing.nearest(vectors.squared_norms(differences), n - num_byzantine))


@weighing.weighted_by(monna_weights)
def monna(updates: Array, *, num_byzantine: Count, reference: Count = 0) -> jax.Array:
    """MoNNA, nearest neighbour averaging: the mean of the n - f updates nearest to a trusted one.

    Args:
      updates: one row a client, f32[n, d].
      num_byzantine: f, how many updates are left out; may be traced.
      reference: the client that is trusted, whose own update counts too; may be traced.

    Returns:
      f32[d] in the dtype of the updates.

    Raises:
      ValueError: updates that are not floats [n, d], 2 * num_byzantine >= n, a reference that is
        no client.

    Example:
      >>> import jax.numpy as jnp
      >>> monna(jnp.array([[0.0], [1.0], [9.0]]), num_byzantine=1)
      Array([0.5], dtype=float32)

    Source: S. Farhadkhani et al., "Robust Collaborative Learning with Linear Gradient Overhead",
    ICML 2023.
    """
    weights = monna_weights(updates, num_byzantine=num_byzantine, reference=reference)
    return vectors.combine(weights, updates)
