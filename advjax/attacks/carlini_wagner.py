"""Carlini and Wagner's minimum-norm attacks in l2, linf and l0, with confidence kappa."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from advjax.attacks import nearest
from advjax.attacks.ascent import per_example_mask
from advjax.core import balls, checks, traits
from advjax.core.balls import per_example
from advjax.core.typing import Array, Key, LogitsFn, MinNorm

STARTS = ("image", "black", "white")

# Without it the inverse of tanh is infinite at black and at white, and such a pixel never moves.
_SHRINK = 0.999999


def _to_tanh_space(x: Array) -> Array:
    return jnp.arctanh(_SHRINK * (2 * x - 1))


def _from_tanh_space(w: Array) -> Array:
    # (tanh(w) + 1) / 2. XLA's tanh is constant beyond 7.9, close to where a black or a white pixel
    # starts (7.25), and its slope there is off: with it distances came out 4 % longer.
    return jax.nn.sigmoid(2 * w)


def _first_image(caller: str, start: str, x: Array) -> Array:
    checks.known(caller, "start", start, STARTS)
    return {"image": x, "black": jnp.zeros_like(x), "white": jnp.ones_like(x)}[start]


def _descend(
    adam: optax.GradientTransformation, gradient: Array, state: Any, w: Array
) -> tuple[Any, Any]:
    """One step; a gradient that is not a number does nothing."""
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
    update, state = adam.update(gradient, state)
    return optax.apply_updates(w, update), state


class _Search:
    """Binary search of each example's constant: times ten until a success, then by halves."""

    def __init__(self, initial_constant: ArrayLike, like: Array):
        # From `like`, so that under `shard_map` it varies over the devices as the images do.
        constant = like * 0 + jnp.asarray(initial_constant, like.dtype)
        self.first = constant, like * 0, like * 0 + jnp.inf

    @staticmethod
    def next(bounds: tuple[Array, Array, Array], success: Array) -> tuple[Array, Array, Array]:
        constant, low, high = bounds
        high = jnp.where(success, jnp.minimum(high, constant), high)
        low = jnp.where(success, low, jnp.maximum(low, constant))
        middle = jnp.where(jnp.isfinite(high), (low + high) / 2, 10 * constant)
        return middle, low, high


@traits.declare(example_keys=True)
def carlini_wagner_l2(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    num_steps: int = 1000,
    num_search_steps: int = 9,
    learning_rate: ArrayLike = 0.01,
    initial_constant: ArrayLike = 1e-3,
    confidence: ArrayLike = 0.0,
    start: str = "image",
    targeted: bool = False,
) -> MinNorm:
    """Carlini and Wagner's l2 attack: the nearest image that the network gets wrong by kappa.

    Minimises `||x' - x||_2^2 + c max(0, z_y - max_{i != y} z_i + kappa)` over `w`, with
    `x' = (tanh(w) + 1) / 2`, by Adam, which starts anew for every constant c. Each example has its
    own c, which a binary search makes as small as it may be.

    Args:
      key: not used; the attack is deterministic.
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      num_steps: steps of Adam for each constant.
      num_search_steps: constants tried. With few steps start from a larger constant.
      learning_rate: of Adam. A black or a white pixel starts at 7 in tanh space: 0.1 moves it in a
        hundred steps, 0.01 does not.
      initial_constant: the first c; scalar or [b].
      confidence: kappa, the least margin in logits by which the wrong class wins; scalar or [b].
      start: where Adam starts: "image", "black" or "white".
      targeted: whether `y` are targets.

    Returns:
      `MinNorm`; `x_adv` has the margin kappa, up to rounding.

    Static: num_steps, num_search_steps, start, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, an unknown
        start, a negative number.

    Source: N. Carlini, D. Wagner, "Towards Evaluating the Robustness of Neural Networks",
    IEEE S&P 2017.
    """
    del key
    caller = "carlini_wagner_l2"
    x, y = checks.min_norm_inputs(caller, logits_fn, x, y)
    checks.at_least(caller, "num_steps", num_steps, 1)
    checks.at_least(caller, "num_search_steps", num_search_steps, 1)
    checks.non_negative(caller, "learning_rate", learning_rate)
    checks.one_or_each(caller, "initial_constant", initial_constant, x)
    checks.one_or_each(caller, "confidence", confidence, x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    w_start = _to_tanh_space(_first_image(caller, start, wide))
    excess = nearest.search_excess(y, targeted, confidence)
    adam = optax.adam(jnp.asarray(learning_rate))

    def objective(w, constant):
        x_adv = balls.rounded(_from_tanh_space(w), x.dtype)
        beyond = excess(logits_fn(x_adv))
        squared = jnp.sum((x_adv.astype(wide.dtype) - wide) ** 2, axis=(1, 2, 3))
        loss = squared + constant * jnp.maximum(-beyond, 0)
        return jnp.sum(jnp.where(jnp.isfinite(loss), loss, 0)), (x_adv, squared, beyond > 0)

    def try_constant(carry, _):
        found, bounds = carry

        def step(carry, _):
            w, state, best, any_success = carry
            gradient, (x_adv, squared, success) = jax.grad(objective, has_aux=True)(w, bounds[0])
            best = nearest.nearer(best, x_adv, jnp.sqrt(squared), success)
            w, state = _descend(adam, gradient, state, w)
            return (w, state, best, any_success | success), None

        carry = w_start, adam.init(w_start), found, found.success & ~found.success
        (_, _, found, success), _ = jax.lax.scan(step, carry, length=num_steps)
        return (found, _Search.next(bounds, success)), None

    with jax.default_matmul_precision("highest"):
        found = nearest.start(logits_fn(x), x, y, targeted, confidence)
        bounds = _Search(initial_constant, jnp.sum(wide, axis=(1, 2, 3))).first
        (found, _), _ = jax.lax.scan(try_constant, (found, bounds), length=num_search_steps)
        return nearest.finish(
            logits_fn, x, y, found, ball=balls.l2, targeted=targeted, confidence=confidence
        )


@traits.declare(example_keys=True)
def carlini_wagner_linf(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    num_steps: int = 100,
    num_rounds: int = 40,
    learning_rate: ArrayLike = 0.1,
    initial_constant: ArrayLike = 1.0,
    largest_constant: ArrayLike = 1e3,
    shrink: ArrayLike = 0.9,
    confidence: ArrayLike = 0.0,
    start: str = "image",
    targeted: bool = False,
) -> MinNorm:
    """Carlini and Wagner's linf attack: what a pixel may change, tau, shrinks while that succeeds.

    Minimises `c max(0, z_y - max_{i != y} z_i + kappa) + sum_i max(0, |x'_i - x_i| - tau)` by Adam
    in tanh space, in rounds. A round that ends with a success sets tau to 0.9 of the largest
    change; one without doubles c. The next round starts from the last image and with its c.

    Args:
      key: not used; the attack is deterministic.
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      num_steps: steps of Adam in a round.
      num_rounds: rounds; those of an example whose c became too large do nothing.
      learning_rate: of Adam; in each round it falls to 0 along a cosine, unlike the original's.
      initial_constant: the first c; scalar or [b].
      largest_constant: an example gives up beyond it.
      shrink: tau after a success, in units of the largest change.
      confidence: kappa, the least margin in logits; scalar or [b].
      start: where Adam starts: "image", "black" or "white".
      targeted: whether `y` are targets.

    Returns:
      `MinNorm`, with linf distances.

    Static: num_steps, num_rounds, start, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, an unknown
        start, a negative number.

    Source: N. Carlini, D. Wagner, "Towards Evaluating the Robustness of Neural Networks",
    IEEE S&P 2017, section VI.C.
    """
    del key
    caller = "carlini_wagner_linf"
    x, y = checks.min_norm_inputs(caller, logits_fn, x, y)
    checks.at_least(caller, "num_steps", num_steps, 1)
    checks.at_least(caller, "num_rounds", num_rounds, 1)
    checks.non_negative(caller, "learning_rate", learning_rate)
    checks.non_negative(caller, "shrink", shrink)
    checks.one_or_each(caller, "initial_constant", initial_constant, x)
    checks.one_or_each(caller, "confidence", confidence, x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    excess = nearest.search_excess(y, targeted, confidence)
    # A constant step would jump back and forth over a small tau.
    decay = optax.cosine_decay_schedule(1.0, num_steps)
    adam = optax.adam(lambda count: jnp.asarray(learning_rate) * decay(count))

    def objective(w, constant, tau):
        x_adv = balls.rounded(_from_tanh_space(w), x.dtype)
        beyond = excess(logits_fn(x_adv))
        change = jnp.abs(x_adv.astype(wide.dtype) - wide)
        over = jnp.sum(jnp.maximum(change - per_example(tau, wide), 0), axis=(1, 2, 3))
        loss = constant * jnp.maximum(-beyond, 0) + over
        total = jnp.sum(jnp.where(jnp.isfinite(loss), loss, 0))
        return total, (x_adv, balls.linf.norm(change), beyond > 0)

    def round_(carry, _):
        w, found, constant, tau = carry

        def step(carry, _):
            w, state, best = carry
            gradient, (x_adv, size, success) = jax.grad(objective, has_aux=True)(w, constant, tau)
            best = nearest.nearer(best, x_adv, size, success)
            w, state = _descend(adam, gradient, state, w)
            return (w, state, best), None

        (w_next, _, best), _ = jax.lax.scan(step, (w, adam.init(w), found), length=num_steps)
        success = best.distance < found.distance
        is_open = constant <= largest_constant
        # From the best image where there is a new one: from there tau shrinks.
        image = per_example_mask(success, w)
        w_next = jnp.where(image, _to_tanh_space(best.x_adv.astype(wide.dtype)), w_next)
        w = jnp.where(per_example_mask(is_open, w), w_next, w)
        tau = jnp.where(success, shrink * best.distance, tau)
        constant = jnp.where(success | ~is_open, constant, 2 * constant)
        return (w, best, constant, tau), None

    with jax.default_matmul_precision("highest"):
        found = nearest.start(logits_fn(x), x, y, targeted, confidence)
        w = _to_tanh_space(_first_image(caller, start, wide))
        zeros = jnp.sum(wide, axis=(1, 2, 3)) * 0
        carry = w, found, zeros + jnp.asarray(initial_constant, wide.dtype), zeros + 1
        (_, found, _, _), _ = jax.lax.scan(round_, carry, length=num_rounds)
        return nearest.finish(
            logits_fn, x, y, found, ball=balls.linf, targeted=targeted, confidence=confidence
        )


@traits.declare(example_keys=True)
def carlini_wagner_l0(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    num_steps: int = 100,
    num_rounds: int = 20,
    num_attempts: int = 2,
    learning_rate: ArrayLike = 0.1,
    initial_constant: ArrayLike = 1.0,
    share: ArrayLike = 0.5,
    confidence: ArrayLike = 0.0,
    start: str = "image",
    targeted: bool = False,
) -> MinNorm:
    """Carlini and Wagner's l0 attack: pixels that matter least are frozen, round by round.

    A round freezes, at their clean value, the pixels of the last solution with the smallest
    `|sum_c delta| sum_c |gradient|`, and all that did not change; then it solves the l2 problem
    over the others, from the last solution, with a constant that grows until it succeeds. A pixel
    is a place with all its channels.

    The original freezes `0.3 sqrt(changed pixels)` at a time and ends at the first failure, after
    hundreds of rounds. Here a round freezes a share of the pixels; a failure undoes the round and
    halves the share.

    Args:
      key: not used; the attack is deterministic.
      logits_fn: classifier, images to logits f32[b, k].
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b]; with `targeted`, the classes that the network shall answer.
      num_steps: steps of Adam for each constant.
      num_rounds: rounds of freezing.
      num_attempts: constants tried in a round, each ten times the last.
      learning_rate: of Adam.
      initial_constant: the first c; scalar or [b].
      share: of the changed pixels that the first round freezes.
      confidence: kappa, the least margin in logits; scalar or [b].
      start: where Adam starts: "image", "black" or "white".
      targeted: whether `y` are targets.

    Returns:
      `MinNorm`; the distance is the number of changed pixels.

    Static: num_steps, num_rounds, num_attempts, start, targeted.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, an unknown
        start, a negative number.

    Source: N. Carlini, D. Wagner, "Towards Evaluating the Robustness of Neural Networks",
    IEEE S&P 2017, section VI.B.
    """
    del key
    caller = "carlini_wagner_l0"
    x, y = checks.min_norm_inputs(caller, logits_fn, x, y)
    for name, value in (
        ("num_steps", num_steps), ("num_rounds", num_rounds), ("num_attempts", num_attempts)
    ):  # fmt: skip
        checks.at_least(caller, name, value, 1)
    checks.non_negative(caller, "learning_rate", learning_rate)
    checks.non_negative(caller, "share", share)
    checks.one_or_each(caller, "initial_constant", initial_constant, x)
    checks.one_or_each(caller, "confidence", confidence, x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    first = _first_image(caller, start, wide)
    excess = nearest.search_excess(y, targeted, confidence)
    adam = optax.adam(jnp.asarray(learning_rate))
    zeros = jnp.sum(wide, axis=(1, 2, 3)) * 0

    def count(x_adv):
        return jnp.sum(jnp.any(x_adv != x, axis=-1), axis=(1, 2)).astype(jnp.float32)

    def objective(w, mask, constant):
        x_adv = balls.rounded(jnp.where(mask, _from_tanh_space(w), wide), x.dtype)
        beyond = excess(logits_fn(x_adv))
        squared = jnp.sum((x_adv.astype(wide.dtype) - wide) ** 2, axis=(1, 2, 3))
        loss = squared + constant * jnp.maximum(-beyond, 0)
        return jnp.sum(jnp.where(jnp.isfinite(loss), loss, 0)), (x_adv, squared, beyond > 0)

    def freeze(x_adv, mask, share):
        """The mask without the pixels that matter least, and without those that did not change."""

        def total(images):
            values = excess(logits_fn(images))
            return jnp.sum(jnp.where(jnp.isfinite(values), values, 0))

        gradient = jax.grad(total)(x_adv).astype(wide.dtype)
        delta = jnp.abs(jnp.sum(x_adv.astype(wide.dtype) - wide, axis=-1))
        matters = delta * jnp.sum(jnp.abs(jnp.nan_to_num(gradient)), axis=-1)
        is_changed = jnp.any(x_adv != x, axis=-1).reshape(x.shape[0], -1)
        matters = jnp.where(is_changed, matters.reshape(is_changed.shape), jnp.inf)
        num_frozen = jnp.maximum(jnp.floor(share * jnp.sum(is_changed, axis=-1)), 1)
        rank = jnp.argsort(jnp.argsort(matters, axis=-1), axis=-1)
        stays = is_changed & (rank >= num_frozen[:, None])
        return mask & stays.reshape(mask.shape)

    def solve(mask, constant, begin):
        """The nearest image over the pixels of the mask, and the constant that found it."""

        def attempt(carry, _):
            constant, solved = carry
            w = _to_tanh_space(begin)

            def step(carry, _):
                w, state, best = carry
                gradient, (x_adv, squared, success) = jax.grad(objective, has_aux=True)(
                    w, mask, constant
                )
                best = nearest.nearer(best, x_adv, jnp.sqrt(squared), success)
                w, state = _descend(adam, gradient, state, w)
                return (w, state, best), None

            (_, _, solved), _ = jax.lax.scan(step, (w, adam.init(w), solved), length=num_steps)
            return (jnp.where(solved.success, constant, 10 * constant), solved), None

        nothing = MinNorm(x, zeros + jnp.inf, zeros > 0)
        (constant, solved), _ = jax.lax.scan(attempt, (constant, nothing), length=num_attempts)
        return constant, solved

    def round_(carry, _):
        mask, constant, share, found = carry
        has_one = per_example_mask(found.success, mask)
        smaller = jnp.where(has_one, freeze(found.x_adv, mask, share), mask)
        begin = jnp.where(has_one, found.x_adv.astype(wide.dtype), first)
        next_constant, solved = solve(smaller, constant, begin)
        # Only a first solution may need larger constants than the last round had.
        constant = jnp.where(solved.success | ~found.success, next_constant, constant)
        mask = jnp.where(per_example_mask(solved.success, mask), smaller, mask)
        share = jnp.where(solved.success | ~found.success, share, share / 2)
        found = nearest.nearer(found, solved.x_adv, count(solved.x_adv), solved.success)
        return (mask, constant, share, found), None

    with jax.default_matmul_precision("highest"):
        found = nearest.start(logits_fn(x), x, y, targeted, confidence)
        carry = (
            wide[..., :1] == wide[..., :1],
            zeros + jnp.asarray(initial_constant, wide.dtype),
            zeros + jnp.asarray(share, wide.dtype),
            found,
        )
        (_, _, _, found), _ = jax.lax.scan(round_, carry, length=num_rounds)
        return nearest.recheck(logits_fn, x, y, found, targeted=targeted, confidence=confidence)
