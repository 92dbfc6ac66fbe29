"""FAB: the fast adaptive boundary attack, minimum-norm in linf, l2 and l1."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.attacks import nearest
from advjax.attacks.ascent import per_example_mask
from advjax.attacks.auto_pgd import check_targets, nth_likeliest
from advjax.core import balls, checks, random, traits
from advjax.core.balls import Ball, per_example
from advjax.core.typing import Array, Key, LogitsFn, MinNorm


@traits.declare(example_keys=True)
def fab(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    num_steps: int = 100,
    num_restarts: int = 1,
    num_targets: int = 0,
    first_target: ArrayLike = 0,
    alpha_max: ArrayLike = 0.1,
    overshoot: ArrayLike = 1.05,
    backward: ArrayLike = 0.9,
    restart_radius: ArrayLike | None = None,
    ball: Ball = balls.linf,
    targeted: bool = False,
) -> MinNorm:
    """FAB: projections on the linearised boundary, drawn towards the clean image.

    At the iterate the nearest boundary is linearised; both the iterate and the clean image are
    projected on it within the box, by d and d_0, and the next iterate is
    `(1 - a) (x_i + eta d) + a (x + eta d_0)` with `a = min(|d| / (|d| + |d_0|), alpha_max)`. An
    iterate that is adversarial is drawn back to `x + beta (x_i - x)`.

    Args:
      key: a key, or one key an example [b]; only restarts are random.
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      num_steps: number of steps.
      num_restarts: the first run starts at the image, the others near it.
      num_targets: 0 looks at the boundaries to all classes in every step (k gradients); else only
        at that to one class, for each of so many of the likeliest classes in turn (FAB-T).
      first_target: rank of the first of them.
      alpha_max: largest weight of the clean image's projection.
      overshoot: eta, how far beyond the boundary.
      backward: beta.
      restart_radius: distance of the random starts; by default that of the nearest image found so
        far, and 1 where there is none. Half of it is used, as published.
      ball: `balls.linf`, `balls.l2` or `balls.l1`.
      targeted: whether `y` are targets.

    Returns:
      `MinNorm`, with distances in the norm of the ball.

    Static: num_steps, num_restarts, num_targets, ball, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, more targets
        than there are other classes, `num_targets` together with `targeted`.

    Source: F. Croce, M. Hein, "Minimally Distorted Adversarial Examples with a Fast Adaptive
    Boundary Attack", ICML 2020.
    """
    balls.check("fab", ball)
    x, y = checks.min_norm_inputs("fab", logits_fn, x, y)
    for name, value, least in (
        ("num_steps", num_steps, 1), ("num_restarts", num_restarts, 1),
        ("num_targets", num_targets, 0),
    ):  # fmt: skip
        checks.at_least("fab", name, value, least)
    for name, value in (
        ("alpha_max", alpha_max), ("overshoot", overshoot), ("backward", backward)
    ):  # fmt: skip
        checks.non_negative("fab", name, value)
    if targeted and num_targets:
        raise ValueError(f"fab: with targeted=True need num_targets=0, got {num_targets}.")
    keys = random.example_keys(key, x.shape[0])
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    with jax.default_matmul_precision("highest"):
        clean = logits_fn(x)
        found = nearest.start(clean, x, y, targeted)
        if num_targets:
            check_targets("fab", first_target, num_targets, clean.shape[-1])

            def start(number, found):
                rank, restart = first_target + number // num_restarts, number % num_restarts
                boundary = _to_class(logits_fn, y, nth_likeliest(clean, y, rank))
                return run(boundary, number, restart > 0, found)

            num_starts = num_targets * num_restarts
        else:
            boundary = _to_target(logits_fn, y) if targeted else _to_nearest(logits_fn, y, ball)

            def start(number, found):
                return run(boundary, number, number > 0, found)

            num_starts = num_restarts

        def run(boundary, number, is_random, found):
            first = wide
            if num_restarts > 1:
                unknown = 1 if restart_radius is None else restart_radius
                radius = jnp.where(jnp.isfinite(found.distance), found.distance, unknown)
                if restart_radius is not None:
                    radius = jnp.minimum(radius, restart_radius)
                start_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
                near = ball.uniform(start_keys, x, radius / 2).astype(wide.dtype)
                first = jnp.where(is_random, near, wide)
            return _walk(
                boundary, logits_fn, nearest.search_excess(y, targeted), first, x, found,
                ball=ball, num_steps=num_steps, alpha_max=alpha_max, overshoot=overshoot,
                backward=backward,
            )  # fmt: skip

        found = jax.lax.fori_loop(0, num_starts, start, found)
        return nearest.finish(logits_fn, x, y, found, ball=ball, targeted=targeted)


# A boundary tells of images how far they are beyond it in logits, f32[b], and the slope of that,
# [b, h, w, c].
Boundary = Callable[[Array], tuple[Array, Array]]


def _to_class(logits_fn: LogitsFn, y: Array, target: Array) -> Boundary:
    """The boundary between the label and one class."""

    def boundary(x_adv):
        _, gaps, normals = nearest.candidates(logits_fn, x_adv, y, target[:, None])
        return gaps[:, 0], normals[0]

    return boundary


def _to_nearest(logits_fn: LogitsFn, y: Array, ball: Ball) -> Boundary:
    """The boundary between the label and the class whose boundary is nearest."""

    def boundary(x_adv):
        num_classes = jax.eval_shape(logits_fn, x_adv).shape[-1]
        others = (y[:, None] + jnp.arange(1, num_classes)) % num_classes
        _, gaps, normals = nearest.candidates(logits_fn, x_adv, y, others)
        return nearest.closest(gaps, normals, ball)[:2]

    return boundary


def _to_target(logits_fn: LogitsFn, target: Array) -> Boundary:
    """The boundary between the target and the likeliest other class."""

    def boundary(x_adv):
        return nearest.slope(nearest.excess(target, targeted=True), logits_fn, x_adv)

    return boundary


def _project(u: Array, normal: Array, offset: Array, ball: Ball) -> Array:
    """The point of the box nearest to `u` with `normal . (z - u) = offset`, from either side."""
    normal = per_example(jnp.sign(offset), normal) * normal
    return nearest.onto_plane(u, normal, jnp.abs(offset), ball)


def _walk(
    boundary: Boundary,
    logits_fn: LogitsFn,
    excess: nearest.Excess,
    first: Array,
    x: Array,
    found: MinNorm,
    *,
    ball: Ball,
    num_steps: int,
    alpha_max: ArrayLike,
    overshoot: ArrayLike,
    backward: ArrayLike,
) -> MinNorm:
    """One run from `first`; the nearest of `found` and of all iterates."""
    wide = x.astype(first.dtype)

    def step(_, carry):
        iterate, found = carry
        gap, normal = boundary(balls.rounded(iterate, x.dtype))
        gap, normal = gap.astype(first.dtype), normal.astype(first.dtype)
        # The plane is normal . (z - iterate) = -gap; seen from x the offset is another.
        offset = -gap + jnp.sum((iterate - wide) * normal, axis=(1, 2, 3))
        move = _project(iterate, normal, -gap, ball) - iterate
        move_clean = _project(wide, normal, offset, ball) - wide
        size, size_clean = ball.norm(move), ball.norm(move_clean)
        total = size + size_clean
        alpha = jnp.minimum(size / jnp.where(total > 0, total, 1), alpha_max)
        alpha = per_example(alpha, first)
        ahead = (1 - alpha) * (iterate + overshoot * move) + alpha * (wide + overshoot * move_clean)
        ahead = jnp.clip(ahead, 0, 1)
        x_adv = balls.rounded(ahead, x.dtype)
        success = excess(logits_fn(x_adv)) > 0
        found = nearest.nearer(found, x_adv, nearest.distance(ball, x_adv, x), success)
        drawn = wide + backward * (ahead - wide)
        return jnp.where(per_example_mask(success, x), drawn, ahead), found

    return jax.lax.fori_loop(0, num_steps, step, (first, found))[1]
