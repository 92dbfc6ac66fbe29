"""The loop behind every gradient attack: step, project, and remember each example's best image."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.core import metrics
from advjax.core.balls import Ball, per_example
from advjax.core.typing import Array, AttackLoss, LogitsFn


class Judged(NamedTuple):
    """Images and what the attack thinks of them.

    Attributes:
      x_adv: images, [b, h, w, c].
      success: whether each does what the attack wants, bool[b].
      loss: what the attack ascends, f32[b]; minus infinity where it is not a number.
    """

    x_adv: Array
    success: Array
    loss: Array


class Objective(NamedTuple):
    """What an attack wants of the logits.

    Attributes:
      loss: logits to f32[b], ascended.
      success: logits to bool[b].
    """

    loss: Callable[[Array], Array]
    success: Callable[[Array], Array]


def objective(loss_fn: AttackLoss, y: Array, targeted: bool) -> Objective:
    """Ascend the loss of the label until it is not the answer; or descend that of the target."""
    if targeted:
        return Objective(
            lambda logits: -loss_fn(logits, y), lambda logits: metrics.is_correct(logits, y)
        )
    return Objective(lambda logits: loss_fn(logits, y), lambda logits: metrics.is_fooled(logits, y))


def _judged(x_adv: Array, success: Array, loss: Array) -> Judged:
    return Judged(x_adv, success, jnp.where(jnp.isnan(loss), -jnp.inf, loss))


def judge(goal: Objective, logits_fn: LogitsFn, x_adv: Array) -> Judged:
    """Evaluates images without a gradient."""
    logits = logits_fn(x_adv)
    return _judged(x_adv, goal.success(logits), goal.loss(logits))


def judge_with_gradient(goal: Objective, logits_fn: LogitsFn, x_adv: Array) -> tuple[Judged, Array]:
    """Evaluates images, and the gradient of each one's loss in its own pixels."""

    def total(images: Array) -> tuple[Array, tuple[Array, Array]]:
        logits = logits_fn(images)
        loss = goal.loss(logits)
        # A sum, so that examples do not scale each other's gradient.
        return jnp.sum(loss), (goal.success(logits), loss)

    (_, (success, loss)), gradient = jax.value_and_grad(total, has_aux=True)(x_adv)
    return _judged(x_adv, success, loss), jnp.where(jnp.isfinite(gradient), gradient, 0)


def untouched(x: Array, y: Array, loss_dtype: jnp.dtype) -> Judged:
    """The clean images before any judgement, so that whatever is judged replaces them.

    Built from `x` and `y`, so that under `shard_map` it varies over the devices as they do.
    """
    return Judged(x, y != y, y.astype(loss_dtype) * 0 - jnp.inf)


def better(candidate: Judged, incumbent: Judged) -> Judged:
    """Example by example the better of two: first by success, then by loss."""
    wins = (candidate.success & ~incumbent.success) | (
        (candidate.success == incumbent.success) & (candidate.loss > incumbent.loss)
    )
    return Judged(
        jnp.where(per_example_mask(wins, candidate.x_adv), candidate.x_adv, incumbent.x_adv),
        jnp.where(wins, candidate.success, incumbent.success),
        jnp.where(wins, candidate.loss, incumbent.loss),
    )


def per_example_mask(mask: Array, x: Array) -> Array:
    """bool[b] shaped to broadcast against images [b, ...]."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - 1))


def climb(
    goal: Objective,
    logits_fn: LogitsFn,
    x: Array,
    epsilon: ArrayLike,
    start: Array,
    best: Judged,
    *,
    ball: Ball,
    step_size: ArrayLike,
    num_steps: int,
) -> Judged:
    """Projected steepest ascent from `start`.

    Args:
      goal: what to ascend.
      logits_fn: the classifier.
      x: clean images, [b, h, w, c].
      epsilon: radius, scalar or [b].
      start: images inside the ball around `x`.
      best: what there is already; it is only ever replaced by something better.
      ball: the ball and its steepest direction.
      step_size: length of a step in the norm of the ball, scalar or [b].
      num_steps: number of gradient steps.

    Returns:
      The best of `best`, `start` and every iterate, example by example.
    """
    step_size = per_example(step_size, x)

    def step(_, carry):
        x_adv, best = carry
        here, gradient = judge_with_gradient(goal, logits_fn, x_adv)
        x_adv = ball.project(x_adv + step_size * ball.direction(gradient, x_adv), x, epsilon)
        return x_adv, better(here, best)

    # One step is no loop: XLA compiles what is outside of loops better.
    carry = (start, best)
    carry = step(0, carry) if num_steps == 1 else jax.lax.fori_loop(0, num_steps, step, carry)
    x_adv, best = carry
    return better(judge(goal, logits_fn, x_adv), best)
