"""Triggers that a network generates for each image (LIRA)."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.backdoor import inputs, networks
from advjax.core.typing import Array, LogitsFn


def lira(x: Array, *, generator: LogitsFn, epsilon: ArrayLike = 0.01) -> Array:
    """The change that a generator G makes of each image: `clip(x + epsilon tanh(G(x)), 0, 1)`.

    `procedures.train_lira` trains the generator together with the classifier.

    Args:
      x: images, f32[..., h, w, c] in [0, 1].
      generator: images f32[b, h, w, c] to f32[b, h, w, c], such as a bound `networks.UNet`.
      epsilon: largest change of a pixel.

    Returns:
      Images like `x`.

    Source: K. Doan, Y. Lao, W. Zhao, P. Li, "LIRA: Learnable, Imperceptible and Robust Backdoor
    Attacks", ICCV 2021.
    """
    inputs.images("lira", x)
    change = generator(x.reshape(-1, *x.shape[-3:]))
    return networks.bounded(x, jnp.reshape(change, x.shape), epsilon)
