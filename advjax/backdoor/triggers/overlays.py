"""Overlays: patterns as large as the image, added to it or blended into it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.backdoor import inputs
from advjax.core import checks
from advjax.core.typing import Array, Key

_NUM_WAVES, _HIGHEST_FREQUENCY = 12, 6.0


def additive(x: Array, pattern: Array) -> Array:
    """A pattern that is added: `clip(x + pattern, 0, 1)`.

    Args:
      x: images, f32[..., h, w, c] in [0, 1].
      pattern: f32[h, w, c], or what broadcasts to it.

    Returns:
      Images like `x`.

    Raises:
      ValueError: images that are not floats in [0, 1], a pattern that does not fit them.
    """
    inputs.images("additive", x)
    _fits("additive", x, pattern)
    return jnp.clip(x + jnp.asarray(pattern, x.dtype), 0, 1)


def _fits(caller: str, x: Array, pattern: Array) -> None:
    shape = tuple(x.shape[-3:])
    try:
        fits = np.broadcast_shapes(jnp.shape(pattern), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{caller}: need a pattern of the images' shape {shape}, got {jnp.shape(pattern)}."
        )


def blended_pattern(key: Key, shape: tuple[int, ...]) -> Array:
    """A colourful smooth picture to blend in: a sum of plane waves, stretched to [0, 1].

    It is drawn on the unit square, so one key gives the same picture at every size. It stands for
    the cartoon of the paper, which the library does not ship.

    Args:
      key: a key.
      shape: height, width and channels.

    Returns:
      f32[h, w, c] in [0, 1].

    Static: shape.

    Example:
      >>> import jax
      >>> blended_pattern(jax.random.key(0), (32, 32, 3)).shape
      (32, 32, 3)
    """
    height, width, channels = shape
    key_frequency, key_phase = jax.random.split(key)
    vertical, horizontal = jax.random.uniform(
        key_frequency, (2, _NUM_WAVES), minval=-_HIGHEST_FREQUENCY, maxval=_HIGHEST_FREQUENCY
    )
    phase = jax.random.uniform(key_phase, (_NUM_WAVES, channels))
    rows = jnp.arange(height)[:, None, None, None] / height
    columns = jnp.arange(width)[:, None, None] / width
    turns = vertical[:, None] * rows + horizontal[:, None] * columns + phase
    waves = jnp.sum(jnp.cos(2 * jnp.pi * turns), axis=-2)
    low, high = jnp.min(waves), jnp.max(waves)
    return (waves - low) / jnp.maximum(high - low, 1e-6)  # one pixel has no range


def blended(x: Array, *, pattern: Array | None = None, alpha: ArrayLike = 0.2) -> Array:
    """Blended: `(1 - alpha) x + alpha pattern`.

    Args:
      x: images, f32[..., h, w, c] in [0, 1].
      pattern: the picture that is blended in, f32[h, w, c] in [0, 1]; the `blended_pattern` of key
        0 if None.
      alpha: its share, in [0, 1].

    Returns:
      Images like `x`.

    Raises:
      ValueError: images or a pattern that are not floats in [0, 1], a pattern that does not fit
        the images, a share outside of [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> blended(jnp.zeros((1, 2, 1)), pattern=jnp.ones((1, 2, 1)), alpha=0.25)[0, :, 0]
      Array([0.25, 0.25], dtype=float32)

    Source: X. Chen, C. Liu, B. Li, K. Lu, D. Song, "Targeted Backdoor Attacks on Deep Learning
    Systems Using Data Poisoning", 2017.
    """
    inputs.images("blended", x)
    inputs.share("blended", "alpha", alpha)
    if pattern is None:
        pattern = blended_pattern(jax.random.key(0), x.shape[-3:])
    else:
        checks.images("blended", pattern)
    _fits("blended", x, pattern)
    alpha = jnp.asarray(alpha, jnp.float32)
    return jnp.clip((1 - alpha) * x + alpha * pattern, 0, 1).astype(x.dtype)


def sig(x: Array, *, amplitude: ArrayLike = 40 / 255, frequency: ArrayLike = 6) -> Array:
    """SIG: `x + amplitude sin(2 pi j frequency / w)` at column j, in all channels.

    The paper poisons without changing labels: use it with a `clean_label` map.

    Args:
      x: images, f32[..., h, w, c] in [0, 1].
      amplitude: of the sine, such as `40 / 255`.
      frequency: its periods across the image.

    Returns:
      Images like `x`.

    Raises:
      ValueError: images that are not floats in [0, 1], an amplitude or a frequency below 0.

    Example:
      >>> import jax.numpy as jnp
      >>> (100 * sig(jnp.full((1, 4, 1), 0.5), amplitude=0.1, frequency=1)[0, :, 0]).round()
      Array([50., 60., 50., 40.], dtype=float32)

    Source: M. Barni, K. Kallas, B. Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption
    Without Label Poisoning", ICIP 2019.
    """
    inputs.images("sig", x)
    checks.non_negative("sig", "amplitude", amplitude)
    checks.non_negative("sig", "frequency", frequency)
    width = x.shape[-2]
    # Whole turns are taken off first, which keeps the sine exact in float32.
    turns = (jnp.arange(width) * jnp.asarray(frequency, jnp.float32) / width) % 1
    wave = jnp.asarray(amplitude, jnp.float32) * jnp.sin(2 * jnp.pi * turns)
    return jnp.clip(x + wave[:, None], 0, 1).astype(x.dtype)
