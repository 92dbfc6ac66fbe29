"""Warps: images whose pixels are moved a little (WaNet)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.backdoor import inputs
from advjax.core import checks, random
from advjax.core.typing import Array, Key

_SHARPNESS = -0.75  # of the cubic kernel, as in image libraries


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    a, t = _SHARPNESS, np.abs(distance)
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    far = a * (((t - 5) * t + 8) * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def _bicubic_matrix(size: int, num_control: int) -> np.ndarray:
    """Weights f32[size, num_control] of control points; aligned corners, repeated edges."""
    position = np.linspace(0, num_control - 1, size)
    first = np.floor(position).astype(int)
    weights = np.zeros((size, num_control))
    for offset in (-1, 0, 1, 2):
        control = np.clip(first + offset, 0, num_control - 1)
        np.add.at(weights, (np.arange(size), control), _cubic(position - first - offset))
    return weights.astype(np.float32)


def _unit(shape: tuple[int, ...]) -> np.ndarray:
    """1 / side of a grid from -1 to 1 with aligned corners, in pixels, for each axis: f32[2]."""
    sides = np.array(shape, np.float32)
    return (sides - 1) / (2 * sides)


def _in_image(moves: Array) -> Array:
    """Moves f32[h, w, 2] in pixels, cut where they would leave the image."""
    sides = moves.shape[:2]
    place = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), axis=-1)
    return jnp.clip(moves, -place, np.array(sides) - 1 - place)


def _moves(
    caller: str, field: Array | None, shape: tuple[int, ...], strength: ArrayLike, num_control: int
):
    """How far each pixel looks, f32[h, w, 2] in pixels: rows, columns."""
    checks.non_negative(caller, "strength", strength)
    if field is None:
        field = wanet_field(jax.random.key(0), num_control)
    if jnp.ndim(field) != 3 or field.shape[0] != field.shape[1] or field.shape[2] != 2:
        raise ValueError(
            f"{caller}: need a field of shape [num_control, num_control, 2], got "
            f"{jnp.shape(field)}."
        )
    by_row, by_column = (_bicubic_matrix(side, field.shape[0]) for side in shape)
    smooth = jnp.einsum(
        "hi,ijd,wj->hwd", by_row, jnp.asarray(field), by_column, precision="highest"
    )
    return _in_image(jnp.asarray(strength, jnp.float32) * smooth * _unit(shape))


def _sampled(image: Array, moves: Array) -> Array:
    """Bilinear samples of an image f32[h, w, c] at every pixel's place plus its move.

    Whole steps and fractions are taken of the move, not of the place: that keeps the fraction
    exact to float32.
    """
    height, width, _ = image.shape
    steps = jnp.floor(moves)
    rows, columns = jnp.moveaxis(steps.astype(jnp.int32), -1, 0) + np.indices((height, width))
    down, right = jnp.moveaxis(moves - steps, -1, 0)[..., None]

    def at(below: int, beside: int) -> Array:
        # Beyond the last row or column the fraction is zero.
        return image[
            jnp.minimum(rows + below, height - 1), jnp.minimum(columns + beside, width - 1)
        ]

    upper = (1 - right) * at(0, 0) + right * at(0, 1)
    lower = (1 - right) * at(1, 0) + right * at(1, 1)
    return jnp.clip((1 - down) * upper + down * lower, 0, 1).astype(image.dtype)


def wanet_field(key: Key, num_control: int = 4) -> Array:
    """A random warp: U(-1, 1) at control points, over its mean absolute value.

    Args:
      key: a key; an attacker draws one field and keeps it.
      num_control: control points on a side, at least 2.

    Returns:
      f32[num_control, num_control, 2]; the last axis is the move along rows and along columns.

    Static: num_control.

    Raises:
      ValueError: fewer than two control points.

    Source: as `wanet`.
    """
    checks.at_least("wanet_field", "num_control", num_control, 2)
    field = jax.random.uniform(key, (num_control, num_control, 2), minval=-1, maxval=1)
    return field / jnp.mean(jnp.abs(field))


def wanet(
    x: Array, *, field: Array | None = None, strength: ArrayLike = 0.5, num_control: int = 4
) -> Array:
    """WaNet: warps the image smoothly by a fraction of a pixel.

    The field is spread over the image by bicubic interpolation. On a grid from -1 to 1 over the
    image, corners aligned, each pixel is the bilinear sample at `clip(grid + strength field / side,
    -1, 1)`. Each axis is divided by its own side; the published code has square images only.

    Args:
      x: images, f32[..., h, w, c] in [0, 1].
      field: what `wanet_field` drew, f32[num_control, num_control, 2]; that of key 0 if None.
      strength: how far pixels move, in about half pixels.
      num_control: control points on a side, where the field is drawn here.

    Returns:
      Images like `x`.

    Static: num_control.

    Raises:
      ValueError: images that are not floats in [0, 1], a field of another shape, a strength below
        0.

    Example:
      >>> import jax.numpy as jnp
      >>> wanet(jnp.full((8, 8, 1), 0.5)).shape  # a warp of one colour is that colour
      (8, 8, 1)

    Source: A. Nguyen, A. Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021.
    """
    inputs.images("wanet", x)
    moves = _moves("wanet", field, x.shape[-3:-1], strength, num_control)
    images = jnp.reshape(x, (-1, *x.shape[-3:]))
    return jax.vmap(functools.partial(_sampled, moves=moves))(images).reshape(x.shape)


def wanet_noise(
    key: Key,
    x: Array,
    *,
    field: Array | None = None,
    strength: ArrayLike = 0.5,
    num_control: int = 4,
) -> Array:
    """Noise mode of WaNet: the warp plus `U(-1, 1) / side` at every pixel, drawn for each image.

    These images keep their own label, so that the network learns this field and not warping.

    Args:
      key: a key, or one key an image [b].
      x: images, f32[b, h, w, c] in [0, 1].
      field: as for `wanet`.
      strength: as for `wanet`.
      num_control: as for `wanet`.

    Returns:
      Images like `x`.

    Static: num_control.

    Raises:
      ValueError: as `wanet`.

    Source: as `wanet`.
    """
    inputs.images("wanet_noise", x)
    checks.four_axes("wanet_noise", x)
    shape = x.shape[1:3]
    moves = _moves("wanet_noise", field, shape, strength, num_control)

    def noisy(key, image):
        noise = jax.random.uniform(key, (*shape, 2), minval=-1, maxval=1)
        return _sampled(image, _in_image(moves + noise * _unit(shape)))

    return jax.vmap(noisy)(random.example_keys(key, x.shape[0]), jnp.asarray(x))
