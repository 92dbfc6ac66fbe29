"""What a model-poisoning attack is, with and without state, and what it may look at."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advjax.core import checks
from advjax.core.typing import Array, Key


class Context(NamedTuple):
    """What an attacker sees in a round beyond the updates.

    Attributes:
      params: the global model that the server sent, f32[d].
      round: number of the round, from 0.
      server_rate: the server steps `params + server_rate * aggregate`.
      clients: which client each row of the updates is, int32[n].
      counts: how many examples each of these clients has, int32[n].
      examples: `(row int32[b], position int32[b]) -> (images f32[b, h, w, c], labels int32[b])`,
        the client of that row's examples, which have the positions 0 ... counts[row] - 1.
      logits_fn: `(params f32[d], x) -> logits`, the network by its parameter vector.
      initialise: `key -> f32[d]`, a freshly initialised network.
    """

    params: Array
    round: Array
    server_rate: Array
    clients: Array
    counts: Array
    examples: Callable[[Array, Array], tuple[Array, Array]]
    logits_fn: Callable[[Array, Array], Array]
    initialise: Callable[[Key], Array]


def _accept(is_byzantine: np.ndarray, counts: np.ndarray) -> None:
    """The `check` of an attack that works on any clients."""
    del is_byzantine, counts


class Poisoning(NamedTuple):
    """An attack that has state or needs the model and the data, in optax's shape.

    Attributes:
      init: `state = init(key, params)`, from the first global model f32[d].
      craft: `updates, state = craft(key, updates, is_byzantine, context, state)`; the rows of the
        Byzantine clients (bool[n]) of the updates f32[n, d] are replaced.
      check: `check(is_byzantine, counts)` raises a ValueError if the attack cannot work on the
        clients of a simulation: which are malicious, bool[n], and how many examples each has,
        int32[n]. It is called on the host, before any training.
    """

    init: Callable[[Key, Array], Any]
    craft: Callable[[Key, Array, Array, Context, Any], tuple[jax.Array, Any]]
    check: Callable[[np.ndarray, np.ndarray], None] = _accept


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
        name: Poisoning(functools.partial(init, index), craft, member.check)
        for index, (name, member) in enumerate(attacks.items())
    }
