"""Decoupled direction and norm: the fast l2 attack."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from advjax.attacks import nearest
from advjax.core import balls, checks, traits
from advjax.core.balls import per_example
from advjax.core.typing import Array, Key, LogitsFn, MinNorm


@traits.declare(example_keys=True)
def ddn(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    num_steps: int = 100,
    initial_radius: ArrayLike = 1.0,
    shrink: ArrayLike = 0.05,
    targeted: bool = False,
) -> MinNorm:
    """DDN: gradient steps on a sphere whose radius falls after a success and grows after a failure.

    `delta <- delta + a g / ||g||`, then `delta <- r delta / ||delta||` and into the box, with
    `r <- (1 - shrink) r` where the last image was adversarial and `(1 + shrink) r` where not; the
    step a falls from 1 to 0.01 along a cosine.

    Args:
      key: not used; the attack is deterministic.
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      num_steps: number of steps.
      initial_radius: the first radius; scalar or [b].
      shrink: relative change of the radius in a step.
      targeted: whether `y` are targets.

    Returns:
      `MinNorm`, with l2 distances.

    Static: num_steps, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a negative
        number.

    Source: J. Rony et al., "Decoupling Direction and Norm for Efficient Gradient-Based L2
    Adversarial Attacks and Defenses", CVPR 2019.
    """
    del key
    x, y = checks.min_norm_inputs("ddn", logits_fn, x, y)
    checks.at_least("ddn", "num_steps", num_steps, 1)
    checks.one_or_each("ddn", "initial_radius", initial_radius, x)
    checks.non_negative("ddn", "shrink", shrink)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    excess = nearest.search_excess(y, targeted)
    length = optax.cosine_decay_schedule(1.0, num_steps, alpha=0.01)
    sign = -1 if targeted else 1

    def ascended(images):
        logits = logits_fn(images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.sum(jnp.where(jnp.isfinite(loss), loss, 0)), excess(logits) > 0

    def step(carry, number):
        delta, radius, found = carry
        x_adv = balls.rounded(jnp.clip(wide + delta, 0, 1), x.dtype)
        gradient, success = jax.grad(ascended, has_aux=True)(x_adv)
        found = nearest.nearer(found, x_adv, nearest.distance(balls.l2, x_adv, x), success)
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0).astype(wide.dtype)
        delta = delta + sign * length(number) * balls.l2.direction(gradient, x)
        radius = radius * jnp.where(success, 1 - shrink, 1 + shrink)
        size = balls.l2.norm(delta)
        delta = delta * per_example(radius / jnp.where(size > 0, size, 1), wide)
        return (jnp.clip(wide + delta, 0, 1) - wide, radius, found), None

    with jax.default_matmul_precision("highest"):
        found = nearest.start(logits_fn(x), x, y, targeted)
        radius = jnp.sum(wide, axis=(1, 2, 3)) * 0 + jnp.asarray(initial_radius, wide.dtype)
        carry = wide * 0, radius, found
        (_, _, found), _ = jax.lax.scan(step, carry, jnp.arange(num_steps))
        return nearest.finish(logits_fn, x, y, found, ball=balls.l2, targeted=targeted)
