"""The mark of the Blind attack: a fixed pattern of black and white pixels."""

import jax.numpy as jnp
import numpy as np

from advjax.backdoor import inputs
from advjax.core.typing import Array

# 1 white, 0 black, -1 transparent.
_PATTERN = np.array([[1, 0, 1], [-1, 1, -1], [-1, -1, 0], [-1, 1, -1], [1, 0, 1]])


def blind(x: Array, *, corner: tuple[int, int] | None = None) -> Array:
    """The 5 x 3 pattern of the Blind attack, which has white, black and transparent pixels.

    Args:
      x: images, f32[..., h, w, c] in [0, 1].
      corner: row and column of its upper left pixel; by default row 3 and 9 columns from the right
        edge, which is the published place (3, 23) on images of 32 x 32. Images too small for that
        have it where they can.

    Returns:
      Images like `x`.

    Static: corner.

    Raises:
      ValueError: a pattern that does not fit into the image.

    Example:
      >>> import jax.numpy as jnp
      >>> blind(jnp.full((5, 3, 1), 0.5))[:, :, 0]
      Array([[1. , 0. , 1. ],
             [0.5, 1. , 0.5],
             [0.5, 0.5, 0. ],
             [0.5, 1. , 0.5],
             [1. , 0. , 1. ]], dtype=float32)

    Source: E. Bagdasaryan, V. Shmatikov, "Blind Backdoors in Deep Learning Models", USENIX Security
    2021.
    """
    inputs.images("blind", x)
    height, width = x.shape[-3:-1]
    rows, columns = _PATTERN.shape
    if corner is None:
        corner = (max(0, min(3, height - rows)), max(0, width - 9))
    top, left = corner
    if not (0 <= top <= height - rows and 0 <= left <= width - columns):
        raise ValueError(
            f"blind: need room for {rows} x {columns} pixels, got corner={tuple(corner)} in images "
            f"of {height} x {width}."
        )
    pattern = np.full((height, width, 1), -1)
    pattern[top : top + rows, left : left + columns, 0] = _PATTERN
    return jnp.where(pattern < 0, x, pattern.astype(x.dtype))
