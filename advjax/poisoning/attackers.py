"""What a model-poisoning attack is, with and without state, and what it may look at."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from advjax.core import checks
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


def stateless(attack: Callable[..., jax.Array], knows: str | Array | None = None) -> Poisoning:
    """An attack without state as a `Poisoning` whose state is ().

    Args:
      attack: `attack(key, updates, is_byzantine, knows=...) -> updates`; configure the rest with
        `functools.partial`.
      knows: whose honest updates the attacker sees: "byzantine" those of the malicious clients,
        which is what attacks do by default (None), "all", "honest" those of the others, or a mask
        over the rows, bool[n].

    Raises:
      ValueError: another word for `knows`.
    """
    words = {
        "all": jnp.ones_like,
        "byzantine": jnp.asarray,
        "honest": jnp.logical_not,
    }
    if isinstance(knows, str):
        checks.known("stateless", "knowledge", knows, words)

    def init(key, params):
        del key, params
        return ()

    def craft(key, updates, is_byzantine, context, state):
        del context
        mask = words[knows](is_byzantine) if isinstance(knows, str) else knows
        return attack(key, updates, is_byzantine, knows=mask), state

    return Poisoning(init, craft)


def choose(attacks: Mapping[str, Poisoning]) -> dict[str, Poisoning]:
    """The attacks with one `craft` between them, so that a sweep over them is one program.

    Which attack it is stands in the state, `(index, state of every attack)`; the others' states
    stay as they were. Stacked states may be mapped over (`jax.vmap`), at the price of all attacks.

    Args:
      attacks: attacks by name.

    Returns:
      The attacks by name, with equal results.

    Raises:
      ValueError: no attack.
    """
    if not attacks:
        raise ValueError("choose: need at least one attack, got none.")
    members = tuple(attacks.values())

    def init(index, key, params):
        return jnp.asarray(index, jnp.int32), tuple(each.init(key, params) for each in members)

    def craft(key, updates, is_byzantine, context, state):
        index, states = state

        # The context holds functions, so the branches close over it.
        def branch(i, states):
            crafted, new = members[i].craft(key, updates, is_byzantine, context, states[i])
            return crafted, (*states[:i], new, *states[i + 1 :])

        branches = [functools.partial(branch, i) for i in range(len(members))]
        crafted, states = jax.lax.switch(index, branches, states)
        return crafted, (index, states)

    return {
        name: Poisoning(functools.partial(init, index), craft) for index, name in enumerate(attacks)
    }
