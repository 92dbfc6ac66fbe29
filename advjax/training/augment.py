"""Standard augmentations: pure functions `(key, x) -> x` on float images f32[b, h, w, c]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from advjax.core import checks
from advjax.core.typing import Array, Key

Augmentation = Callable[[Key, Array], Array]


def random_flip(key: Key, x: Array) -> Array:
    """Mirrors each image left to right with probability one half.

    Args:
      key: a key.
      x: images, f32[b, h, w, c].
    """
    flips = jax.random.bernoulli(key, shape=(x.shape[0], 1, 1, 1))
    return jnp.where(flips, x[:, :, ::-1], x)


def random_crop(padding: int = 4) -> Augmentation:
    """Pads each image with zeros and cuts a random window of its own size.

    Args:
      padding: pixels on each side; 4 is the standard of CIFAR-10.

    Static: padding.
    """
    checks.at_least("random_crop", "padding", padding, 0)

    def crop(key: Key, x: Array) -> Array:
        _, height, width, channels = x.shape
        wide = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        corners = jax.random.randint(key, (x.shape[0], 2), 0, 2 * padding + 1)

        def cut(image: Array, corner: Array) -> Array:
            return jax.lax.dynamic_slice(
                image, (corner[0], corner[1], 0), (height, width, channels)
            )

        return jax.vmap(cut)(wide, corners)

    return crop


def chain(*augmentations: Augmentation) -> Augmentation:
    """Applies several augmentations in turn, each with a key of its own."""

    def apply(key: Key, x: Array) -> Array:
        for number, augmentation in enumerate(augmentations):
            x = augmentation(jax.random.fold_in(key, number), x)
        return x

    return apply
