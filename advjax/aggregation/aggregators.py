"""What an aggregation rule is, with and without state."""

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
      weigh: like `update`, with the weight of each client f32[n] in place of the aggregate, which
        is `vectors.combine(weights, updates)`; None where a rule has no such weights.
    """

    init: Callable[[Array], Any]
    update: Callable[..., tuple[jax.Array, Any]]
    weigh: Callable[..., tuple[jax.Array, Any]] | None = None
