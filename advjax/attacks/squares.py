"""Square attack: random search with squares, which needs only the logits."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.attacks import ascent
from advjax.attacks.ascent import per_example_mask
from advjax.core import balls, checks, losses, random, traits
from advjax.core.balls import Ball
from advjax.core.typing import Array, AttackLoss, Key, LogitsFn

# The share of the pixels in a square halves after so many queries of 10,000.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def _shares(num_steps: int, first_share: float, rescale: bool) -> np.ndarray:
    """Share of the pixels that the square of each step covers, f64[num_steps]."""
    at = np.arange(num_steps)
    if rescale:
        at = (at / max(num_steps, 1) * 10_000).astype(int)
    return first_share / 2.0 ** np.searchsorted(_HALVINGS, at, side="left")


def _sides(shares: np.ndarray, height: int, width: int) -> np.ndarray:
    """Side of the square of each step, at least one pixel and at most the image."""
    sides = np.round(np.sqrt(shares * height * width)).astype(int)
    return np.clip(sides, 1, min(height, width))


def _window(corner: Array, side: Array, height: int, width: int) -> Array:
    """Which pixels lie in the square with that upper left corner, bool[b, h, w, 1]."""
    row = jnp.arange(height) - corner[:, :1]
    column = jnp.arange(width) - corner[:, 1:]
    in_row, in_column = ((at >= 0) & (at < side) for at in (row, column))
    return (in_row[:, :, None] & in_column[:, None, :])[..., None]


def _corner(key: Key, side: Array, height: int, width: int) -> Array:
    """A corner of a square inside the image, the last position included, int32[2]."""
    return jax.random.randint(key, (2,), 0, jnp.array([height, width]) - side + 1)


# --------------------------------------------------------------------------------------- linf


def _stripes(key: Key, x: Array, epsilon: Array) -> Array:
    """One image with vertical stripes of plus or minus epsilon, [h, w, c]."""
    _, width, channels = x.shape
    return x + epsilon * jax.random.rademacher(key, (1, width, channels), x.dtype)


def _linf_proposal(key: Key, x: Array, best: Array, epsilon: Array, side: Array) -> Array:
    """A square of each channel's plus or minus epsilon in the best image, [h, w, c]."""
    height, width, channels = x.shape
    key_corner, key_sign = jax.random.split(key)
    window = _window(_corner(key_corner, side, height, width)[None], side, height, width)[0]
    sign = jax.random.rademacher(key_sign, (channels,), x.dtype)
    return jnp.where(window, x + epsilon * sign, best)


# ----------------------------------------------------------------------------------------- l2


def _bump(height: int, width: int) -> np.ndarray:
    """A bump in the middle of a rectangle, of unit length: rings that fall as one over k squared.

    The pixel in ring r around the middle (the largest coordinate distance) has the value
    `sum_{k > r} 1 / k^2` up to the outermost ring.
    """
    middle_row, middle_column = height // 2, width // 2
    num_rings = max(middle_row, middle_column) + 1
    tails = np.cumsum(1 / np.arange(1, num_rings + 1)[::-1] ** 2)[::-1]
    ring = np.maximum(
        np.abs(np.arange(height) - middle_row)[:, None],
        np.abs(np.arange(width) - middle_column)[None],
    )
    # An even rectangle has a row or a column beyond the last ring.
    bump = np.where(ring < num_rings, tails[np.minimum(ring, num_rings - 1)], 0)
    return bump / np.linalg.norm(bump)


def _two_bumps(side: int) -> np.ndarray:
    """A bump above and a negative one below it, of unit length, [side, side]."""
    upper, lower = _bump(side // 2, side), _bump(side - side // 2, side)
    both = np.concatenate([upper, -lower]) if side > 1 else lower
    return (both / np.linalg.norm(both)).astype(np.float32)


def _odd_sides(sides: np.ndarray, height: int, width: int) -> np.ndarray:
    """The l2 form takes odd squares of at least three pixels a side."""
    sides = np.maximum(sides, 3)
    sides = sides + (sides % 2 == 0)
    largest = min(height, width)
    return np.minimum(sides, largest)


def _placed(pattern: Array, corner: Array, shape: tuple[int, int]) -> Array:
    """The pattern [s, s], which lies in the corner of [h, w], moved to `corner`."""
    return jnp.roll(pattern, corner, axis=(0, 1)).reshape(shape)


def _tiles(key: Key, x: Array, epsilon: Array) -> Array:
    """One image with a grid of five by five pairs of bumps of random signs, [h, w, c]."""
    height, width, channels = x.shape
    side = max(min(height, width) // 5, 1)
    counts = height // side, width // side
    counts = min(counts[0], 5), min(counts[1], 5)
    key_sign, key_turn = jax.random.split(key)
    signs = jax.random.rademacher(key_sign, (*counts, channels), x.dtype)
    pattern = jnp.asarray(_two_bumps(side), x.dtype)
    pattern = jnp.where(jax.random.bernoulli(key_turn), pattern, pattern.T)
    grid = jnp.einsum("ijc,hw->ihjwc", signs, pattern)
    grid = grid.reshape(counts[0] * side, counts[1] * side, channels)
    over = height - grid.shape[0], width - grid.shape[1]
    before = over[0] // 2, over[1] // 2
    delta = jnp.pad(
        grid,
        ((before[0], over[0] - before[0]), (before[1], over[1] - before[1]), (0, 0)),
    )
    return x + epsilon * delta / jnp.maximum(jnp.linalg.norm(delta), 1e-12)


def _l2_proposal(
    key: Key, x: Array, best: Array, epsilon: Array, side: Array, pattern: Array
) -> Array:
    """Moves the budget of one square, and what is left over, into bumps in another; [h, w, c]."""
    height, width, channels = x.shape
    keys = jax.random.split(key, 4)
    delta = best - x
    corners = [_corner(k, side, height, width) for k in keys[:2]]
    there, away = (_window(c[None], side, height, width)[0] for c in corners)

    def size(mask):
        return jnp.sqrt(jnp.sum(jnp.where(mask, delta, 0) ** 2, axis=(0, 1)))

    budget = jnp.sqrt(
        jnp.maximum(epsilon**2 - jnp.sum(delta**2), 0) / channels + size(there | away) ** 2
    )
    turned = jnp.where(jax.random.bernoulli(keys[2]), pattern, pattern.T)
    sign = jax.random.rademacher(keys[3], (channels,), x.dtype)
    bumps = _placed(turned, corners[0], (height, width))[..., None] * sign
    old = jnp.where(there, delta, 0) / jnp.maximum(size(there), 1e-12)
    new = jnp.where(there, bumps + old, 0)
    new = new / jnp.maximum(jnp.sqrt(jnp.sum(new**2, axis=(0, 1))), 1e-12) * budget
    delta = jnp.where(there, new, jnp.where(away, 0, delta))
    return x + epsilon * delta / jnp.maximum(jnp.linalg.norm(delta), 1e-12)


# ---------------------------------------------------------------------------------------- all


@traits.declare(example_keys=True, monotone=True)
def square(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilon: ArrayLike,
    *,
    num_queries: int = 5000,
    first_share: float = 0.8,
    rescale: bool = False,
    ball: Ball = balls.linf,
    loss_fn: AttackLoss | None = None,
    targeted: bool = False,
) -> Array:
    """Square attack: random search with squares at the border of the ball, without gradients.

    linf: vertical stripes of plus or minus epsilon, then in each query one random square, whose
    channels each get plus or minus epsilon; it stays if the loss rises. l2: a grid of bumps, then
    in each query the norm of two random squares moves to a pair of bumps in the first. The squares
    shrink on a fixed schedule. Every image has squares of its own.

    Args:
      key: a key, or one key an example [b].
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      epsilon: radius of the ball, such as `8 / 255`; scalar or [b].
      num_queries: evaluations of an image, all told: the clean one, the first and one a square.
      first_share: share of the image's pixels in the first squares.
      rescale: stretch the schedule, which is made for 10,000 queries, to `num_queries`.
      ball: `balls.linf` or `balls.l2`.
      loss_fn: ascended; by default the margin, and the cross-entropy if `targeted`.
      targeted: descend the loss of `y` instead.

    Returns:
      Adversarial images, like `x`.

    Static: num_queries, first_share, rescale, ball, loss_fn, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a bad epsilon,
        fewer than two queries, a norm that the attack does not have.

    Source: M. Andriushchenko et al., "Square Attack: a Query-Efficient Black-Box Adversarial
    Attack via Random Search", ECCV 2020; the schedule as in AutoAttack (F. Croce, M. Hein, 2020).
    """
    x, y = checks.attack_inputs("square", logits_fn, x, y, epsilon)
    checks.four_axes("square", x)
    checks.at_least("square", "num_queries", num_queries, 2)
    balls.check("square", ball, "linf", "l2")
    if not 0 < first_share <= 1:
        raise ValueError(f"square: need 0 < first_share <= 1, got first_share={first_share}.")
    if loss_fn is None:
        loss_fn = losses.cross_entropy if targeted else losses.margin
    goal = ascent.objective(loss_fn, y, targeted)
    height, width = x.shape[1:3]
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    radius = jnp.broadcast_to(jnp.asarray(epsilon, wide.dtype), x.shape[:1])
    num_steps = num_queries - 2
    sides = _sides(_shares(num_steps, first_share, rescale), height, width)
    if ball is balls.linf:
        patterns, which = jnp.zeros((1, height, width)), np.zeros(num_steps, int)
        begin = _stripes
    else:
        sides = _odd_sides(sides, height, width)
        distinct = np.unique(sides) if num_steps else np.array([min(3, height, width)])
        patterns = np.zeros((len(distinct), height, width), np.float32)
        for number, side in enumerate(distinct):
            patterns[number, :side, :side] = _two_bumps(int(side))
        patterns, which = jnp.asarray(patterns), np.searchsorted(distinct, sides)
        begin = _tiles

    keys = random.example_keys(key, x.shape[0])
    keys_begin, keys_steps = jax.vmap(jax.random.split, out_axes=1)(keys)
    clean = ascent.judge(goal, logits_fn, x)
    first = ball.project(jax.vmap(begin)(keys_begin, wide, radius), x, epsilon)
    current = ascent.judge(goal, logits_fn, first)

    def step(current, xs):
        number, side, pattern = xs
        step_keys = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys_steps)
        here = current.x_adv.astype(wide.dtype)

        def propose(key, x, here, radius):
            if ball is balls.linf:
                return _linf_proposal(key, x, here, radius, side)
            return _l2_proposal(key, x, here, radius, side, patterns[pattern])

        x_adv = ball.project(jax.vmap(propose)(step_keys, wide, here, radius), x, epsilon)
        # What succeeds stays as it is: the rest of its queries are not needed.
        x_adv = jnp.where(per_example_mask(current.success, x), current.x_adv, x_adv)
        return ascent.better(ascent.judge(goal, logits_fn, x_adv), current), None

    xs = np.arange(num_steps), sides, which
    current, _ = jax.lax.scan(step, current, xs)
    return ascent.better(current, clean).x_adv
