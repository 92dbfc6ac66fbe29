"""Universal perturbations: one change of the pixels that fools a network on most images."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.attacks import ascent
from advjax.attacks.linearisation import deepfool
from advjax.core import balls, checks, losses, metrics, random
from advjax.core.balls import Ball
from advjax.core.typing import Array, AttackLoss, Key, LogitsFn

# The share of fooled images at which each form stops by default: the published 1 - 0.2, or never.
_TARGET_RATES = {"sgd": 1.0, "deepfool": 0.8}


def universal(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    ball: Ball = balls.linf,
    method: str = "sgd",
    num_epochs: int = 10,
    target_rate: ArrayLike | None = None,
    batch_size: int = 128,
    step_size: ArrayLike | None = None,
    loss_fn: AttackLoss = losses.cross_entropy,
    max_loss: ArrayLike = 9.0,
    num_steps: int = 10,
    overshoot: ArrayLike = 0.02,
    num_candidates: int = 10,
) -> Array:
    """One perturbation for all images: `clip(x + delta, 0, 1)` is answered unlike `x`.

    - "sgd" climbs the loss of the labels, cut at `max_loss` so that images fooled already do not
      take over: `delta <- project(delta + step_size direction(mean_i grad min(loss_i, max_loss)))`
      over shuffled minibatches, the step falling to zero linearly.
    - "deepfool", as published first, visits the images one by one in shuffled order and skips those
      that are fooled. For another it adds the change in l2, whatever `ball` is, that takes
      `clip(x + delta, 0, 1)` over the nearest boundary, if DeepFool reaches one, and projects. It
      asks the network for its answers and does not look at the labels.

    After each pass the share of all images that are fooled is measured, against the network's own
    answers. The best perturbation over the passes is returned, the zero one before the first pass
    included. Logits that are not finite never count as fooled.

    Args:
      key: a key, for the order of the images.
      logits_fn: classifier, images to logits f32[b, k].
      x: images that it is fitted to, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
      epsilon: radius of the ball, a scalar: `10 / 255` on ImageNet (Moosavi-Dezfooli et al.), 0.3
        on MNIST and 0.1 on CIFAR-10 (Ling et al., DEEPSEC, S&P 2019), all in linf.
      ball: the norm.
      method: "sgd" or "deepfool".
      num_epochs: passes over the images, at most.
      target_rate: share of fooled images at which the passes end; by default 0.8 for "deepfool", as
        published, and 1 for "sgd".
      batch_size: images a step of "sgd"; both forms measure in batches of this size.
      step_size: first step of "sgd" in the norm of the ball; by default epsilon / 4.
      loss_fn: logits and labels to f32[b], for "sgd".
      max_loss: where "sgd" cuts the loss; infinity does not.
      num_steps: steps of each DeepFool.
      overshoot: how much further than the boundary "deepfool" goes.
      num_candidates: classes that each DeepFool looks at.

    Returns:
      The perturbation f32[h, w, c], of norm at most epsilon. Use it as `clip(x + delta, 0, 1)`; an
      image that is exactly in the ball, also after `x + delta` is rounded, is
      `ball.project(x + delta, x, epsilon)`.

    Static: ball, method, num_epochs, batch_size, loss_fn, num_steps, num_candidates.

    Raises:
      ValueError: images that are not floats in [0, 1] or none at all, labels that are not classes,
        an epsilon that is bad or not one, an unknown method, a bad count, step or rate.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> weights = jnp.array([[1.0, -1.0]])
      >>> x, y = jnp.array([0.5, 0.6]).reshape(2, 1, 1, 1), jnp.array([0, 0])
      >>> logits_fn = lambda x: (x[:, 0, 0] - 0.4) @ weights
      >>> universal(jax.random.key(0), logits_fn, x, y, 0.25).ravel()  # both are fooled by 0.2
      Array([-0.2125], dtype=float32)

    Source: S.-M. Moosavi-Dezfooli, A. Fawzi, O. Fawzi, P. Frossard, "Universal Adversarial
    Perturbations", CVPR 2017 ("deepfool"); A. Shafahi, M. Najibi, Z. Xu, J. Dickerson, L. Davis,
    T. Goldstein, "Universal Adversarial Training", AAAI 2020 ("sgd").
    """
    balls.check("universal", ball)
    key = random.as_typed(key)
    x, y = checks.attack_inputs("universal", logits_fn, x, y, epsilon)
    if jnp.ndim(epsilon) != 0:
        raise ValueError(
            f"universal: need one epsilon for all images, got shape {jnp.shape(epsilon)}."
        )
    if x.shape[0] == 0:
        raise ValueError("universal: need at least one image, got none.")
    checks.known("universal", "method", method, _TARGET_RATES)
    for name, count in (
        ("num_epochs", num_epochs), ("batch_size", batch_size), ("num_steps", num_steps),
    ):  # fmt: skip
        checks.at_least("universal", name, count, 1)
    target_rate = _TARGET_RATES[method] if target_rate is None else target_rate
    for name, value in (
        ("target_rate", target_rate), ("overshoot", overshoot),
        ("step_size", 0 if step_size is None else step_size),
    ):  # fmt: skip
        checks.non_negative("universal", name, value)
    # A perturbation in short floats would leave the ball when it is rounded.
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    epsilon = jnp.asarray(epsilon, dtype)
    project = functools.partial(_project, ball, epsilon)
    zero = jnp.zeros(x.shape[1:], dtype)
    answers_to = functools.partial(_answers, logits_fn, x, batch_size=batch_size)
    answers = answers_to(zero)
    if method == "sgd":
        step_size = epsilon / 4 if step_size is None else jnp.asarray(step_size, dtype)
        step_sizes = step_size * (1 - jnp.arange(num_epochs) / num_epochs)
        one_pass = functools.partial(
            _climb, logits_fn, x, y, project, step_sizes,
            ball=ball, batch_size=batch_size,
            loss_fn=lambda logits, labels: jnp.minimum(loss_fn(logits, labels), max_loss),
        )  # fmt: skip
    else:
        one_pass = functools.partial(
            _visit, logits_fn, x, answers, project,
            num_steps=num_steps, overshoot=overshoot, num_candidates=num_candidates,
        )  # fmt: skip

    def go_on(carry: _Passes, epoch: Array) -> _Passes:
        delta = one_pass(jax.random.fold_in(key, epoch), carry.delta, epoch)
        rate = jnp.mean(metrics.has_changed(answers, answers_to(delta)), dtype=dtype)
        wins = rate > carry.rate
        return _Passes(delta, jnp.where(wins, delta, carry.best), jnp.maximum(rate, carry.rate))

    def epoch(carry: _Passes, number: Array) -> tuple[_Passes, None]:
        is_done = carry.rate >= target_rate
        return jax.lax.cond(is_done, lambda carry, _: carry, go_on, carry, number), None

    start = _Passes(delta=zero, best=zero, rate=jnp.zeros((), dtype))
    return jax.lax.scan(epoch, start, jnp.arange(num_epochs))[0].best


class _Passes(NamedTuple):
    """Where the passes stand: the perturbation, the best one so far, the share that it fools."""

    delta: Array
    best: Array
    rate: Array


def _climb(
    logits_fn, x, y, project, step_sizes, key, delta, epoch, *, ball, batch_size, loss_fn
) -> Array:
    """One pass of "sgd": a step of steepest ascent a minibatch."""

    def step(delta: Array, index: Array) -> tuple[Array, None]:
        goal = ascent.objective(loss_fn, y[index], targeted=False)
        slope = _slope(goal, logits_fn, x[index], delta)[None]
        # 0.5: a perturbation has no box, so every pixel of it can move.
        direction = ball.direction(slope, jnp.full_like(slope, 0.5))[0]
        return project(delta + step_sizes[epoch] * direction), None

    return jax.lax.scan(step, delta, _in_batches(jax.random.permutation(key, len(x)), batch_size))[
        0
    ]


def _visit(
    logits_fn, x, answers, project, key, delta, epoch, *, num_steps, overshoot, num_candidates
) -> Array:
    """One pass of "deepfool": a push for every image that is not fooled yet."""
    del epoch
    key_order, key_attack = jax.random.split(key)

    def look(delta: Array, index: Array) -> tuple[Array, None]:
        image, answer = _shifted(x[index], delta)[None], answers[index][None]

        def push(delta: Array) -> Array:
            found = deepfool(
                key_attack, logits_fn, image, answer,
                num_steps=num_steps, num_candidates=num_candidates,
            )  # fmt: skip
            # Its image lies on the boundary; the published step goes beyond it.
            pushed = project(delta + (1 + overshoot) * (found.x_adv - image)[0])
            return jnp.where(found.success[0], pushed, delta)

        is_held = (metrics.predictions(logits_fn(image)) == answer) & (answer >= 0)
        return jax.lax.cond(is_held[0], push, lambda delta: delta, delta), None

    return jax.lax.scan(look, delta, jax.random.permutation(key_order, len(x)))[0]


def _in_batches(order: Array, batch_size: int) -> Array:
    """Indices as int32[batches, batch]; the last batch is filled up with the first of them."""
    batch_size = min(batch_size, len(order))
    return jnp.resize(order, (math.ceil(len(order) / batch_size), batch_size))


def _shifted(x: Array, delta: Array) -> Array:
    return jnp.clip(x + delta, 0, 1).astype(x.dtype)


def _answers(logits_fn: LogitsFn, x: Array, delta: Array, *, batch_size: int) -> Array:
    """What the network answers to all images with the perturbation, int32[n]."""

    def answer(index: Array) -> Array:
        return metrics.predictions(logits_fn(_shifted(x[index], delta)))

    return jax.lax.map(answer, _in_batches(jnp.arange(len(x)), batch_size)).reshape(-1)[: len(x)]


def _slope(goal: ascent.Objective, logits_fn: LogitsFn, x: Array, delta: Array) -> Array:
    """Gradient of the sum of the losses in the perturbation, f32[h, w, c]."""
    images = _shifted(x, delta)
    _, gradient = ascent.judge_with_gradient(goal, logits_fn, images)
    # A pixel at the edge of the box that would leave it does not change its image.
    has_room = jnp.where(gradient > 0, images < 1, images > 0)
    return jnp.sum(jnp.where(has_room, gradient, 0).astype(delta.dtype), axis=0)


def _project(ball: Ball, epsilon: Array, delta: Array) -> Array:
    """Nearest perturbation in the ball, in its norm as exact arithmetic measures it."""
    if ball.name != "linf":
        # Sums over the pixels and the division by them round.
        epsilon = epsilon * (1 - float(jnp.finfo(delta.dtype).eps) * (4 + math.sqrt(delta.size)))
    return ball.shrink(delta[None], jnp.broadcast_to(epsilon, (1,) * (delta.ndim + 1)))[0]
