"""HopSkipJump: the nearest adversarial image from nothing but the classifier's answers."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from advjax.attacks import ascent, nearest, queries
from advjax.core import balls, checks, metrics, random
from advjax.core.balls import Ball
from advjax.core.typing import Array, Key, LogitsFn, MinNorm

# Variants of each image [b, n, h, w, c] to whether each is what the attack wants, bool[b, n].
_Ask = Callable[[Array], Array]
# The paper halves its step until it succeeds; 16 halvings leave less than the search's tolerance.
_NUM_HALVINGS = 16


def _toward(x: Array, start: Array, share: Array, ball: Ball) -> Array:
    """The point on the way from images to their starts: `x` at share 0 and `start` at share 1.

    For l2 the way is a line; for linf the start is clipped to a growing cube.

    Args:
      x: images, [b, h, w, c].
      start: images, [b, h, w, c].
      share: in [0, 1], f32[b].
      ball: l2 or linf.
    """
    delta = start - x
    share = balls.per_example(share, x)
    if ball.name == "linf":
        radius = share * balls.per_example(ball.norm(delta), x)
        return jnp.clip(x + jnp.clip(delta, -radius, radius), 0, 1)
    return jnp.clip(x + share * delta, 0, 1)


def _to_boundary(ask: _Ask, x: Array, start: Array, ball: Ball) -> Array:
    """Binary search from adversarial images toward `x`: the nearest adversarial one asked about."""
    # The paper's tolerance, a share d^(-3/2) of the way (l2) or d^-2 (linf), within float32.
    dimension = math.prod(x.shape[1:])
    halvings = (1.5 if ball.name == "l2" else 2.0) * math.log2(max(2, dimension))

    def halve(_, carry):
        low, high, found = carry
        middle = (low + high) / 2
        point = _toward(x, start, middle, ball)
        is_adversarial = ask(point[:, None])[:, 0]
        found = jnp.where(ascent.per_example_mask(is_adversarial, x), point, found)
        low = jnp.where(is_adversarial, low, middle)
        return low, jnp.where(is_adversarial, middle, high), found

    low = 0 * ball.norm(x)
    num_halvings = min(23, math.ceil(halvings))
    return jax.lax.fori_loop(0, num_halvings, halve, (low, low + 1, start))[-1]


def _noisy(keys: Key, x: Array, num_starts: int) -> Array:
    """Noise blended with the images, from a little to noise alone: [b, n, h, w, c].

    Every other one is uniform between two levels of its own, so that dark and bright ones are
    among them; the rest are black and white pixels, which are further away from grey.
    """

    def draw(key: Key) -> Array:
        key_level, key_noise = jax.random.split(key)
        low, high = jax.random.uniform(key_level, (2, num_starts, 1, 1, 1), x.dtype)
        noise = jax.random.uniform(key_noise, (num_starts, *x.shape[1:]), x.dtype)
        is_grey = jnp.arange(num_starts).reshape(low.shape) % 2 == 0
        return jnp.where(is_grey, low + noise * (high - low), noise < low)

    share = jnp.arange(1, num_starts + 1, dtype=x.dtype) / num_starts
    return x[:, None] + share[:, None, None, None] * (jax.vmap(draw)(keys) - x[:, None])


def _unit_directions(keys: Key, num_samples: int, x: Array, ball: Ball) -> Array:
    """Random directions of l2 norm one, [b, n, h, w, c]; for linf those of uniform pixels."""
    shape = (num_samples, *x.shape[1:])
    if ball.name == "l2":
        noise = jax.vmap(lambda k: jax.random.normal(k, shape, x.dtype))(keys)
    else:
        noise = jax.vmap(lambda k: jax.random.uniform(k, shape, x.dtype, -1, 1))(keys)
    pixels = tuple(range(2, noise.ndim))
    return noise / jnp.sqrt(jnp.sum(noise**2, axis=pixels, keepdims=True))


def _normal_of_boundary(
    ask: _Ask,
    keys: Key,
    x_adv: Array,
    radius: Array,
    num_chunks: Array,
    num_samples: int,
    ball: Ball,
) -> Array:
    """Which way is deeper into the adversarial region, from answers around a boundary point.

    `sum_i (phi_i - mean phi) u_i` with `phi_i` 1 or -1 as `x_adv + radius u_i` is adversarial or
    not; where all answers are the same, their mean is not subtracted.
    """
    radius = balls.per_example(radius, x_adv)[:, None]

    def chunk(number, sums):
        keys_now = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)
        u = _unit_directions(keys_now, num_samples, x_adv, ball)
        points = jnp.clip(x_adv[:, None] + radius * u, 0, 1)
        u = (points - x_adv[:, None]) / jnp.where(radius > 0, radius, 1)  # as far as it went
        phi = jnp.where(ask(points), 1, -1).astype(x_adv.dtype)
        of_phi, of_u, total = sums
        return of_phi + jnp.einsum("bn,bn...->b...", phi, u), of_u + u.sum(1), total + phi.sum(1)

    zero = 0 * x_adv
    sums = zero, zero, ball.norm(zero)
    of_phi, of_u, total = jax.lax.fori_loop(0, num_chunks, chunk, sums)
    mean = total / (num_chunks * num_samples)
    mean = jnp.where(jnp.abs(mean) < 1, mean, 0)
    return of_phi - balls.per_example(mean, x_adv) * of_u


def hop_skip_jump(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    num_steps: int = 40,
    num_samples: int = 100,
    num_starts: int = 100,
    start: Array | None = None,
    ball: Ball = balls.l2,
    targeted: bool = False,
) -> MinNorm:
    """HopSkipJump: along the decision boundary toward the image, by the classifier's answers alone.

    From an adversarial image a binary search finds the boundary; answers around that point
    estimate the normal of the boundary; a step along it, as long as it stays adversarial, and the
    next binary search. Step t asks about `num_samples * ceil(sqrt(t))` directions (the paper's
    `B_0 sqrt(t)`, in whole batches), 16 lengths and about `1.5 log2(d)` (l2) or `2 log2(d)` (linf)
    points on the way back; nothing is stopped early, so that is what an image costs.

    Args:
      key: a key, or one key an example [b].
      logits_fn: classifier, images to logits f32[b, k]; only which is the largest is used.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      num_steps: how often the boundary is followed; 0 is the search from the start alone.
      num_samples: directions asked about in the first step.
      num_starts: images asked about to find an adversarial one: noise blended with the image,
        from a little to noise alone. The nearest is taken.
      start: images to start from instead, [b, h, w, c], such as images of the targets; one that is
        not adversarial finds nothing.
      ball: the norm, `balls.l2` or `balls.linf`.
      targeted: find images that the network answers `y` for.

    Returns:
      `MinNorm`: the nearest image that was found, its distance, and whether there is one; `x`,
      infinity and False where there is none. An image that is adversarial by itself comes back
      with distance 0. Every success is asked about once more, on the image that is returned.

    Static: num_steps, num_samples, num_starts, ball, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a budget of
        nothing, starts of another shape, another ball.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> logits_fn = lambda x: jnp.stack([0 * x[:, 0, 0, 0], x.sum((1, 2, 3)) - 3.0], axis=-1)
      >>> x, y = jnp.full((1, 2, 2, 1), 0.5), jnp.array([0])
      >>> found = jax.jit(hop_skip_jump, static_argnums=1)(jax.random.key(0), logits_fn, x, y)
      >>> bool(found.success[0]), round(float(found.distance[0]), 2)  # the plane is 0.5 away
      (True, 0.5)

    Source: J. Chen, M. Jordan, M. Wainwright, "HopSkipJumpAttack: A Query-Efficient Decision-Based
    Attack", IEEE S&P 2020.
    """
    x, y, start = _checked(logits_fn, x, y, start, num_steps, num_samples, num_starts, ball)
    keys = random.example_keys(key, x.shape[0])
    # The search works in float32; asked about are images of the dtype that is returned.
    clean = x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def ask(variants: Array) -> Array:
        is_wanted = metrics.is_correct if targeted else metrics.is_fooled
        return is_wanted(queries.ask(logits_fn, variants.astype(x.dtype)), y[:, None])

    def keys_of(number) -> Key:
        return jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)

    def nearer(candidate: Array, incumbent: Array) -> Array:
        wins = ball.distance(candidate, clean) < ball.distance(incumbent, clean)
        return jnp.where(ascent.per_example_mask(wins, x), candidate, incumbent)

    def step(number, carry):
        x_adv, best = carry
        distance = ball.distance(x_adv, clean)
        # The first boundary point may be off by the search's tolerance of a long way.
        radius = jnp.where(number == 1, 0.1, distance / math.prod(x.shape[1:]))
        root = jnp.sqrt(jnp.asarray(number, clean.dtype))
        normal = _normal_of_boundary(
            ask, keys_of(number), x_adv, radius, jnp.ceil(root).astype(int), num_samples, ball
        )
        lengths = (distance / root)[:, None] * 0.5 ** jnp.arange(_NUM_HALVINGS)
        direction = ball.direction(normal, x_adv)[:, None]
        jumps = x_adv[:, None] + balls.per_example(lengths, x_adv[:, None]) * direction
        jumps = jnp.clip(jumps, 0, 1)
        reached = ask(jumps)
        longest = queries.pick(jumps, jnp.argmax(reached, axis=1))
        has_jumped = ascent.per_example_mask(jnp.any(reached, axis=1), x)
        x_adv = _to_boundary(ask, clean, jnp.where(has_jumped, longest, x_adv), ball)
        return x_adv, nearer(x_adv, best)

    with jax.default_matmul_precision("highest"):
        if start is None:
            candidates = _noisy(keys_of(0), clean, num_starts)
        else:
            candidates = start[:, None].astype(clean.dtype)
        is_adversarial = ask(candidates)
        away = jax.vmap(ball.distance, (1, None), 1)(candidates, clean)
        nearest_one = jnp.argmin(jnp.where(is_adversarial, away, jnp.inf), axis=1)
        first = queries.pick(candidates, nearest_one)
        has_started = ascent.per_example_mask(jnp.any(is_adversarial, axis=1), x)
        first = _to_boundary(ask, clean, jnp.where(has_started, first, clean), ball)
        _, best = jax.lax.fori_loop(1, num_steps + 1, step, (first, first))
        is_clean = ascent.per_example_mask(ask(clean[:, None])[:, 0], x)
        x_adv = jnp.where(is_clean, x, best.astype(x.dtype))
        success = ask(x_adv[:, None])[:, 0]
    x_adv = jnp.where(ascent.per_example_mask(success, x), x_adv, x)
    distance = nearest.distance(ball, x_adv, x)
    return MinNorm(x_adv, jnp.where(success, distance, jnp.inf), success)


def _checked(logits_fn, x, y, start, num_steps, num_samples, num_starts, ball):
    caller = "hop_skip_jump"
    x, y = checks.min_norm_inputs(caller, logits_fn, x, y)
    if x.ndim != 4:
        raise ValueError(f"{caller}: need images of shape [b, h, w, c], got {x.shape}.")
    checks.at_least(caller, "num_steps", num_steps, 0)
    checks.at_least(caller, "num_samples", num_samples, 1)
    checks.at_least(caller, "num_starts", num_starts, 1)
    balls.check(caller, ball, "l2", "linf")
    if start is not None:
        checks.images(caller, start)
        if start.shape != x.shape:
            raise ValueError(f"{caller}: need starts of shape {x.shape}, got {start.shape}.")
        start = jnp.clip(jnp.asarray(start), 0, 1)
    return x, y, start
