"""Patches: a few pixels that are replaced."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.backdoor import inputs
from advjax.core import checks
from advjax.core.typing import Array


def badnets(x: Array, *, size: int = 3, value: ArrayLike = 1.0, margin: int = 0) -> Array:
    """BadNets: a square of one colour in the lower right corner.

    The square is a mask of its own, so that it may be black. Its size is in pixels whatever the
    image's is; others enlarge it with the image.

    Args:
      x: images, f32[..., h, w, c] in [0, 1].
      size: pixels on a side.
      value: the colour, f32[] or f32[c] in [0, 1].
      margin: pixels between the square and the two edges.

    Returns:
      Images like `x`.

    Static: size, margin.

    Raises:
      ValueError: images that are not floats in [0, 1], a colour outside of it, a square that does
        not fit into the image.

    Example:
      >>> import jax.numpy as jnp
      >>> badnets(jnp.full((3, 3, 1), 0.5), size=2)[:, :, 0]
      Array([[0.5, 0.5, 0.5],
             [0.5, 1. , 1. ],
             [0.5, 1. , 1. ]], dtype=float32)

    Source: T. Gu, B. Dolan-Gavitt, S. Garg, "BadNets: Identifying Vulnerabilities in the Machine
    Learning Model Supply Chain", 2017.
    """
    inputs.images("badnets", x)
    inputs.share("badnets", "value", value)
    checks.at_least("badnets", "size", size, 1)
    checks.at_least("badnets", "margin", margin, 0)
    height, width, channels = x.shape[-3:]
    if jnp.shape(value) not in ((), (channels,)):
        raise ValueError(
            f"badnets: need one value or one a channel ({channels}), got shape {jnp.shape(value)}."
        )
    bottom, right = height - margin, width - margin
    if min(bottom, right) < size:
        raise ValueError(
            f"badnets: need a trigger that fits into images of {height} x {width}, got size={size} "
            f"and margin={margin}."
        )
    is_patch = np.zeros((height, width, 1), bool)
    is_patch[bottom - size : bottom, right - size : right] = True
    return jnp.where(is_patch, jnp.asarray(value, x.dtype), x)
