"""What minimum-norm attacks share: when an image counts, the nearest one so far, the last touch.

All of them run at the highest matrix precision: with the shorter products that accelerators use by
default, half of the points that lie on a boundary are on its wrong side.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.attacks.ascent import per_example_mask
from advjax.core import balls, losses, metrics
from advjax.core.balls import Ball
from advjax.core.typing import Array, LogitsFn, MinNorm

# Logits f32[b, k] to f32[b], positive where the attack has what it wants.
Excess = Callable[[Array], Array]

# Part of the largest logit by which an image has to be beyond the boundary, so that another
# program, which rounds otherwise, gives the same answer.
_SLACK = 4e-6


def excess(y: Array, targeted: bool, confidence: ArrayLike = 0.0, slack: float = 0.0) -> Excess:
    """By how much the margin of the wrong class (or of the target) exceeds the confidence.

    Args:
      y: labels, or targets, int32[b].
      targeted: whether `y` are targets.
      confidence: the least margin, kappa; scalar or [b].
      slack: part of the largest logit by which the margin must be more than that.

    Returns:
      Logits to f32[b]; minus infinity where a logit is not finite.
    """

    def beyond(logits: Array) -> Array:
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        is_finite = jnp.all(jnp.isfinite(logits), axis=-1)
        logits = jnp.where(is_finite[:, None], logits, 0)
        margin = losses.margin(logits, y)
        margin = -margin if targeted else margin
        needed = jnp.asarray(confidence, margin.dtype) + slack * jnp.max(jnp.abs(logits), axis=-1)
        return jnp.where(is_finite, margin - needed, -jnp.inf)

    return beyond


def start(logits: Array, x: Array, y: Array, targeted: bool, confidence: ArrayLike = 0.0):
    """The clean images: at distance 0 where they are what the attack wants, else at infinity."""
    margin = excess(y, targeted, confidence)(logits)
    answered = metrics.is_correct(logits, y) if targeted else metrics.is_fooled(logits, y)
    success = answered & (margin >= 0)
    return MinNorm(x, jnp.where(success, 0, jnp.inf).astype(jnp.float32), success)


def nearer(found: MinNorm, x_adv: Array, distance: Array, success: Array) -> MinNorm:
    """Takes over the images that succeed at a smaller distance."""
    wins = success & (distance < found.distance)
    return MinNorm(
        jnp.where(per_example_mask(wins, x_adv), x_adv, found.x_adv),
        jnp.where(wins, distance, found.distance).astype(found.distance.dtype),
        found.success | wins,
    )


def distance(ball: Ball, x_adv: Array, x: Array) -> Array:
    """Norm of the perturbation, f32[b], also of images in shorter floats."""
    return ball.norm(x_adv.astype(jnp.float32) - x.astype(jnp.float32))


def search_excess(y: Array, targeted: bool, confidence: ArrayLike = 0.0) -> Excess:
    """`excess` with the slack that a found image has to have."""
    return excess(y, targeted, confidence, _SLACK)


# -------------------------------------------------------------------- nearest point of a plane


def onto_plane(u: Array, normal: Array, offset: Array, ball: Ball) -> Array:
    """The point of the box [0, 1] nearest to `u` with `normal . (z - u) >= offset`.

    For l2 and linf all pixels move along the normal (or its signs) until the box stops them: the
    gain is then a concave, piecewise linear function of the length, so Newton's method from zero
    never overshoots and ends after as many steps as there are pieces; 12 are enough to be exact on
    images. For l1 the pixels with the largest slope move to the end of the box, one after the
    other.

    Args:
      u: images in [0, 1], [b, h, w, c].
      normal: [b, h, w, c].
      offset: f32[b]; where it is not positive `u` stays.
      ball: the norm in which "nearest" is meant.

    Returns:
      Images [b, h, w, c]; where the plane does not meet the box, the corner nearest to it.
    """
    shape = u.shape
    u, normal = (a.reshape(a.shape[0], -1) for a in (u, normal))
    offset = jnp.maximum(offset, 0)[:, None]
    # To the end of the box on the side where the normal points.
    room = jnp.where(normal > 0, 1 - u, jnp.where(normal < 0, u, 0))
    slope = jnp.abs(normal)
    if ball is balls.l1:
        move = _steepest_first(slope, room, offset)
    else:
        speed = slope if ball is balls.l2 else jnp.ones_like(slope)
        move = _along(slope, speed, room, offset)
    return jnp.clip(u + jnp.sign(normal) * move, 0, 1).reshape(shape)


def _along(slope: Array, speed: Array, room: Array, offset: Array) -> Array:
    """`min(t speed, room)` with the least t whose gain, slope . move, is the offset."""

    def newton(_, t):
        move = jnp.minimum(t * speed, room)
        gain = jnp.sum(slope * move, axis=-1, keepdims=True)
        rate = jnp.sum(jnp.where(t * speed < room, slope * speed, 0), axis=-1, keepdims=True)
        return t + jnp.where(rate > 0, (offset - gain) / jnp.where(rate > 0, rate, 1), 0)

    t = jax.lax.fori_loop(0, 12, newton, offset * 0)
    return jnp.minimum(jnp.maximum(t, 0) * speed, room)


def _steepest_first(slope: Array, room: Array, offset: Array) -> Array:
    """Moves pixels to the end of the box in the order of their slope until the gain is reached."""
    order = jnp.argsort(-slope, axis=-1)
    gain = jnp.take_along_axis(slope * room, order, axis=-1)
    before = jnp.cumsum(gain, axis=-1) - gain
    steep = jnp.take_along_axis(slope, order, axis=-1)
    needed = jnp.maximum(offset - before, 0) / jnp.where(steep > 0, steep, jnp.inf)
    move = jnp.minimum(needed, jnp.take_along_axis(room, order, axis=-1))
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(move, back, axis=-1)


# -------------------------------------------------------------------------------- last touch


def finish(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    found: MinNorm,
    *,
    ball: Ball,
    targeted: bool = False,
    confidence: ArrayLike = 0.0,
    num_halvings: int = 8,
) -> MinNorm:
    """Brings what was found to the boundary and checks it once more.

    First back along the straight line to the clean image, by halving; then to the nearest point of
    the boundary as it looks there, which is exact where the classifier is linear. Each is kept
    only where it is adversarial and nearer.

    Args:
      logits_fn: classifier.
      x: clean images, [b, h, w, c].
      y: labels, or targets, int32[b].
      found: what was found; an image that was not found is `x`.
      ball: the norm.
      targeted: whether `y` are targets.
      confidence: the least margin.
      num_halvings: of the line.

    Returns:
      `MinNorm` whose success is that of a last evaluation of exactly the images returned.
    """
    beyond = search_excess(y, targeted, confidence)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def halve(number, found):
        delta = found.x_adv.astype(wide.dtype) - wide
        x_adv = balls.rounded(wide + delta * (1 - 0.5 ** (number + 1.0)), x.dtype)
        is_adversarial = beyond(logits_fn(x_adv)) > 0
        return nearer(found, x_adv, distance(ball, x_adv, x), is_adversarial)

    found = jax.lax.fori_loop(0, num_halvings, halve, found)
    margin, normal = slope(beyond, logits_fn, found.x_adv)
    # The plane as seen from x, and a little beyond it.
    normal = normal.astype(wide.dtype)
    away = jnp.sum((wide - found.x_adv) * normal, axis=(1, 2, 3))
    offset = -(margin + away)
    x_adv = balls.rounded(onto_plane(wide, normal, offset * (1 + 1e-5), ball), x.dtype)
    x_adv = jnp.where(per_example_mask(jnp.isfinite(margin), x), x_adv, x)
    success = beyond(logits_fn(x_adv)) > 0
    found = nearer(found, x_adv, distance(ball, x_adv, x), success)
    return recheck(logits_fn, x, y, found, targeted=targeted, confidence=confidence)


def recheck(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    found: MinNorm,
    *,
    targeted: bool = False,
    confidence: ArrayLike = 0.0,
) -> MinNorm:
    """Judges exactly the images that are returned; a failure is the clean image, infinitely far."""
    # Without slack: an image that is adversarial by itself may be so by ever so little.
    judged = start(logits_fn(found.x_adv), found.x_adv, y, targeted, confidence)
    success = found.success & judged.success
    return MinNorm(
        jnp.where(per_example_mask(success, x), found.x_adv, x),
        jnp.where(success, found.distance, jnp.inf),
        success,
    )


def slope(function: Excess, logits_fn: LogitsFn, x: Array) -> tuple[Array, Array]:
    """A function of the logits and its gradient in the image, per example; f32[b], [b, h, w, c]."""

    def total(images):
        values = function(logits_fn(images))
        return jnp.sum(jnp.where(jnp.isfinite(values), values, 0)), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return values, jnp.where(jnp.isfinite(gradient), gradient, 0)


def candidates(
    logits_fn: LogitsFn, x: Array, y: Array, classes: Array
) -> tuple[Array, Array, Array]:
    """How far each class lags behind the label, and the gradients of that.

    Args:
      logits_fn: classifier.
      x: images, [b, h, w, c].
      y: the class to leave, int32[b].
      classes: classes to go to, int32[b, m].

    Returns:
      The logits f32[b, k]; `z_class - z_y`, f32[b, m]; its gradients f32[m, b, h, w, c].
    """
    logits, pull = jax.vjp(lambda images: logits_fn(images), x)
    num_classes = logits.shape[-1]
    leave = jax.nn.one_hot(y, num_classes, dtype=logits.dtype)
    cotangents = jax.nn.one_hot(classes.T, num_classes, dtype=logits.dtype) - leave
    gradients = jax.vmap(lambda cotangent: pull(cotangent)[0])(cotangents)
    gaps = jnp.take_along_axis(logits, classes, axis=-1) - jnp.take_along_axis(
        logits, y[:, None], axis=-1
    )
    return logits, gaps, jnp.where(jnp.isfinite(gradients), gradients, 0)


def closest(gaps: Array, normals: Array, ball: Ball) -> tuple[Array, Array, Array]:
    """Of several linearised boundaries the nearest one of each image.

    Args:
      gaps: f32[b, m].
      normals: their gradients, [m, b, h, w, c].
      ball: the norm.

    Returns:
      Its gap f32[b], its gradient [b, h, w, c] and the dual norm of that, f32[b].
    """
    size = dual_norm(normals, ball).T
    # A class without a slope is out of reach.
    far = jnp.where(size > 0, jnp.abs(gaps) / jnp.where(size > 0, size, 1), jnp.inf)
    best, row = jnp.argmin(far, axis=-1), jnp.arange(gaps.shape[0])
    return gaps[row, best], normals[best, row], size[row, best]


def dual_norm(gradients: Array, ball: Ball) -> Array:
    """Norm in which a slope is measured so that gap / norm is a distance; over the last 3 axes."""
    flat = gradients.reshape(*gradients.shape[:-3], math.prod(gradients.shape[-3:]))
    flat = jnp.abs(flat.astype(jnp.promote_types(flat.dtype, jnp.float32)))
    if ball is balls.linf:
        return jnp.sum(flat, axis=-1)
    if ball is balls.l1:
        return jnp.max(flat, axis=-1)
    return jnp.sqrt(jnp.sum(flat**2, axis=-1))
