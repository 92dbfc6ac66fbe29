"""Gradient attacks: one step (FGSM, FGM, RAND+FGSM, step l.l.) and many (BIM, PGD).

All of them return, example by example, the best image they looked at, the clean one included:
first one that does what the attack wants, then the one with the largest loss. An image is judged
as it is returned.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.attacks import ascent
from advjax.core import balls, checks, losses, random, traits
from advjax.core.balls import Ball
from advjax.core.typing import Array, AttackLoss, Key, LogitsFn


def _loss_dtype(goal: ascent.Objective, logits_fn: LogitsFn, x: Array) -> jnp.dtype:
    return jax.eval_shape(lambda images: goal.loss(logits_fn(images)), x).dtype


def _climb_from_clean(
    goal: ascent.Objective,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    ball: Ball,
    step_size: ArrayLike,
    num_steps: int,
) -> Array:
    # The first gradient is taken at x, which judges it: no pass is spent on that alone.
    best = ascent.untouched(x, y, _loss_dtype(goal, logits_fn, x))
    return ascent.climb(
        goal, logits_fn, x, epsilon, x, best,
        ball=ball, step_size=step_size, num_steps=num_steps,
    ).x_adv  # fmt: skip


def _step_size(
    caller: str, x: Array, epsilon: ArrayLike, step_size: ArrayLike | None, relative: ArrayLike
) -> Array:
    if step_size is None:
        checks.one_or_each(caller, "relative_step_size", relative, x)
        return jnp.asarray(epsilon) * relative
    checks.one_or_each(caller, "step_size", step_size, x)
    return jnp.asarray(step_size)


@traits.declare(example_keys=True)
def fgsm(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    loss_fn: AttackLoss = losses.cross_entropy,
    targeted: bool = False,
) -> Array:
    """Fast gradient sign method: `clip(x + epsilon sign(grad loss(x, y)))`.

    Args:
      key: not used; the attack is deterministic.
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      epsilon: largest change of a pixel, such as `8 / 255`; scalar or [b].
      loss_fn: logits and labels to f32[b].
      targeted: descend the loss of `y` instead: `clip(x - epsilon sign(grad loss(x, y)))`.

    Returns:
      Adversarial images, like `x`. An image that the step would make worse for the attack than
      the clean one stays clean.

    Static: loss_fn, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> weights = jnp.array([[1.0, -1.0]])
      >>> x, y = jnp.full((1, 1, 1, 1), 0.5), jnp.array([0])
      >>> logits_fn = lambda x: (x[:, 0, 0] - 0.4) @ weights
      >>> fgsm(jax.random.key(0), logits_fn, x, y, 0.25).ravel()
      Array([0.25], dtype=float32)

    Source: I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and Harnessing Adversarial Examples",
    ICLR 2015.
    """
    del key
    x, y = checks.attack_inputs("fgsm", logits_fn, x, y, epsilon)
    return _climb_from_clean(
        ascent.objective(loss_fn, y, targeted), logits_fn, x, y, epsilon,
        ball=balls.linf, step_size=epsilon, num_steps=1,
    )  # fmt: skip


@traits.declare(example_keys=True)
def fgm(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    ball: Ball = balls.l2,
    loss_fn: AttackLoss = losses.cross_entropy,
    targeted: bool = False,
) -> Array:
    """Fast gradient method: one step of length epsilon, `clip(x + epsilon g / ||g||_2)`.

    Args:
      key: not used; the attack is deterministic.
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      epsilon: radius of the ball; scalar or [b].
      ball: the norm; `balls.linf` is `fgsm`.
      loss_fn: logits and labels to f32[b].
      targeted: descend the loss of `y` instead.

    Returns:
      Adversarial images, like `x`.

    Static: ball, loss_fn, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon.

    Source: T. Miyato, A. Dai, I. Goodfellow, "Adversarial Training Methods for Semi-Supervised
    Text Classification", ICLR 2017 (the L2 form).
    """
    del key
    balls.check("fgm", ball)
    x, y = checks.attack_inputs("fgm", logits_fn, x, y, epsilon)
    return _climb_from_clean(
        ascent.objective(loss_fn, y, targeted), logits_fn, x, y, epsilon,
        ball=ball, step_size=epsilon, num_steps=1,
    )  # fmt: skip


@traits.declare(example_keys=True)
def least_likely(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    num_steps: int = 1,
    step_size: ArrayLike | None = None,
    ball: Ball = balls.linf,
    loss_fn: AttackLoss = losses.cross_entropy,
) -> Array:
    """Least-likely class method (step l.l.): `clip(x - epsilon sign(grad loss(x, y_ll)))`.

    The target `y_ll` is the class that the network finds least likely for the clean image, the
    label `y` itself left out. An image succeeds when the network no longer answers `y`.

    Args:
      key: not used; the attack is deterministic.
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      epsilon: radius of the ball, such as `8 / 255`; scalar or [b].
      num_steps: 1 is step l.l., more is the iterative form.
      step_size: length of a step; by default epsilon for one step and 1.25 epsilon / num_steps
        for more, as in `bim`.
      ball: the norm.
      loss_fn: logits and labels to f32[b].

    Returns:
      Adversarial images, like `x`.

    Static: num_steps, ball, loss_fn.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon.

    Source: A. Kurakin, I. Goodfellow, S. Bengio, "Adversarial Machine Learning at Scale",
    ICLR 2017.
    """
    del key
    balls.check("least_likely", ball)
    x, y = checks.attack_inputs("least_likely", logits_fn, x, y, epsilon)
    checks.at_least("least_likely", "num_steps", num_steps, 1)
    logits = logits_fn(x)
    is_label = jax.nn.one_hot(y, logits.shape[-1], dtype=bool)
    target = jnp.argmin(jnp.where(is_label, jnp.inf, logits), axis=-1).astype(y.dtype)
    goal = ascent.Objective(
        ascent.objective(loss_fn, target, targeted=True).loss,
        ascent.objective(loss_fn, y, targeted=False).success,
    )
    relative = 1.0 if num_steps == 1 else 1.25 / num_steps
    return _climb_from_clean(
        goal, logits_fn, x, y, epsilon, ball=ball, num_steps=num_steps,
        step_size=_step_size("least_likely", x, epsilon, step_size, relative),
    )  # fmt: skip


@traits.declare(example_keys=True, monotone=True)
def bim(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    num_steps: int = 10,
    step_size: ArrayLike | None = None,
    relative_step_size: ArrayLike | None = None,
    ball: Ball = balls.linf,
    loss_fn: AttackLoss = losses.cross_entropy,
    targeted: bool = False,
) -> Array:
    """Basic iterative method (I-FGSM): small sign steps from the image, each clipped to the ball.

    Args:
      key: not used; the attack is deterministic.
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      epsilon: radius of the ball, such as `8 / 255`; scalar or [b].
      num_steps: number of steps.
      step_size: length of a step; scalar or [b]. It wins over `relative_step_size`.
      relative_step_size: length of a step in units of epsilon, by default `1.25 / num_steps`:
        the steps together reach a quarter beyond the ball, as the paper's do.
      ball: the norm.
      loss_fn: logits and labels to f32[b].
      targeted: descend the loss of `y` instead.

    Returns:
      Adversarial images, like `x`: the best iterate of each example.

    Static: num_steps, ball, loss_fn, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon
        or step.

    Source: A. Kurakin, I. Goodfellow, S. Bengio, "Adversarial Examples in the Physical World",
    ICLR 2017 workshop.
    """
    del key
    balls.check("bim", ball)
    x, y = checks.attack_inputs("bim", logits_fn, x, y, epsilon)
    checks.at_least("bim", "num_steps", num_steps, 1)
    relative = 1.25 / num_steps if relative_step_size is None else relative_step_size
    return _climb_from_clean(
        ascent.objective(loss_fn, y, targeted), logits_fn, x, y, epsilon,
        ball=ball, num_steps=num_steps,
        step_size=_step_size("bim", x, epsilon, step_size, relative),
    )  # fmt: skip


@traits.declare(example_keys=True)
def rand_fgsm(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    loss_fn: AttackLoss = losses.cross_entropy,
    targeted: bool = False,
) -> Array:
    """RAND+FGSM: a random sign step of alpha, then one gradient sign step of epsilon - alpha.

    `x' = clip(x + alpha sign(N(0, I)))`, `x_adv = x' + (epsilon - alpha) sign(grad loss(x', y))`.
    The random step leaves the point where gradient masking hides the slope.

    Args:
      key: a key, or one key an example [b].
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      epsilon: largest change of a pixel, such as `8 / 255`; scalar or [b].
      alpha: size of the random step, by default epsilon / 2; at most epsilon is used.
      loss_fn: logits and labels to f32[b].
      targeted: descend the loss of `y` instead.

    Returns:
      Adversarial images, like `x`.

    Static: loss_fn, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon
        or alpha.

    Source: F. Tramer et al., "Ensemble Adversarial Training: Attacks and Defenses", ICLR 2018.
    """
    x, y = checks.attack_inputs("rand_fgsm", logits_fn, x, y, epsilon)
    if alpha is not None:
        checks.one_or_each("rand_fgsm", "alpha", alpha, x)
    alpha = _step_size("rand_fgsm", x, epsilon, alpha, 0.5)
    alpha = jnp.minimum(balls.per_example(alpha, x), balls.per_example(epsilon, x))
    keys = random.example_keys(key, x.shape[0])
    noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
    start = balls.linf.project(x + alpha * jnp.sign(noise), x, epsilon)
    goal = ascent.objective(loss_fn, y, targeted)
    return ascent.climb(
        goal, logits_fn, x, epsilon, start, ascent.judge(goal, logits_fn, x),
        ball=balls.linf, num_steps=1,
        step_size=balls.per_example(epsilon, x) - alpha,
    ).x_adv  # fmt: skip


@traits.declare(example_keys=True, monotone=True)
def pgd(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    num_steps: int = 40,
    step_size: ArrayLike | None = None,
    relative_step_size: ArrayLike | None = None,
    random_start: bool = True,
    num_restarts: int = 1,
    ball: Ball = balls.linf,
    loss_fn: AttackLoss = losses.cross_entropy,
    targeted: bool = False,
) -> Array:
    """Projected gradient descent: steepest steps from a random point of the ball, with restarts.

    Args:
      key: a key, or one key an example [b].
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      epsilon: radius of the ball, such as `8 / 255`; scalar or [b].
      num_steps: number of steps.
      step_size: length of a step in the norm of the ball; scalar or [b]. It wins over
        `relative_step_size`.
      relative_step_size: length of a step in units of epsilon, by default `2.5 / num_steps`, so
        that every point of the ball can be reached from every other.
      random_start: start uniformly in the ball, not at the image.
      num_restarts: number of starts; each example keeps its best image over all of them.
      ball: `balls.linf`, `balls.l2` or `balls.l1`.
      loss_fn: logits and labels to f32[b].
      targeted: descend the loss of `y` instead.

    Returns:
      Adversarial images, like `x`: the best iterate of each example.

    Static: num_steps, random_start, num_restarts, ball, loss_fn, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon
        or step, several restarts from one and the same start.

    Source: A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks",
    ICLR 2018.
    """
    balls.check("pgd", ball)
    x, y = checks.attack_inputs("pgd", logits_fn, x, y, epsilon)
    checks.at_least("pgd", "num_steps", num_steps, 1)
    checks.at_least("pgd", "num_restarts", num_restarts, 1)
    if num_restarts > 1 and not random_start:
        raise ValueError(
            f"pgd: restarts need random_start=True, got num_restarts={num_restarts} without it."
        )
    goal = ascent.objective(loss_fn, y, targeted)
    relative = 2.5 / num_steps if relative_step_size is None else relative_step_size
    step_size = _step_size("pgd", x, epsilon, step_size, relative)
    if not random_start:
        return _climb_from_clean(
            goal, logits_fn, x, y, epsilon, ball=ball, step_size=step_size, num_steps=num_steps
        )
    keys = random.example_keys(key, x.shape[0])

    def restart(number, best):
        start_keys = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)
        start = ball.uniform(start_keys, x, epsilon)
        return ascent.climb(
            goal, logits_fn, x, epsilon, start, best,
            ball=ball, step_size=step_size, num_steps=num_steps,
        )  # fmt: skip

    clean = ascent.judge(goal, logits_fn, x)
    if num_restarts == 1:
        return restart(0, clean).x_adv
    return jax.lax.fori_loop(0, num_restarts, restart, clean).x_adv
