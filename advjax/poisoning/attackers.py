"""What a model-poisoning attack is, with and without state, and what it may look at."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from advjax.core.typing import Array, Key


class Context(NamedTuple):
    """What an attacker sees in a round beyond the updates.

    Attributes:
      params: the global model that the server sent, f32[d].
      round: number of the round, from 0.
      server_rate: the server steps `params + server_rate * aggregate`.
      clients: which client each row of the updates is, int32[n].
      images: the data of these clients, f32[n, s, h, w, c] in [0, 1], padded.
      labels: their labels, int32[n, s].
      is_real: which examples are not padding, bool[n, s].
      logits_fn: `(params f32[d], x) -> logits`, the network by its parameter vector.
      initialise: `key -> f32[d]`, a freshly initialised network.
    """

    params: Array
    round: Array
    server_rate: Array
    clients: Array
    images: Array
    labels: Array
    is_real: Array
    logits_fn: Callable[[Array, Array], Array]
    initialise: Callable[[Key], Array]


class Poisoning(NamedTuple):
    """An attack that has state or needs the model and the data, in optax's shape.

    Attributes:
      init: `state = init(key, params)`, from the first global model f32[d].
      craft: `updates, state = craft(key, updates, is_byzantine, context, state)`; the rows of the
        Byzantine clients (bool[n]) of the updates f32[n, d] are replaced.
    """

    init: Callable[[Key, Array], Any]
    craft: Callable[[Key, Array, Array, Context, Any], tuple[jax.Array, Any]]
