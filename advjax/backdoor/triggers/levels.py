"""Levels: images with few shades (BppAttack)."""

import jax
import jax.numpy as jnp

from advjax.backdoor import inputs
from advjax.core import checks, random
from advjax.core.typing import Array, Key


def _nearest(x: Array, num_levels: int) -> Array:
    steps = num_levels - 1
    # What dithering hands on can push a shade beyond the last level.
    return jnp.clip(jnp.round(x * steps), 0, steps) / steps


def _dithered(x: Array, num_levels: int) -> Array:
    """Floyd-Steinberg: in raster order, each error goes on to the four pixels that follow."""

    def row(above, shades):
        """`above` f32[w, ..., c]: errors of the row above."""
        left_above = jnp.pad(above[:-1], [(1, 0)] + [(0, 0)] * (above.ndim - 1))
        right_above = jnp.pad(above[1:], [(0, 1)] + [(0, 0)] * (above.ndim - 1))
        shades = shades + 1 / 16 * left_above + 5 / 16 * above + 3 / 16 * right_above

        def pixel(left, shade):
            shade = shade + 7 / 16 * left
            level = _nearest(shade, num_levels)
            return shade - level, (shade - level, level)

        _, (errors, levels) = jax.lax.scan(pixel, jnp.zeros_like(shades[0]), shades)
        return errors, levels

    raster = jnp.moveaxis(x, (-3, -2), (0, 1))
    _, levels = jax.lax.scan(row, jnp.zeros_like(raster[0]), raster)
    return jnp.moveaxis(levels, (0, 1), (-3, -2))


def bpp(x: Array, *, num_levels: int = 8, dithering: bool = False) -> Array:
    """BppAttack: fewer shades, `round((q - 1) x) / (q - 1)` for q levels.

    Args:
      x: images, f32[..., h, w, c] in [0, 1].
      num_levels: q, at least 2.
      dithering: spread each pixel's rounding error over its neighbours (Floyd-Steinberg: 7/16 to
        the right, 3/16, 5/16 and 1/16 to the row below). The paper does; its code, and the usual
        benchmark, do not by default.

    Returns:
      Images like `x`, of at most q shades a channel.

    Static: num_levels, dithering.

    Raises:
      ValueError: images that are not floats in [0, 1], fewer than two levels.

    Example:
      >>> import jax.numpy as jnp
      >>> shades = jnp.full((1, 4, 1), 0.3)
      >>> bpp(shades, num_levels=2)[0, :, 0]
      Array([0., 0., 0., 0.], dtype=float32)
      >>> bpp(shades, num_levels=2, dithering=True)[0, :, 0]
      Array([0., 0., 0., 1.], dtype=float32)

    Source: Z. Wang, J. Zhai, S. Ma, "BppAttack: Stealthy and Efficient Trojan Attacks Against Deep
    Neural Networks via Image Quantization and Contrastive Adversarial Learning", CVPR 2022.
    """
    inputs.images("bpp", x)
    checks.at_least("bpp", "num_levels", num_levels, 2)
    to_levels = _dithered if dithering else _nearest
    return to_levels(jnp.asarray(x, jnp.float32), num_levels).astype(x.dtype)


def bpp_negatives(
    key: Key,
    x: Array,
    *,
    others: Array | None = None,
    num_levels: int = 8,
    dithering: bool = False,
) -> Array:
    """Negatives of BppAttack: `clip(x + bpp(r) - r, 0, 1)`, the rounding error of another image r.

    They keep their own label, so that the network learns what is rounded and not that something
    was.

    Args:
      key: a key, or one key an image [b].
      x: images, f32[b, h, w, c] in [0, 1].
      others: images to draw each r from, f32[m, h, w, c]; the other images of `x` if None.
      num_levels: as for `bpp`.
      dithering: as for `bpp`.

    Returns:
      Images like `x`.

    Static: num_levels, dithering.

    Raises:
      ValueError: images that are not floats in [0, 1], fewer than two levels, a single image
        without `others`.

    Source: as `bpp`.
    """
    inputs.images("bpp_negatives", x)
    checks.four_axes("bpp_negatives", x)
    keys = random.example_keys(key, x.shape[0])
    if others is None:  # an image plus its own error would be the trigger
        if x.shape[0] < 2:
            raise ValueError("bpp_negatives: need two images, or others=, got a single image.")
        steps = jax.vmap(lambda k: jax.random.randint(k, (), 1, x.shape[0]))(keys)
        chosen = jnp.asarray(x)[(jnp.arange(x.shape[0]) + steps) % x.shape[0]]
    else:
        rows = jax.vmap(lambda k: jax.random.randint(k, (), 0, others.shape[0]))(keys)
        chosen = jnp.asarray(others)[rows]
    error = bpp(chosen, num_levels=num_levels, dithering=dithering) - chosen
    return jnp.clip(x + error, 0, 1).astype(x.dtype)
