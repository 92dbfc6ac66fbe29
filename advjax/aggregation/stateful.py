"""Rules that remember or see more than the updates: centered clipping, AFA, FLTrust."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.aggregation import aggregators, geometry, requirements
from advjax.aggregation.aggregators import Aggregator
from advjax.core import checks, vectors
from advjax.core.typing import Array

# Cosines nearer than this differ by the rounding of float32.
_COSINE_ROUNDING = 1e-6


def centered_clipping(radius: ArrayLike, num_iters: int = 1) -> Aggregator:
    """Centered clipping: a step from the last aggregate along the mean of the clipped differences.

    `v <- v + mean_i (x_i - v) min(1, radius / ||x_i - v||)`, from the last round's v (at first 0).
    The state is v, f32[d]; the weight of a client is the part of its row in the new v, of which the
    old v has the rest. Rows that are not finite are left out.

    Args:
      radius: the paper takes `10 / (1 - momentum)`, with clients that send momentum.
      num_iters: number of steps a round.

    Static: num_iters.

    Raises:
      ValueError: a negative radius, no step; in `update`, updates of the wrong rank.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = centered_clipping(2.0)
      >>> state = rule.init(jnp.zeros(1))
      >>> aggregate, state = rule.update(jnp.array([[1.0], [1e6]]), state)
      >>> aggregate
      Array([1.5], dtype=float32)

    Source: S. P. Karimireddy, L. He, M. Jaggi, "Learning from History for Byzantine Robust
    Optimization", ICML 2021.
    """
    checks.non_negative("centered_clipping", "radius", radius)
    checks.at_least("centered_clipping", "num_iters", num_iters, 1)

    def init(params):
        return jnp.zeros(jnp.shape(params), jnp.float32)

    def report(updates, state, params=None, clients=None):
        del params, clients
        updates = requirements.updates("centered_clipping", updates)
        rows = updates.astype(jnp.float32)
        squares = vectors.squared_norms(rows)

        def step(_, carry):
            center, weights = carry
            distances = geometry.distances_to(center, rows, squares)
            is_finite = jnp.isfinite(distances)
            scale = jnp.where(distances > radius, radius / distances, 1)
            pull = jnp.where(is_finite, scale, 0) / jnp.maximum(jnp.sum(is_finite), 1)
            rest = 1 - jnp.sum(pull)
            return rest * center + vectors.combine(pull, rows), rest * weights + pull

        center, weights = jax.lax.fori_loop(
            0, num_iters, step, (state, jnp.zeros(len(rows), jnp.float32))
        )
        return center.astype(updates.dtype), weights, center

    return aggregators.reporting(init, report)


class Reputation(NamedTuple):
    """What `afa` remembers of all clients, those that a round left out included.

    Attributes:
      good: prior plus the number of rounds in which the client's update was kept, f32[clients].
      bad: prior plus the number of rounds in which it was dropped, f32[clients].
      is_blocked: whether the client is blocked for good, bool[clients].
    """

    good: Array
    bad: Array
    is_blocked: Array


def afa(
    num_clients: int,
    *,
    num_examples: Array | None = None,
    threshold: ArrayLike = 2.0,
    threshold_step: ArrayLike = 0.5,
    prior: ArrayLike = 3.0,
    block_above: ArrayLike = 0.95,
    space: str = "update",
) -> Aggregator:
    """Adaptive federated averaging: updates far from the aggregate in angle are dropped, and who is
    dropped too often is blocked.

    A client's reputation is `p = good / (good + bad)`. In a round, repeatedly: the aggregate a of
    the rows kept, weighted by `p_i num_examples_i`; `s_i = cos(a, x_i)`; where the mean of s is
    below its median, the rows with `s_i < median - threshold * deviation` are dropped, else those
    with `s_i > median + threshold * deviation`; the threshold grows by `threshold_step`; until no
    row is dropped. Then `good` or `bad` grows by one, and a client with
    `P(Beta(good, bad) < 1/2) > block_above` is blocked: with the defaults at its sixth bad round if
    it had no good one. A row that is not finite is bad; the row of a blocked client does not count.

    The deviation is that of the rows kept, over their number, and the median of an even number is
    the midpoint, as we read the paper; some forks grow the threshold by 0.25. Cosines that agree to
    1e-6 count as equal, so that rounding blocks nobody.

    Args:
      num_clients: how many clients there are, of which a round may see any; `update` takes their
        numbers as `clients`.
      num_examples: how much data each client has, f32[num_clients]; by default all have as much.
      threshold: first threshold, in standard deviations.
      threshold_step: growth of the threshold.
      prior: `good` and `bad` at the start.
      block_above: how sure the server is that a client is bad when it blocks it.
      space: take cosines of "update" vectors, which tell clients apart better, or of "model"
        vectors (params + update), as the paper does; the latter need `params`.

    Static: num_clients, space.

    Raises:
      ValueError: no client, an unknown space, a prior of 0, sizes of another number of clients; in
        `update`, updates of the wrong rank, more rows than clients, clients that are none of them
        (where they can be looked at), no params for models.

    Source: L. Munoz-Gonzalez, K. Co, E. Lupu, "Byzantine-Robust Federated Machine Learning through
    Adaptive Model Averaging", 2019.
    """
    checks.at_least("afa", "num_clients", num_clients, 1)
    checks.known("afa", "space", space, ("update", "model"))
    checks.non_negative("afa", "threshold", threshold)
    checks.non_negative("afa", "threshold_step", threshold_step)
    if checks.is_concrete(prior) and not np.asarray(prior, np.float32) > 0:
        raise ValueError(f"afa: need prior > 0, got prior={prior}.")
    sizes = np.ones(num_clients, np.float32) if num_examples is None else num_examples
    if jnp.shape(sizes) != (num_clients,):
        raise ValueError(
            f"afa: need num_examples of shape ({num_clients},), got {jnp.shape(sizes)}."
        )
    checks.non_negative("afa", "num_examples", sizes)

    def init(params):
        del params
        counts = jnp.full(num_clients, prior, jnp.float32)
        return Reputation(counts, counts, jnp.zeros(num_clients, bool))

    def report(updates, state, params=None, clients=None):
        updates = requirements.updates("afa", updates)
        clients = _clients(len(updates), num_clients, clients)
        rows = updates.astype(jnp.float32)
        if space == "model":
            rows = rows + _required("afa", params)
        lengths = geometry.norms(rows)
        cosines = geometry.cosines(rows, lengths)
        is_finite = jnp.isfinite(lengths)
        lengths = jnp.where(is_finite, lengths, 0)
        takes_part = ~state.is_blocked[clients]
        reputation = (state.good / (state.good + state.bad))[clients]
        confidence = reputation * jnp.asarray(sizes, jnp.float32)[clients]

        def weigh(is_good):
            return geometry.normalised(jnp.where(is_good, confidence, 0))

        def similarities(is_good):
            parts = weigh(is_good) * lengths
            along = cosines @ parts  # <a, x_i> / ||x_i||
            length = jnp.sqrt(jnp.maximum(parts @ along, 0))
            return along / jnp.where(length > 0, length, 1)

        def drop(carry):
            is_good, _, bound = carry
            kept = jnp.where(is_good, similarities(is_good), jnp.nan)
            median = jnp.nanmedian(kept)
            slack = jnp.maximum(bound * jnp.nanstd(kept), _COSINE_ROUNDING)
            is_far = jnp.where(
                jnp.nanmean(kept) < median, kept < median - slack, kept > median + slack
            )
            return is_good & ~is_far, jnp.any(is_far), bound + threshold_step

        is_good, _, _ = jax.lax.while_loop(
            lambda carry: carry[1],
            drop,
            (takes_part & is_finite, jnp.asarray(True), jnp.asarray(threshold, jnp.float32)),
        )
        good = state.good.at[clients].add(takes_part & is_good)
        bad = state.bad.at[clients].add(takes_part & ~is_good)
        is_sure = jax.scipy.special.betainc(good, bad, 0.5) > block_above
        weights = weigh(is_good)
        aggregate = vectors.combine(weights, updates)
        return aggregate, weights, Reputation(good, bad, state.is_blocked | is_sure)

    return aggregators.reporting(init, report)


def _clients(n: int, num_clients: int, clients: Array | None) -> Array:
    if n > num_clients:
        raise ValueError(f"afa: need at most num_clients={num_clients} updates, got n={n}.")
    if clients is None:
        return jnp.arange(n)
    if jnp.shape(clients) != (n,):
        raise ValueError(f"afa: need clients of shape ({n},), got {jnp.shape(clients)}.")
    if checks.is_concrete(clients):
        numbers = np.asarray(clients)
        if numbers.min() < 0 or numbers.max() >= num_clients:
            raise ValueError(
                f"afa: need clients in 0 ... {num_clients - 1}, got {numbers.min()} ... "
                f"{numbers.max()}."
            )
    return jnp.asarray(clients)


def _required(caller: str, params: Array | None) -> Array:
    if params is None:
        raise ValueError(f"{caller}: need params, the global model, got None.")
    return params


def fltrust(server_update: Callable[[Array], Array]) -> Aggregator:
    """FLTrust: the server trains on clean data of its own and trusts who points the same way.

    `t_i = max(0, cos(x_i, x_0))`; the aggregate is `sum_i t_i x_i ||x_0|| / ||x_i|| / sum_i t_i`,
    and 0 where nobody is trusted. There is no state. Rows that are not finite are not trusted.

    Args:
      server_update: the global model f32[d] to the server's own update `x_0` f32[d].

    Raises:
      ValueError: in `update`, updates of the wrong rank, no params.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = fltrust(lambda params: jnp.array([1.0, 0.0]))
      >>> updates = jnp.array([[5.0, 0.0], [-9.0, 0.0]])
      >>> rule.update(updates, rule.init(jnp.zeros(2)), jnp.zeros(2))[0]
      Array([1., 0.], dtype=float32)

    Source: X. Cao, M. Fang, J. Liu, N. Gong, "FLTrust: Byzantine-robust Federated Learning via
    Trust Bootstrapping", NDSS 2021.
    """

    def report(updates, state, params=None, clients=None):
        del clients
        updates = requirements.updates("fltrust", updates)
        rows = updates.astype(jnp.float32)
        reference = jnp.asarray(server_update(_required("fltrust", params)), jnp.float32)
        length = jnp.linalg.norm(reference)
        lengths = geometry.norms(rows)
        products = lengths * length
        is_judged = (products > 0) & jnp.isfinite(products)
        cosines = (rows @ reference) / jnp.where(is_judged, products, 1)
        trust = jnp.where(is_judged, jnp.maximum(cosines, 0), 0)
        weights = geometry.normalised(trust) * jnp.where(is_judged, length / lengths, 0)
        return vectors.combine(weights, updates), weights, state

    return aggregators.reporting(lambda params: (), report)
