"""Auto-PGD: projected gradient ascent that finds its own step size.

Like all attacks here it returns, example by example, the best image that it looked at.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.attacks import ascent
from advjax.attacks.ascent import Judged, Objective, per_example_mask
from advjax.core import balls, checks, losses, random, traits
from advjax.core.balls import Ball, per_example
from advjax.core.typing import Array, AttackLoss, Key, LogitsFn

_MOMENTUM = 0.75  # weight of the new step
_ENOUGH = 0.75  # share of the steps of a window that must increase the loss
_FIRST_DENSITY = 0.2  # l1: share of the pixels that the first steps move


class _State(NamedTuple):
    """The carry of the ascent; `top` is where the loss was largest, whatever the answer there.

    Attributes:
      x_adv, previous: the iterate and the one before, [b, h, w, c].
      gradient: of the loss at `x_adv`.
      loss: at `x_adv`, f32[b].
      top, top_gradient, top_loss: the same where the loss was largest so far.
      step_size: f32[b].
      num_increases: steps since the last checkpoint that increased the loss, int32[b].
      checked_loss: `top_loss` at the last checkpoint, f32[b].
      was_reduced: whether the last checkpoint reduced the step, bool[b].
      density: l1: share of the pixels that a step moves, f32[b].
      num_moved: l1: moved pixels of `top` at the last checkpoint, f32[b].
      found: the best image for the attack.
    """

    x_adv: Array
    previous: Array
    gradient: Array
    loss: Array
    top: Array
    top_gradient: Array
    top_loss: Array
    step_size: Array
    num_increases: Array
    checked_loss: Array
    was_reduced: Array
    density: Array
    num_moved: Array
    found: Judged


def checkpoints(num_steps: int) -> tuple[int, ...]:
    """Steps after which the step size is reconsidered: 22, 41, 57, 70, ... of 100.

    Windows of 22 % of the steps, each 3 % shorter than the one before, down to 6 %.

    Args:
      num_steps: number of steps.
    """
    window, shortest = max(int(0.22 * num_steps), 1), max(int(0.06 * num_steps), 1)
    shorter = max(int(0.03 * num_steps), 1)
    steps, last = [], 0
    while last + window <= num_steps:
        last += window
        steps.append(last)
        window = max(window - shorter, shortest)
    return tuple(steps)


def _l1_checkpoints(num_steps: int) -> tuple[int, ...]:
    window = max(int(0.04 * num_steps), 1)
    return tuple(range(window, num_steps + 1, window))


def _num_moved(x_adv: Array, x: Array) -> Array:
    """How many pixels differ, int32[b]."""
    return jnp.sum((x_adv - x).reshape(x.shape[0], -1) != 0, axis=-1)


def _densest(gradient: Array, density: Array) -> Array:
    """The gradient's signs where it is among the largest `density` share of the pixels, else 0."""
    size = jnp.abs(gradient).reshape(gradient.shape[0], -1)
    rank = jnp.clip(jnp.floor((1 - density) * size.shape[1]), 0, size.shape[1] - 1)
    least = jnp.take_along_axis(jnp.sort(size, axis=-1), rank.astype(jnp.int32)[:, None], axis=-1)
    signs = jnp.where(size >= least, jnp.sign(gradient.reshape(size.shape)), 0)
    return signs.reshape(gradient.shape)


def _project(ball: Ball, x_adv: Array, x: Array, epsilon: ArrayLike) -> Array:
    """The nearest image in the ball; for l1 in ball and box at once, as published."""
    if ball is balls.l1:
        return balls.project_l1_in_box(x_adv, x, epsilon)
    return ball.project(x_adv, x, epsilon)


def _move(state: _State, x: Array, epsilon: ArrayLike, ball: Ball, is_first: Array) -> Array:
    """The next iterate."""
    step_size = per_example(state.step_size, x)
    if ball is balls.l1:
        signs = _densest(state.gradient, state.density)
        step = step_size * signs / jnp.maximum(per_example(balls.l1.norm(signs), x), 1)
        return _project(ball, state.x_adv + step.astype(x.dtype), x, epsilon)
    step = step_size * ball.direction(state.gradient, state.x_adv)
    ahead = ball.project(state.x_adv + step, x, epsilon)
    momentum = jnp.where(is_first, 1, _MOMENTUM).astype(x.dtype)
    mixed = (
        state.x_adv
        + momentum * (ahead - state.x_adv)
        + (1 - momentum) * (state.x_adv - state.previous)
    )
    return ball.project(mixed, x, epsilon)


def _is_stuck(state: _State, window: Array) -> Array:
    """Whether the steps since the last checkpoint gained too little, bool[b]."""
    few = state.num_increases <= _ENOUGH * window
    no_better = ~state.was_reduced & (state.top_loss <= state.checked_loss)
    return few | no_better


def _reconsider(
    state: _State, x: Array, epsilon: Array, ball: Ball, window: Array, is_checkpoint: Array
) -> _State:
    """At a checkpoint: a shorter step from the best point for the examples that are stuck."""
    if ball is balls.l1:
        # Steps as sparse as the perturbation itself; a perturbation that got sparser starts again
        # with the full step.
        num_pixels = math.prod(x.shape[1:])
        num_moved = _num_moved(state.top, x).astype(state.density.dtype)
        back = num_moved < 0.95 * state.num_moved
        step_size = jnp.clip(
            jnp.where(back, epsilon, state.step_size / 1.5), 0.1 * epsilon, epsilon
        )
        density = jnp.clip(num_moved / num_pixels / 1.5, 1 / num_pixels, 1)
    else:
        back = _is_stuck(state, window)
        step_size = jnp.where(back, state.step_size / 2, state.step_size)
        density, num_moved = state.density, state.num_moved
    now = is_checkpoint & back
    image = per_example_mask(now, x)
    return state._replace(
        x_adv=jnp.where(image, state.top, state.x_adv),
        gradient=jnp.where(image, state.top_gradient, state.gradient),
        step_size=jnp.where(is_checkpoint, step_size, state.step_size),
        num_increases=jnp.where(is_checkpoint, 0, state.num_increases),
        checked_loss=jnp.where(is_checkpoint, state.top_loss, state.checked_loss),
        was_reduced=jnp.where(is_checkpoint, back, state.was_reduced),
        density=jnp.where(is_checkpoint, density, state.density),
        num_moved=jnp.where(is_checkpoint, num_moved, state.num_moved),
    )


def _ascend(
    goal: Objective,
    logits_fn: LogitsFn,
    x: Array,
    epsilon: ArrayLike,
    start: Array,
    found: Judged,
    *,
    ball: Ball,
    num_steps: int,
    is_one_of_phases: bool,
) -> Judged:
    """One run of Auto-PGD from `start`; the best of `found` and of every iterate.

    In a phase of l1 the first steps are as sparse as the start.
    """
    here, gradient = ascent.judge_with_gradient(goal, logits_fn, start)
    # Built from the loss, so that under `shard_map` they vary over the devices as it does.
    zeros = jnp.zeros_like(here.loss)
    epsilon_each = jnp.broadcast_to(jnp.asarray(epsilon, x.dtype), zeros.shape)
    num_pixels = math.prod(x.shape[1:])
    density, num_moved = zeros + _FIRST_DENSITY, zeros + num_pixels
    if is_one_of_phases:
        num_moved = _num_moved(start, x).astype(zeros.dtype)
        density = jnp.clip(num_moved / num_pixels / 1.5, 1 / num_pixels, 1)
    state = _State(
        start, start, gradient, here.loss, start, gradient, here.loss,
        step_size=epsilon_each * (1 if ball is balls.l1 else 2),
        num_increases=zeros.astype(jnp.int32),
        checked_loss=here.loss,
        was_reduced=zeros.astype(bool),
        density=density,
        num_moved=num_moved,
        found=ascent.better(here, found),
    )  # fmt: skip
    at = _l1_checkpoints(num_steps) if ball is balls.l1 else checkpoints(num_steps)
    is_checkpoint = np.zeros(num_steps, bool)
    is_checkpoint[np.array(at, int) - 1] = True
    window = np.zeros(num_steps, np.float32)
    window[np.array(at, int) - 1] = np.diff(at, prepend=0)

    def step(state, xs):
        number, is_checkpoint, window = xs
        x_adv = _move(state, x, epsilon, ball, number == 0)
        here, gradient = ascent.judge_with_gradient(goal, logits_fn, x_adv)
        rises = here.loss > state.top_loss
        image = per_example_mask(rises, x)
        state = state._replace(
            x_adv=x_adv,
            previous=state.x_adv,
            gradient=gradient,
            loss=here.loss,
            num_increases=state.num_increases + (here.loss > state.loss),
            top=jnp.where(image, x_adv, state.top),
            top_gradient=jnp.where(image, gradient, state.top_gradient),
            top_loss=jnp.where(rises, here.loss, state.top_loss),
            found=ascent.better(here, state.found),
        )
        return _reconsider(state, x, epsilon_each, ball, window, is_checkpoint), None

    state, _ = jax.lax.scan(step, state, (np.arange(num_steps), is_checkpoint, window))
    return state.found


def _surface(keys: Key, x: Array, epsilon: ArrayLike, ball: Ball) -> Array:
    """A random image at distance epsilon from each image, before the box cuts it."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    noise = jax.vmap(lambda key: ball.sample(key, x.shape[1:], wide))(keys)
    noise = noise / per_example(jnp.maximum(ball.norm(noise), jnp.finfo(wide).tiny), noise)
    return _project(ball, x.astype(wide) + per_example(epsilon, noise) * noise, x, epsilon)


def _sparse(keys: Key, x: Array, epsilon: ArrayLike) -> Array:
    """Normal noise on every pixel, projected on l1 ball and box: few pixels differ from `x`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], wide))(keys)
    return _project(balls.l1, x.astype(wide) + noise, x, epsilon)


# Phases of the ascent by norm: radius in units of epsilon, and share of the steps.
_PHASES = {
    "linf": ((1.0, 1.0),),
    "l2": ((2.0, 0.3), (1.0, 0.7)),
    "l1": ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4)),
}


def _with_restarts(
    goal: Objective,
    keys: Key,
    logits_fn: LogitsFn,
    x: Array,
    epsilon: ArrayLike,
    found: Judged,
    *,
    ball: Ball,
    num_steps: int,
    num_restarts: int,
    large_radii: bool,
) -> Judged:
    """The best of `found` and of all iterates of all starts that lie in the ball."""
    *wider, _ = _PHASES[ball.name] if large_radii else _PHASES["linf"]
    # Every phase has a step.
    lengths = [int(share * num_steps) for _, share in wider]
    wider = [(factor, n) for (factor, _), n in zip(wider, lengths, strict=True) if n]
    last = num_steps - sum(n for _, n in wider)
    epsilon = jnp.asarray(epsilon, jnp.promote_types(x.dtype, jnp.float32))
    ascend = functools.partial(
        _ascend, goal, logits_fn, ball=ball, is_one_of_phases=large_radii and ball is balls.l1
    )

    def restart(number, found):
        start_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        widest = epsilon * (wider[0][0] if wider else 1)
        start = _surface(start_keys, x, widest, ball)
        if ball is balls.l1 and num_restarts > 1:
            # Which start is better depends on the network, so they take turns.
            start = jnp.where(number % 2 == 1, _sparse(start_keys, x, widest), start)
        for factor, length in wider:
            # An image of a wider ball is only where the next phase starts, in its own ball.
            nothing = ascent.untouched(x, found.success, found.loss.dtype)
            start = _project(ball, start, x, factor * epsilon)
            start = ascend(x, factor * epsilon, start, nothing, num_steps=length).x_adv
        start = _project(ball, start, x, epsilon)
        return ascend(x, epsilon, start, found, num_steps=last)

    if num_restarts == 1:
        return restart(0, found)
    return jax.lax.fori_loop(0, num_restarts, restart, found)


@traits.declare(example_keys=True, monotone=True)
def apgd(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    num_steps: int = 100,
    num_restarts: int = 1,
    ball: Ball = balls.linf,
    loss_fn: AttackLoss = losses.cross_entropy,
    large_radii: bool = True,
    targeted: bool = False,
) -> Array:
    """Auto-PGD: ascent with momentum whose step halves when it stops paying.

    From a random point at distance epsilon, with a first step of 2 epsilon. At checkpoints, an
    example whose loss rose in at most 75 % of the steps since the last one, or whose best loss
    did not change, halves its step and goes back to its best point. For l1 the steps are sparse,
    as sparse as the perturbation found so far.

    For l1 the iterates are projected on the ball and the box at once, and no radius is lost at the
    edge of the box. The start is spread over all pixels, and the box cuts part of it; every other
    restart begins with a sparse one, as published (docs/design.md has both).

    For l1 the first 60 % of the steps are spent in balls of three and two epsilon, as published;
    here also 30 % for l2 in a ball of two epsilon: against the reference network that was trained
    with linf PGD that left 38 % of the images correct, and 49 % without it (docs/design.md).

    Args:
      key: a key, or one key an example [b].
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      epsilon: radius of the ball, such as `8 / 255`; scalar or [b].
      num_steps: number of steps.
      num_restarts: number of starts; each example keeps its best image over all of them.
      ball: `balls.linf`, `balls.l2` or `balls.l1`.
      loss_fn: logits and labels to f32[b]: `losses.cross_entropy` or `losses.dlr`.
      large_radii: start in larger balls; False gives the published l2 form.
      targeted: descend the loss of `y` instead.

    Returns:
      Adversarial images, like `x`: the best iterate of each example in the ball.

    Static: num_steps, num_restarts, ball, loss_fn, large_radii, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon.

    Source: F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
    Diverse Parameter-free Attacks", ICML 2020; for l1 F. Croce, M. Hein, "Mind the Box: l1-APGD
    for Sparse Adversarial Attacks on Image Classifiers", ICML 2021.
    """
    balls.check("apgd", ball)
    x, y = checks.attack_inputs("apgd", logits_fn, x, y, epsilon)
    checks.at_least("apgd", "num_steps", num_steps, 1)
    checks.at_least("apgd", "num_restarts", num_restarts, 1)
    goal = ascent.objective(loss_fn, y, targeted)
    return _with_restarts(
        goal, random.example_keys(key, x.shape[0]), logits_fn, x, epsilon,
        ascent.judge(goal, logits_fn, x),
        ball=ball, num_steps=num_steps, num_restarts=num_restarts, large_radii=large_radii,
    ).x_adv  # fmt: skip


def nth_likeliest(logits: Array, y: Array, rank: ArrayLike) -> Array:
    """The class of that rank among the others, int32[b]: 0 is the likeliest that is not `y`.

    Args:
      logits: f32[b, k].
      y: labels, int32[b].
      rank: 0 ... k - 2.
    """
    is_label = jax.nn.one_hot(y, logits.shape[-1], dtype=bool)
    order = jnp.argsort(jnp.where(is_label, jnp.inf, -logits), axis=-1)
    return jnp.take(order, rank, axis=-1).astype(y.dtype)


def check_targets(caller: str, first: ArrayLike, number: int, num_classes: int) -> None:
    """Ranks of targets, where they are concrete, are those of other classes."""
    if not checks.is_concrete(first):
        return
    rank = int(np.asarray(first))
    if not 0 <= rank <= num_classes - 1 - number:
        raise ValueError(
            f"{caller}: need first_target >= 0 and first_target + num_targets <= "
            f"{num_classes - 1} other classes, got {rank} + {number}."
        )


@traits.declare(example_keys=True, monotone=True)
def apgd_targeted(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    num_steps: int = 100,
    num_restarts: int = 1,
    num_targets: int | None = None,
    first_target: ArrayLike = 0,
    ball: Ball = balls.linf,
    large_radii: bool = True,
) -> Array:
    """Auto-PGD towards each of the likeliest other classes, with the targeted DLR loss.

    An image succeeds when the network no longer answers `y`, whatever it answers instead.

    Args:
      key: a key, or one key an example [b].
      logits_fn: classifier, images to logits f32[b, k] with k >= 4.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      epsilon: radius of the ball, such as `8 / 255`; scalar or [b].
      num_steps: steps towards each target.
      num_restarts: starts for each target.
      num_targets: how many targets; by default the 9 likeliest, or all if there are fewer.
      first_target: rank of the first target.
      ball: `balls.linf`, `balls.l2` or `balls.l1`.
      large_radii: as in `apgd`.

    Returns:
      Adversarial images, like `x`: the best iterate of each example over all targets.

    Static: num_steps, num_restarts, num_targets, ball, large_radii.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon,
        fewer than four classes, more targets than there are other classes.

    Source: F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
    Diverse Parameter-free Attacks", ICML 2020.
    """
    balls.check("apgd_targeted", ball)
    x, y = checks.attack_inputs("apgd_targeted", logits_fn, x, y, epsilon)
    for name, value in (("num_steps", num_steps), ("num_restarts", num_restarts)):
        checks.at_least("apgd_targeted", name, value, 1)
    clean = logits_fn(x)
    num_targets = min(9, clean.shape[-1] - 1) if num_targets is None else num_targets
    checks.at_least("apgd_targeted", "num_targets", num_targets, 1)
    check_targets("apgd_targeted", first_target, num_targets, clean.shape[-1])
    keys = random.example_keys(key, x.shape[0])
    is_fooled = ascent.objective(losses.dlr, y, targeted=False)
    # Losses of different targets do not compare: they are forgotten between targets.
    found = Judged(x, is_fooled.success(clean), is_fooled.loss(clean))

    def towards(number, found):
        rank = first_target + number
        target = nth_likeliest(clean, y, rank)
        goal = Objective(lambda logits: losses.dlr_targeted(logits, y, target), is_fooled.success)
        target_keys = jax.vmap(lambda key: jax.random.fold_in(key, rank))(keys)
        result = _with_restarts(
            goal, target_keys, logits_fn, x, epsilon, ascent.judge(goal, logits_fn, x),
            ball=ball, num_steps=num_steps, num_restarts=num_restarts, large_radii=large_radii,
        )  # fmt: skip
        return ascent.better(ascent.judge(is_fooled, logits_fn, result.x_adv), found)

    return jax.lax.fori_loop(0, num_targets, towards, found).x_adv
