"""The types that advjax speaks: arrays, keys, classifiers, losses, attacks.

Shape letters used in docstrings: b batch, h height, w width, c channels, k classes, n examples,
s steps, r restarts.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.typing import ArrayLike

# Whatever takes an array takes a NumPy one too; what it returns is a jax array.
Array = jax.Array | np.ndarray
# A typed key from `jax.random.key`, or one key an example (shape [b]).
Key = jax.Array
# Images f32[b, h, w, c] in [0, 1] to logits f32[b, k].
LogitsFn = Callable[[Array], Array]
# (logits f32[b, k], labels int32[b]) to f32[b]; attacks ascend it.
AttackLoss = Callable[[Array, Array], Array]
# (key, logits_fn, x, y) to f32[b]; training descends its mean.
TrainingLoss = Callable[[Key, LogitsFn, Array, Array], Array]


class Attack(Protocol):
    """A fixed-budget attack: images in, adversarial images of the same shape and dtype out."""

    def __call__(
        self, key: Key, logits_fn: LogitsFn, x: Array, y: Array, epsilon: ArrayLike, /
    ) -> Array: ...


class MinNorm(NamedTuple):
    """What a minimum-norm attack found.

    Attributes:
      x_adv: the nearest adversarial image found, f32[b, h, w, c]; `x` where there is none.
      distance: its distance, f32[b]; infinite where there is none.
      success: whether there is one, bool[b].
    """

    x_adv: Array
    distance: Array
    success: Array
