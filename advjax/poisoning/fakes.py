"""Attacks that need nothing but the global model, as fake clients do: MPAF."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.poisoning import knowledge
from advjax.poisoning.attackers import Poisoning


def mpaf(*, scale: ArrayLike = 1e6) -> Poisoning:
    """MPAF: `scale (w' - w)`, towards one random model w' in every round.

    w' is freshly initialised at the start and stays for the run; w is the global model.

    Knowledge: the global model, here and in the paper, whose malicious clients are fake ones
    without data. No update is looked at.

    Args:
      scale: factor; the paper takes 1e6.

    Returns:
      A `Poisoning`; its state is the key of w'.

    Raises:
      ValueError: in `craft`, updates that are not floats [n, d], masks that are not bool[n].

    Source: X. Cao, N. Gong, "MPAF: Model Poisoning Attacks to Federated Learning Based on Fake
    Clients", CVPR 2022 workshop.
    """

    def init(key, params):
        del params
        return key

    def craft(key, updates, is_byzantine, context, state):
        del key
        view = knowledge.look("mpaf", updates, is_byzantine, None, needs=False)
        target = context.initialise(state)
        return knowledge.replace(view, jnp.asarray(scale) * (target - context.params)), state

    return Poisoning(init, craft)
