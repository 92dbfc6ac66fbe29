"""What an aggregation rule with state is; how a function becomes one, and one becomes many."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from advjax.core.typing import Array


class Aggregator(NamedTuple):
    """A rule of the server, as a pair of pure functions in optax's shape.

    Attributes:
      init: `state = init(params)`, from the global model f32[d].
      update: `aggregate, state = update(updates, state, params=None, clients=None)`; updates
        f32[n, d] of the clients int32[n] (0 ... n - 1 if None), aggregate f32[d].
      report: like `update`, `aggregate, weights, state = report(...)`, with the weight that each
        client's row has in the aggregate, f32[n]; NaN where a rule has no such weights. None where
        a rule does not tell.
    """

    init: Callable[[Array], Any]
    update: Callable[..., tuple[jax.Array, Any]]
    report: Callable[..., tuple[jax.Array, jax.Array, Any]] | None = None


def reporting(
    init: Callable[[Array], Any], report: Callable[..., tuple[jax.Array, jax.Array, Any]]
) -> Aggregator:
    """The rule whose `update` is its `report` without the weights.

    Args:
      init: `state = init(params)`.
      report: `aggregate, weights, state = report(updates, state, params=None, clients=None)`.
    """

    def update(updates, state, params=None, clients=None):
        aggregate, _, state = report(updates, state, params, clients)
        return aggregate, state

    return Aggregator(init, update, report)
