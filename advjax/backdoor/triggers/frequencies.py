"""Low-frequency triggers: one smooth pattern that is added to every image."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from advjax.attacks import deepfool
from advjax.backdoor.triggers.overlays import additive
from advjax.core import checks, metrics, random
from advjax.core.typing import Array, Key, LogitsFn

# The passes end when the share of the last so many differs by less.
_RATES_LOOKED_AT, _LEAST_SPREAD = 5, 0.01

# Half the width of the published Gaussian, in deviations: 15 pixels of 6.
_CUT = 2.5


def low_frequency(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    target: ArrayLike | None = None,
    num_images: int = 100,
    amplitude: ArrayLike = 0.2,
    smoothness: ArrayLike = 6 / 32,
    target_rate: ArrayLike = 0.2,
    num_passes: int = 50,
    num_steps: int = 200,
    overshoot: ArrayLike = 0.02,
) -> Partial:
    """A universal adversarial perturbation that is smoothed whenever it changes.

    The images are visited one by one. For one that `clip(x + v, 0, 1)` does not fool yet, with `r`
    the change that DeepFool makes of it and G a Gaussian blur,

        v <- G(v + G(r)),  v <- amplitude (v - min v) / (max v - min v).

    After each pass the share of fooled images is measured. The passes end when it reaches
    `target_rate`, or when it moved by less than 0.01 over five passes. The zero pattern is the
    first one, and the last one is the trigger.

    A target that is given is the only class that DeepFool aims at, and what counts as fooled: it
    then sees the classifier as one of two classes, the target and the best of the others.

    Args:
      key: a key, for the choice of the images.
      logits_fn: a classifier without a backdoor, best of the architecture that will be infected.
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n]; images of the target, and without one those that the network gets wrong,
        are not used.
      target: the class that the images shall be pushed to; any other class if None.
      num_images: how many of the images are used, at most.
      amplitude: the largest value of the pattern, the smallest being 0.
      smoothness: deviation of the Gaussian in units of the image's sides; 6 pixels of 32 as
        published. It is cut at 2.5 deviations and sees zeros outside of the image.
      target_rate: share of fooled images that is enough.
      num_passes: most passes over the images.
      num_steps: most steps of each DeepFool.
      overshoot: how much further than the boundary it goes.

    Returns:
      The trigger `clip(x + v, 0, 1)`, a `Partial` with `v` f32[h, w, c] as its leaf `pattern`.

    Static: num_images, num_passes, num_steps.

    Raises:
      ValueError: no classifier, images that are not floats in [0, 1] or none at all, labels or a
        target that are not classes, a bad count; no image that DeepFool could push.

    Source: Y. Zeng, W. Park, Z. M. Mao, R. Jia, "Rethinking the Backdoor Attacks' Triggers: A
    Frequency Perspective", ICCV 2021; S.-M. Moosavi-Dezfooli, A. Fawzi, O. Fawzi, P. Frossard,
    "Universal Adversarial Perturbations", CVPR 2017.
    """
    if logits_fn is None:
        raise ValueError("low_frequency: need a classifier without a backdoor, got None.")
    x, y = checks.min_norm_inputs("low_frequency", logits_fn, x, y)
    for name, count in (
        ("num_images", num_images), ("num_passes", num_passes), ("num_steps", num_steps),
    ):  # fmt: skip
        checks.at_least("low_frequency", name, count, 1)
    for name, value in (
        ("amplitude", amplitude), ("smoothness", smoothness),
        ("target_rate", target_rate), ("overshoot", overshoot),
    ):  # fmt: skip
        checks.non_negative("low_frequency", name, value)
    if target is not None:
        checks.labels("low_frequency", jnp.full(1, target), x[:1], logits_fn)
    drawn = jax.random.permutation(random.as_typed(key), len(x))[:num_images]
    x, y = x[drawn], y[drawn]

    def answers_to(pattern: Array) -> Array:
        return metrics.predictions(logits_fn(additive(x, pattern)))

    clean = answers_to(jnp.zeros(x.shape[1:], x.dtype))
    if target is None:
        aim, held, is_used, is_fooled = logits_fn, clean, clean == y, metrics.has_changed
    else:
        aim = functools.partial(_target_and_best_other, logits_fn, target)
        held, is_used = jnp.ones_like(clean), (clean != target) & (y != target)

        def is_fooled(before: Array, after: Array) -> Array:
            del before
            return after == target

    blur = functools.partial(_blur, smoothness)

    def visit(pattern: Array, index: Array) -> tuple[Array, None]:
        image = additive(x[index], pattern)[None]

        def push(pattern: Array) -> Array:
            found = deepfool(
                key, aim, image, held[index][None], num_steps=num_steps, overshoot=overshoot
            )
            # Its image lies on the boundary; the published step goes beyond it.
            change = (1 + overshoot) * (found.x_adv - image)[0]
            return jnp.where(
                found.success[0], _stretch(amplitude, blur(pattern + blur(change))), pattern
            )

        is_open = is_used[index] & ~is_fooled(
            clean[index], metrics.predictions(logits_fn(image))[0]
        )
        return jax.lax.cond(is_open, push, lambda pattern: pattern, pattern), None

    def one_pass(carry: _Passes) -> _Passes:
        pattern = jax.lax.scan(visit, carry.pattern, jnp.arange(len(x)))[0]
        num_fooled = jnp.sum(is_used & is_fooled(clean, answers_to(pattern)))
        share = num_fooled / jnp.maximum(jnp.sum(is_used), 1)
        return _Passes(carry.number + 1, pattern, jnp.append(carry.rates[1:], share))

    def goes_on(carry: _Passes) -> Array:
        is_moving = jnp.ptp(carry.rates) >= _LEAST_SPREAD
        return (carry.number < num_passes) & is_moving & (carry.rates[-1] < target_rate)

    # Until five passes are done, their rates differ by at least 1 from the ones they start with.
    rates = -jnp.arange(_RATES_LOOKED_AT, 0, -1, dtype=jnp.float32)
    start = _Passes(jnp.zeros((), jnp.int32), jnp.zeros(x.shape[1:], jnp.float32), rates)
    pattern = jax.lax.while_loop(goes_on, one_pass, start).pattern
    if checks.is_concrete(pattern) and not np.any(pattern):
        raise ValueError(
            f"low_frequency: need images that DeepFool can push to target={target}, got none."
        )
    return Partial(additive, pattern=pattern)


class _Passes(NamedTuple):
    """Where the passes stand: their number, the pattern, the last five shares of fooled images."""

    number: Array
    pattern: Array
    rates: Array


def _target_and_best_other(logits_fn: LogitsFn, target: ArrayLike, x: Array) -> Array:
    """The classifier as one of two classes: 0 is the target and 1 every other, f32[b, 2]."""
    logits = logits_fn(x)
    is_target = jnp.arange(logits.shape[-1]) == target
    return jnp.stack(
        [jnp.where(mask, logits, -jnp.inf).max(-1) for mask in (is_target, ~is_target)], axis=-1
    )


def _blur(smoothness: ArrayLike, image: Array) -> Array:
    """Separable Gaussian with zeros outside of the image, f32[h, w, c]."""

    def matrix(size: int) -> Array:
        deviation = jnp.maximum(smoothness * size, 1e-3)  # 0: the image itself
        weights = lambda d: jnp.where(  # noqa: E731
            jnp.abs(d) <= _CUT * deviation, jnp.exp(-0.5 * (d / deviation) ** 2), 0
        )
        index, reach = jnp.arange(size), jnp.arange(1 - size, size)
        return weights(index[:, None] - index) / jnp.sum(weights(reach))

    height, width, _ = image.shape
    return jnp.einsum("ij,jkc,lk->ilc", matrix(height), image, matrix(width), precision="highest")


def _stretch(amplitude: ArrayLike, pattern: Array) -> Array:
    low, high = jnp.min(pattern), jnp.max(pattern)
    return amplitude * (pattern - low) / jnp.where(high > low, high - low, 1)
