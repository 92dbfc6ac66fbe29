"""DeepFool: step by step to the nearest boundary, as if the classifier were linear."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.attacks import nearest
from advjax.attacks.ascent import per_example_mask
from advjax.core import balls, checks, traits
from advjax.core.balls import Ball, per_example
from advjax.core.typing import Array, Key, LogitsFn, MinNorm

# So that a step does not end on the boundary itself; in units of logits.
_BEYOND = 1e-4

# Images that a processor advances together; an accelerator advances all.
_AT_A_TIME = 16


@traits.declare(example_keys=True)
def deepfool(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    num_steps: int = 50,
    overshoot: ArrayLike = 0.02,
    num_candidates: int = 10,
    ball: Ball = balls.l2,
) -> MinNorm:
    """DeepFool: the sum of steps to the nearest of the linearised boundaries, a little further.

    With `f_k = z_k - z_y` and `w_k` its gradient, the nearest class has the least `|f| / ||w||_q`.
    A step goes that far along `w` (l2) or its signs (linf). The image looked at is always
    `clip(x + (1 + overshoot) r)` with `r` the sum of all steps. Where the network's answer is not
    `y` to begin with, the image itself is the result, at distance 0.

    Args:
      key: not used; the attack is deterministic.
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      num_steps: most steps; the loop ends when all images are done.
      overshoot: how much further than the boundary.
      num_candidates: the likeliest classes of the clean image, the label included, that are looked
        at.
      ball: `balls.l2` or `balls.linf`.

    Returns:
      `MinNorm`: the first image that crossed a boundary, brought back to it (`nearest.finish`).

    Static: num_steps, num_candidates, ball.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a norm that
        the attack does not have.

    Source: S. Moosavi-Dezfooli, A. Fawzi, P. Frossard, "DeepFool: a Simple and Accurate Method to
    Fool Deep Neural Networks", CVPR 2016.
    """
    del key
    x, y = checks.min_norm_inputs("deepfool", logits_fn, x, y)
    balls.check("deepfool", ball, "l2", "linf")
    checks.at_least("deepfool", "num_steps", num_steps, 1)
    checks.at_least("deepfool", "num_candidates", num_candidates, 2)
    checks.non_negative("deepfool", "overshoot", overshoot)

    def look(x, total):
        moved = x.astype(total.dtype) + (1 + overshoot) * total
        return balls.rounded(jnp.clip(moved, 0, 1), x.dtype)

    with jax.default_matmul_precision("highest"):
        clean = logits_fn(x)
        found = nearest.start(clean, x, y, targeted=False)
        num_others = min(num_candidates, clean.shape[-1]) - 1
        is_label = jax.nn.one_hot(y, clean.shape[-1], dtype=bool)
        _, classes = jax.lax.top_k(jnp.where(is_label, -jnp.inf, clean), num_others)

        size = min(x.shape[0], _AT_A_TIME if jax.default_backend() == "cpu" else x.shape[0])

        def advance(x, y, classes, total, found):
            """One step of some images: the next sum of steps, what was found, who goes on."""
            x_adv = look(x, total)
            logits, gaps, normals = nearest.candidates(logits_fn, x_adv, y, classes)
            success = nearest.search_excess(y, targeted=False)(logits) > 0
            found = nearest.nearer(found, x_adv, nearest.distance(ball, x_adv, x), success)
            gap, normal, slope = nearest.closest(gaps, normals, ball)
            length = (jnp.abs(gap) + _BEYOND) / jnp.where(slope > 0, slope, 1)
            along = jnp.sign(normal) if ball is balls.linf else _unit(normal, slope)
            move = (along * per_example(length, x)).astype(total.dtype)
            goes_on = ~success & (slope > 0) & jnp.all(jnp.isfinite(logits), axis=-1)
            return total + jnp.where(per_example_mask(goes_on, x), move, 0), found, goes_on

        # A queue: each turn advances the images that have had the fewest steps. One stubborn image
        # does not make all others go with it, step after step.
        def turn(carry):
            num_done, total, found, is_open = carry
            rows = jnp.argsort(jnp.where(is_open, num_done, num_steps + 1))[:size]
            take = lambda tree: jax.tree.map(lambda leaf: leaf[rows], tree)  # noqa: E731
            state = take((total, found))
            after, found_after, goes_on = advance(x[rows], y[rows], classes[rows], *state)
            # Rows that are not open only fill the batch.
            active = is_open[rows]
            keep = lambda new, old: jnp.where(per_example_mask(active, new), new, old)  # noqa: E731
            total, found = jax.tree.map(
                lambda leaf, new, old: leaf.at[rows].set(keep(new, old)),
                (total, found), (after, found_after), state,
            )  # fmt: skip
            num_done = num_done.at[rows].add(active)
            is_open = is_open.at[rows].set(active & goes_on) & (num_done < num_steps)
            return num_done, total, found, is_open

        total = jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32))
        carry = jnp.zeros_like(y, jnp.int32), total, found, ~found.success
        _, total, found, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[3]), turn, carry)
        x_adv = look(x, total)
        success = nearest.search_excess(y, targeted=False)(logits_fn(x_adv)) > 0
        found = nearest.nearer(found, x_adv, nearest.distance(ball, x_adv, x), success)
        return nearest.finish(logits_fn, x, y, found, ball=ball, num_halvings=4)


def _unit(normal: Array, size: Array) -> Array:
    return normal / jnp.where(size > 0, size, 1).reshape(-1, 1, 1, 1)
