"""What the black-box attacks share: many variants of each image in one call of the classifier."""

import math

import jax
import jax.numpy as jnp

from advjax.attacks import ascent
from advjax.core import metrics
from advjax.core.typing import Array, AttackLoss, LogitsFn


def objective(loss_fn: AttackLoss, y: Array, targeted: bool) -> ascent.Objective:
    """The objective of the gradient attacks, in which every answer is better than none.

    Logits that are not finite are no answer, whatever loss an infinite one would give.
    """
    goal = ascent.objective(loss_fn, y, targeted)

    def loss(logits: Array) -> Array:
        return jnp.where(metrics.predictions(logits) >= 0, goal.loss(logits), -jnp.inf)

    return ascent.Objective(loss, goal.success)


def ask(logits_fn: LogitsFn, variants: Array) -> Array:
    """Logits of several variants of each image, in one call of the classifier.

    Args:
      logits_fn: classifier.
      variants: images, [b, n, h, w, c].

    Returns:
      [b, n, k].
    """
    b, n = variants.shape[:2]
    logits = logits_fn(variants.reshape(b * n, *variants.shape[2:]))
    return logits.reshape(b, n, math.prod(logits.shape[1:]))


def judge(goal: ascent.Objective, logits_fn: LogitsFn, variants: Array) -> tuple[Array, Array]:
    """Success bool[b, n] and loss f32[b, n] of variants of each image, [b, n, h, w, c]."""
    return judge_answers(goal, ask(logits_fn, variants))


def judge_answers(goal: ascent.Objective, logits: Array) -> tuple[Array, Array]:
    """Success bool[b, n] and loss f32[b, n] of logits of variants of each image, [b, n, k]."""
    success, loss = (jax.vmap(f, in_axes=1, out_axes=1)(logits) for f in (goal.success, goal.loss))
    return success, jnp.where(jnp.isnan(loss), -jnp.inf, loss)


def pick(values: Array, index: Array) -> Array:
    """For each example the entry of that index: [b, n, ...] and int32[b] to [b, ...]."""
    return jax.vmap(lambda row, i: row[i])(values, index)
