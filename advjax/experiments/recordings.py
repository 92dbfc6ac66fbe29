"""Recordings: what an attacker saw and sent in the rounds of a simulation."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from advjax.core.typing import Array
from advjax.poisoning import Context, Poisoning


def record(
    attack: Poisoning, keep: Callable[[Context, Array, Array], Any]
) -> tuple[Poisoning, dict[int, Any]]:
    """The attack, and a dictionary in which each round of a simulation under it leaves something.

    The attack does as before. The rounds arrive while the simulation runs: call
    `jax.effects_barrier()` after it and before reading. A simulation of several seeds leaves one
    of them, and a later one replaces what an earlier one left.

    Args:
      attack: the attack.
      keep: `keep(context, honest, sent)`, an array or a tree of arrays, of the updates f32[n, d]
        that the clients made and of those that the server got.

    Returns:
      The attack that records, and what was kept by the number of the round, as NumPy arrays.

    Example:
      >>> import jax
      >>> from advjax import aggregation, data, federated, models, poisoning
      >>> from advjax.experiments import recordings
      >>> train, test = data.load("digits", "train"), data.load("digits", "test")
      >>> partition = federated.partition_iid(jax.random.key(0), train.labels, 4)
      >>> task = federated.make_task(models.make("mlp", 10), train, test, partition)
      >>> attack, rounds = recordings.record(
      ...     poisoning.stateless(poisoning.sign_flip), lambda context, honest, sent: sent)
      >>> _ = federated.simulate(
      ...     jax.random.key(0), task, rule=aggregation.mean, poisoning=attack, num_rounds=3,
      ...     num_byzantine=1, progress=False)
      >>> jax.effects_barrier()
      >>> sorted(rounds), rounds[0].shape[0]
      ([0, 1, 2], 4)
    """
    kept: dict[int, Any] = {}

    def put(number, values):
        kept[int(number)] = jax.tree.map(np.array, values)

    def craft(key, updates, is_byzantine, context, state):
        sent, state = attack.craft(key, updates, is_byzantine, context, state)
        jax.debug.callback(put, context.round, keep(context, updates, sent))
        return sent, state

    return attack._replace(craft=craft), kept
