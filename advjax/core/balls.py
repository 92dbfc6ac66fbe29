"""Norm balls: what an attack may add to an image, and which way is steepest inside it.

A ball is a static value (`linf`, `l2`, `l1`) with four functions on batches. Images stay in
[0, 1]; `epsilon` is traced, one for all or one an example, in units of the image.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.core import checks
from advjax.core.typing import Array, Key


def per_example(value: ArrayLike, x: Array) -> Array:
    """Casts a scalar or f32[b] to `x.dtype` and shapes it to broadcast against `x`."""
    value = jnp.asarray(value, x.dtype)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


def rounded(x: Array, dtype: Any) -> Array:
    """Images in another dtype, truly rounded to it.

    XLA may drop a conversion to a shorter float and back, and an attack would then judge and
    measure an image that it does not return.
    """
    info = jnp.finfo(dtype)
    if info.bits < jnp.finfo(x.dtype).bits:
        x = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    return x.astype(dtype)


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


# ------------------------------------------------------------------------------------- norms


def _linf_norm(delta: Array) -> Array:
    return jnp.max(jnp.abs(_flat(delta)), axis=-1)


def _l2_norm(delta: Array) -> Array:
    return jnp.sqrt(jnp.sum(_flat(delta) ** 2, axis=-1))


def _l1_norm(delta: Array) -> Array:
    return jnp.sum(jnp.abs(_flat(delta)), axis=-1)


# -------------------------------------------------------------------------------- directions


def _linf_direction(gradient: Array, x: Array) -> Array:
    del x
    return jnp.sign(gradient)


def _l2_direction(gradient: Array, x: Array) -> Array:
    del x
    # A saturated network has gradients whose squares underflow: first scale the largest to one.
    dtype = gradient.dtype
    gradient = gradient.astype(jnp.promote_types(dtype, jnp.float32))
    largest = per_example(_linf_norm(gradient), gradient)
    gradient = gradient / jnp.where(largest > 0, largest, 1)
    norm = per_example(_l2_norm(gradient), gradient)
    return (gradient / jnp.where(norm > 0, norm, 1)).astype(dtype)


def _l1_direction(gradient: Array, x: Array, *, sparsity: float = 0.99) -> Array:
    # A pixel at the edge of the box that would leave it cannot use any of the budget.
    has_room = jnp.where(gradient > 0, x < 1, x > 0)
    size = _flat(jnp.where(has_room, jnp.abs(gradient), 0))
    num_moved = max(1, round((1 - sparsity) * size.shape[1]))
    threshold = jax.lax.top_k(size, num_moved)[0][:, -1:]
    is_moved = (size >= threshold) & (size > 0)
    share = is_moved / jnp.maximum(jnp.sum(is_moved, axis=-1, keepdims=True), 1).astype(x.dtype)
    return jnp.sign(gradient) * share.reshape(gradient.shape).astype(gradient.dtype)


# ------------------------------------------------------------------------------- projections


def _linf_shrink(delta: Array, epsilon: Array) -> Array:
    return jnp.clip(delta, -epsilon, epsilon)


def _l2_shrink(delta: Array, epsilon: Array) -> Array:
    norm = per_example(_l2_norm(delta), delta)
    return delta * jnp.where(norm > epsilon, epsilon / jnp.where(norm > 0, norm, 1), 1)


def _l1_shrink(delta: Array, epsilon: Array) -> Array:
    """Euclidean projection on the l1 ball: soft-thresholding at the level that sorting finds.

    Source: J. Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High
    Dimensions", ICML 2008.
    """
    size = _flat(jnp.abs(delta))
    epsilon = jnp.broadcast_to(epsilon.reshape(-1, 1), (size.shape[0], 1))
    descending = -jnp.sort(-size, axis=-1)
    excess = jnp.cumsum(descending, axis=-1) - epsilon
    ranks = jnp.arange(1, size.shape[1] + 1, dtype=size.dtype)
    # The first rank is always in the support, also at epsilon = 0, where rounding could empty it.
    support = jnp.maximum(jnp.sum(descending * ranks > excess, axis=-1, keepdims=True), 1)
    level = jnp.take_along_axis(excess, support - 1, axis=-1) / support.astype(size.dtype)
    shrunk = jnp.maximum(size - jnp.maximum(level, 0), 0)
    return jnp.sign(delta) * shrunk.reshape(delta.shape)


# ---------------------------------------------------------------------------- random starts


def _linf_sample(key: Key, shape: tuple[int, ...], dtype) -> Array:
    return jax.random.uniform(key, shape, dtype, minval=-1, maxval=1)


def _l2_sample(key: Key, shape: tuple[int, ...], dtype) -> Array:
    key_direction, key_radius = jax.random.split(key)
    direction = jax.random.normal(key_direction, shape, dtype)
    # The volume within radius t grows as t^d, hence the d-th root.
    radius = jax.random.uniform(key_radius, (), dtype) ** (1 / max(direction.size, 1))
    return radius * direction / jnp.maximum(jnp.linalg.norm(direction), jnp.finfo(dtype).tiny)


def _l1_sample(key: Key, shape: tuple[int, ...], dtype) -> Array:
    key_size, key_rest, key_sign = jax.random.split(key, 3)
    # d + 1 exponentials over their sum are uniform on the simplex; dropping one fills the ball.
    size = jax.random.exponential(key_size, shape, dtype)
    total = jnp.sum(size) + jax.random.exponential(key_rest, (), dtype)
    return jax.random.rademacher(key_sign, shape, dtype) * size / total


def _wide_delta(x_adv: Array, x: Array) -> Array:
    """The perturbation, 0 where it is not finite.

    Sums overflow in float16 and are coarse in bfloat16: norms are taken in float32.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.where(jnp.isfinite(x_adv), x_adv.astype(wide) - x.astype(wide), 0)


def _radius(epsilon: ArrayLike, x: Array) -> Array:
    """As `per_example`, but a short float is the next smaller one where it was rounded up."""
    cast = per_example(epsilon, x)
    if jnp.finfo(x.dtype).bits >= 32:
        return cast
    wide = per_example(epsilon, x.astype(jnp.float32))
    nearest = rounded(wide, x.dtype)
    return jnp.where(
        nearest.astype(wide.dtype) > wide, jnp.nextafter(nearest, 0 * nearest), nearest
    )


def _slack(name: str, x: Array) -> float:
    """By how much the rounding of `x + delta` may lengthen delta at the worst."""
    # Every pixel of the sum is off by at most half a step of the grid below one.
    half_step = float(jnp.finfo(x.dtype).eps) / 4
    num_pixels = math.prod(x.shape[1:])
    return half_step * (num_pixels if name == "l1" else math.sqrt(num_pixels))


def _check_slack(name: str, epsilon: ArrayLike, x: Array) -> None:
    """Refuses a radius, where it is concrete, that is all lost to the rounding of short floats."""
    if jnp.finfo(x.dtype).bits >= 32 or not checks.is_concrete(epsilon):
        return
    radius = np.asarray(epsilon, np.float64)
    slack = _slack(name, x)
    lost = (radius > 0) & (radius <= slack)
    if lost.any():
        raise ValueError(
            f"balls.{name}: need epsilon > {slack:.3g} for images of {x.dtype}, whose rounding may "
            f"take all of it, got epsilon={radius[lost].min():g}; use images of float32."
        )


def _safe_radius(name: str, epsilon: ArrayLike, x: Array) -> Array:
    """A radius so much below epsilon that no rounding of `x + delta` leaves the ball."""
    _check_slack(name, epsilon, x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    slack, epsilon = _slack(name, x), _radius(epsilon, x)
    shorter = 1 - 4 * float(jnp.finfo(wide).eps)
    return jnp.maximum(epsilon.astype(wide) * shorter - slack, 0)


_NUM_HALVINGS = 32  # of the level in `project_l1_in_box`: beyond the digits of float32


def project_l1_in_box(x_adv: Array, x: Array, epsilon: ArrayLike) -> Array:
    """Nearest image in both the l1 ball and the box.

    `delta_i = sign(z_i) clip(|z_i| - level, 0, room_i)` with `z = x_adv - x`, `room_i` the way to
    the end of the box and the least level >= 0 that fits. "Ball, then box" (`Ball.project`) spends
    the radius on pixels that the box then cuts.

    Args:
      x_adv: images, [b, h, w, c]; entries that are not finite become those of `x`.
      x: images in [0, 1], [b, h, w, c].
      epsilon: radius, scalar or [b].

    Returns:
      Images [b, h, w, c] with an l1 distance of at most epsilon and values in [0, 1], exactly as
      those of `Ball.project` are.

    Source: F. Croce, M. Hein, "Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image
    Classifiers", ICML 2021. The level is found by halving, for the published sorting.
    """
    delta = _wide_delta(x_adv, x)
    wide_x = x.astype(delta.dtype)
    size, room = _flat(jnp.abs(delta)), _flat(jnp.where(delta > 0, 1 - wide_x, wide_x))
    radius = _safe_radius("l1", epsilon, x)
    radius = jnp.broadcast_to(radius.reshape(-1, 1), (size.shape[0], 1))

    def fits(level: Array) -> Array:
        return jnp.sum(jnp.clip(size - level, 0, room), axis=-1, keepdims=True) <= radius

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        is_enough = fits(middle)
        return jnp.where(is_enough, low, middle), jnp.where(is_enough, middle, high)

    high = jnp.max(size, axis=-1, keepdims=True)
    low = jnp.zeros_like(high)
    _, level = jax.lax.fori_loop(0, _NUM_HALVINGS, halve, (low, high))
    level = jnp.where(fits(low), 0, level)
    moved = jnp.sign(delta) * jnp.clip(size - level, 0, room).reshape(delta.shape)
    return jnp.clip((wide_x + moved).astype(x.dtype), 0, 1)


@dataclasses.dataclass(frozen=True)
class Ball:
    """A norm ball around each image; the instances are `linf`, `l2` and `l1`.

    Attributes:
      name: "linf", "l2" or "l1".
      norm: `delta [b, ...] -> f32[b]`.
      direction: `(gradient, x) -> [b, ...]`, the unit-norm direction of steepest ascent at `x`;
        zero where the gradient is. For l1 the step is spread over the one percent of the pixels
        with the largest gradients that can still move (Tramer and Boneh's sparse l1 descent).
      shrink: `(delta, epsilon) -> [b, ...]`, the Euclidean projection on the ball.
      sample: `(key, shape, dtype) -> shape`, one uniform draw from the unit ball.

    Source: A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks",
    ICLR 2018; F. Tramer, D. Boneh, "Adversarial Training and Robustness for Multiple
    Perturbations", NeurIPS 2019.
    """

    name: str
    norm: Callable[[Array], Array]
    direction: Callable[[Array, Array], Array]
    shrink: Callable[[Array, Array], Array]
    sample: Callable[[Key, tuple[int, ...], jnp.dtype], Array]

    def __repr__(self) -> str:
        return f"balls.{self.name}"

    def distance(self, x_adv: Array, x: Array) -> Array:
        """Norm of the perturbation of each image, f32[b].

        Args:
          x_adv: images, [b, h, w, c].
          x: images, [b, h, w, c].
        """
        return self.norm(x_adv - x)

    def project(self, x_adv: Array, x: Array, epsilon: ArrayLike) -> Array:
        """Nearest image by "ball, then box", exactly inside both as floating point measures it.

        Clipping to the box moves every pixel towards `x`, so it never leaves the ball again. The
        sum `x + delta` rounds, though: for linf a pixel that lands outside goes one step back; for
        the others the radius is less by the worst rounding, 1e-6 for l2 on MNIST.

        Args:
          x_adv: images, [b, h, w, c]; entries that are not finite become those of `x`.
          x: images in [0, 1], [b, h, w, c].
          epsilon: radius, scalar or [b].

        Returns:
          Images [b, h, w, c] with `distance(., x) <= epsilon` and values in [0, 1].

        Raises:
          ValueError: for l2 and l1, an epsilon above 0 that the worst rounding of images in
            bfloat16 or float16 would take all of.
        """
        if self.name == "linf":
            epsilon = _radius(epsilon, x)
            delta = jnp.where(jnp.isfinite(x_adv), x_adv - x, 0).astype(x.dtype)
            moved = jnp.clip(x + self.shrink(delta, epsilon), 0, 1)
            # The sum may round one step of the grid too far. Of the two differences one is exact
            # (Sterbenz): the first for moves shorter than half the pixel, else the second.
            is_outside = (jnp.abs(moved - x) > epsilon) | (moved - epsilon > x)
            return jnp.where(is_outside, jnp.nextafter(moved, x), moved)
        delta = _wide_delta(x_adv, x)
        shrunk = self.shrink(delta, _safe_radius(self.name, epsilon, x))
        return jnp.clip((x.astype(delta.dtype) + shrunk).astype(x.dtype), 0, 1)

    def uniform(self, keys: Key, x: Array, epsilon: ArrayLike) -> Array:
        """A random image in the ball around each image and in [0, 1].

        Args:
          keys: one key an example, [b].
          x: images in [0, 1], [b, h, w, c].
          epsilon: radius, scalar or [b].

        Returns:
          Images [b, h, w, c].
        """
        # In float16 a sum over the pixels of a photograph would overflow.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        noise = jax.vmap(lambda key: self.sample(key, x.shape[1:], wide))(keys)
        start = x.astype(wide) + per_example(epsilon, x).astype(wide) * noise
        return self.project(start, x, epsilon)


linf = Ball("linf", _linf_norm, _linf_direction, _linf_shrink, _linf_sample)
l2 = Ball("l2", _l2_norm, _l2_direction, _l2_shrink, _l2_sample)
l1 = Ball("l1", _l1_norm, _l1_direction, _l1_shrink, _l1_sample)

_BALLS = {ball.name: ball for ball in (linf, l2, l1)}


def get(name: str) -> Ball:
    """The ball of that name.

    Args:
      name: "linf", "l2" or "l1".

    Raises:
      ValueError: an unknown name.
    """
    if name not in _BALLS:
        raise ValueError(f"balls.get: unknown ball {name!r}; known: {', '.join(_BALLS)}.")
    return _BALLS[name]


def check(caller: str, ball: Any, *names: str) -> None:
    """Refuses what is no ball, such as a text, and a norm that an attack does not have.

    Args:
      caller: for the error.
      ball: what was given.
      *names: the norms there are; all three if none is named.

    Raises:
      ValueError: another one.
    """
    names = names or ("linf", "l2", "l1")
    if not isinstance(ball, Ball) or ball.name not in names:
        known = " or ".join(f"balls.{name}" for name in names)
        raise ValueError(f"{caller}: need ball={known}, got ball={ball!r}.")
