"""Attacks that estimate the gradient from values of the loss: NES and SPSA."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.attacks import ascent, queries
from advjax.core import balls, checks, losses, random, traits
from advjax.core.balls import Ball
from advjax.core.typing import Array, AttackLoss, Key, LogitsFn

# (key, shape) to f32[shape]: random directions whose coordinates are independent, of variance 1.
_Directions = Callable[[Key, tuple[int, ...]], Array]


def _climb(
    caller: str,
    directions: _Directions,
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    num_steps: int,
    num_samples: int,
    sigma: ArrayLike,
    step_size: ArrayLike | None,
    ball: Ball,
    loss_fn: AttackLoss,
    targeted: bool,
) -> Array:
    """Projected steepest ascent along `mean_i (loss(x + sigma u_i) - loss(x - sigma u_i)) u_i`."""
    balls.check(caller, ball)
    x, y = checks.attack_inputs(caller, logits_fn, x, y, epsilon)
    checks.at_least(caller, "num_steps", num_steps, 1)
    checks.at_least(caller, "num_samples", num_samples, 2)
    if num_samples % 2:
        raise ValueError(
            f"{caller}: need an even num_samples, since directions come with their opposites, got "
            f"num_samples={num_samples}."
        )
    checks.non_negative(caller, "sigma", sigma)
    if jnp.ndim(sigma):
        raise ValueError(f"{caller}: need one sigma for all images, got shape {jnp.shape(sigma)}.")
    if step_size is None:
        step_size = 2.5 / num_steps * jnp.asarray(epsilon)
    else:
        checks.one_or_each(caller, "step_size", step_size, x)
    goal = queries.objective(loss_fn, y, targeted)
    step_size = balls.per_example(step_size, x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    num_pairs = num_samples // 2
    keys = random.example_keys(key, x.shape[0])

    def look(number: Array, x_adv: Array) -> tuple[ascent.Judged, Array]:
        """Judges images and estimates their gradients, in one call of the classifier."""
        keys_now = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)
        u = jax.vmap(lambda k: directions(k, (num_pairs, *x.shape[1:])))(keys_now).astype(wide)
        here = x_adv[:, None]
        # What is asked about is an image too: in [0, 1] and of the dtype of the images.
        nearby = [jnp.clip(here + sign * sigma * u, 0, 1).astype(x.dtype) for sign in (1, -1)]
        success, loss = queries.judge(goal, logits_fn, jnp.concatenate([here, *nearby], axis=1))
        slope = loss[:, 1 : 1 + num_pairs] - loss[:, 1 + num_pairs :]
        slope = jnp.where(jnp.isfinite(slope), slope, 0)
        gradient = jnp.einsum("bn,bn...->b...", slope, u)
        return ascent.Judged(x_adv, success[:, 0], loss[:, 0]), gradient

    def step(number, carry):
        x_adv, best = carry
        judged, gradient = look(number, x_adv)
        moved = x_adv + step_size * ball.direction(gradient, x_adv).astype(x.dtype)
        return ball.project(moved, x, epsilon), ascent.better(judged, best)

    best = ascent.untouched(x, y, jax.eval_shape(look, 0, x)[0].loss.dtype)
    x_adv, best = jax.lax.fori_loop(0, num_steps, step, (x, best))
    return ascent.better(ascent.judge(goal, logits_fn, x_adv), best).x_adv


@traits.declare(example_keys=True)
def nes(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    num_steps: int = 100,
    num_samples: int = 50,
    sigma: ArrayLike = 1e-3,
    step_size: ArrayLike | None = None,
    ball: Ball = balls.linf,
    loss_fn: AttackLoss = losses.cross_entropy,
    targeted: bool = False,
) -> Array:
    """PGD with a gradient that natural evolution strategies estimate from values of the loss.

    `g = sum_i (loss(x + sigma u_i) - loss(x - sigma u_i)) u_i / (2 sigma n)` with `u_i ~ N(0, I)`;
    its length does not matter to the steepest step. An image asks the classifier
    `num_steps * (num_samples + 1) + 1` times, which counts the judging of every iterate.

    Args:
      key: a key, or one key an example [b].
      logits_fn: classifier, images to logits f32[b, k]; it is never differentiated.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      epsilon: radius of the ball, such as `8 / 255`; scalar or [b].
      num_steps: number of steps from the image.
      num_samples: images asked about for each gradient; half of them are opposites of the others.
      sigma: standard deviation of the directions, in units of a pixel; 0 finds no gradient and
        gives the image back. Points outside of [0, 1] are moved into it, which halves the
        estimate for a pixel at the end and keeps its sign.
      step_size: length of a step in the norm of the ball, scalar or [b]; by default
        2.5 epsilon / num_steps, as in `pgd`.
      ball: `balls.linf`, `balls.l2` or `balls.l1`.
      loss_fn: logits and labels to f32[b].
      targeted: descend the loss of `y` instead.

    Returns:
      Adversarial images, like `x`: the best iterate of each example. Logits that are not finite
      are never a success.

    Static: num_steps, num_samples, ball, loss_fn, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon,
        step or sigma, an odd number of samples, a budget of nothing.

    Source: A. Ilyas, L. Engstrom, A. Athalye, J. Lin, "Black-box Adversarial Attacks with Limited
    Queries and Information", ICML 2018.
    """
    return _climb(
        "nes", jax.random.normal, key, logits_fn, x, y, epsilon, num_steps=num_steps,
        num_samples=num_samples, sigma=sigma, step_size=step_size, ball=ball, loss_fn=loss_fn,
        targeted=targeted,
    )  # fmt: skip


@traits.declare(example_keys=True)
def spsa(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    num_steps: int = 100,
    num_samples: int = 128,
    sigma: ArrayLike = 1e-2,
    step_size: ArrayLike | None = None,
    ball: Ball = balls.linf,
    loss_fn: AttackLoss = losses.margin,
    targeted: bool = False,
) -> Array:
    """PGD with a gradient by simultaneous perturbation: every pixel moves by sigma, up or down.

    `g = sum_i (loss(x + sigma v_i) - loss(x - sigma v_i)) v_i / (2 sigma n)` with Rademacher signs
    `v_i`. The paper climbs with Adam; here the step is that of `pgd`, as in `nes`. Queries are
    counted as there.

    Args:
      key: a key, or one key an example [b].
      logits_fn: classifier, images to logits f32[b, k]; it is never differentiated.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      epsilon: radius of the ball, such as `8 / 255`; scalar or [b].
      num_steps: number of steps from the image.
      num_samples: images asked about for each gradient; half of them are opposites of the others.
      sigma: how far every pixel moves.
      step_size: length of a step in the norm of the ball, scalar or [b]; by default
        2.5 epsilon / num_steps.
      ball: `balls.linf`, `balls.l2` or `balls.l1`.
      loss_fn: logits and labels to f32[b]; the paper's is the margin.
      targeted: descend the loss of `y` instead.

    Returns:
      Adversarial images, like `x`: the best iterate of each example. Logits that are not finite
      are never a success.

    Static: num_steps, num_samples, ball, loss_fn, targeted.

    Raises:
      ValueError: what `nes` raises.

    Source: J. Uesato, B. O'Donoghue, A. van den Oord, P. Kohli, "Adversarial Risk and the Dangers
    of Evaluating Against Weak Attacks", ICML 2018.
    """
    return _climb(
        "spsa", jax.random.rademacher, key, logits_fn, x, y, epsilon, num_steps=num_steps,
        num_samples=num_samples, sigma=sigma, step_size=step_size, ball=ball, loss_fn=loss_fn,
        targeted=targeted,
    )  # fmt: skip
