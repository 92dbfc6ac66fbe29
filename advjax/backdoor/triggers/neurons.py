"""Triggers that excite neurons of a clean network (TrojanNN)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from advjax.backdoor.triggers.overlays import additive
from advjax.core import balls, checks, random
from advjax.core.typing import Array, Key, LogitsFn


def trojannn(
    key: Key,
    features_fn: LogitsFn,
    last_weights: Array,
    x: Array,
    *,
    mask: Array | None = None,
    num_neurons: int = 2,
    value: ArrayLike = 100.0,
    epsilon: ArrayLike = 0.3,
    step_size: ArrayLike = 0.1,
    num_steps: int = 1000,
) -> Partial:
    """A pattern that drives the most influential neurons before the last layer to a high value.

    The neurons are those with the largest `sum_k |w_ik|` over the classes. Sign steps within
    epsilon of a random pattern descend `sum_i (features_i(pattern) - value)^2`, outside of the mask
    the pattern is black. The classifier with the backdoor is trained on poisoned data afterwards.

    Args:
      key: a key, for the pattern to start from.
      features_fn: images to the neurons of a clean network before its last layer, f32[b, features];
        see `networks.last_layer`.
      last_weights: weights of that layer, f32[features, k].
      x: images of which only the shape is used, f32[..., h, w, c].
      mask: where the pattern may be, bool[h, w]; by default a square of 5 / 16 of the image's sides
        in the lower right corner, a tenth of the pixels as in the published trigger.
      num_neurons: how many neurons.
      value: what they shall be.
      epsilon: largest change of a pixel of the first pattern.
      step_size: length of a step.
      num_steps: number of steps.

    Returns:
      The trigger `clip(x + pattern, 0, 1)`, a `Partial` with the pattern f32[h, w, c] as its leaf
      `pattern`: of all that were looked at the one with the least loss. Peers take the last.

    Static: num_neurons, num_steps.

    Raises:
      ValueError: no network, weights that do not fit the features, more neurons than there are, a
        mask of another shape or without a pixel.

    Source: Y. Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018.
    """
    if features_fn is None or last_weights is None:
        raise ValueError(
            "trojannn: need the features and the last weights of a clean classifier, got None."
        )
    checks.at_least("trojannn", "num_neurons", num_neurons, 1)
    checks.at_least("trojannn", "num_steps", num_steps, 1)
    for name, number in (("value", value), ("epsilon", epsilon), ("step_size", step_size)):
        checks.non_negative("trojannn", name, number)
    height, width, _ = shape = jnp.shape(x)[-3:]
    features = jax.eval_shape(features_fn, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    if features.ndim != 2 or jnp.ndim(last_weights) != 2 or len(last_weights) != features.shape[1]:
        raise ValueError(
            "trojannn: need features f32[b, n] and last_weights f32[n, k], got features of shape "
            f"{features.shape} and last_weights of shape {jnp.shape(last_weights)}."
        )
    if num_neurons > len(last_weights):
        raise ValueError(
            f"trojannn: need num_neurons <= {len(last_weights)}, got num_neurons={num_neurons}."
        )
    if mask is None:
        mask = np.zeros((height, width), bool)
        mask[height - max(1, 5 * height // 16) :, width - max(1, 5 * width // 16) :] = True
    if jnp.shape(mask) != (height, width):
        raise ValueError(
            f"trojannn: need a mask bool[{height}, {width}], got shape {jnp.shape(mask)}."
        )
    if checks.is_concrete(mask) and not np.any(mask):
        raise ValueError("trojannn: need a mask with at least one pixel, got none.")
    _, neurons = jax.lax.top_k(jnp.sum(jnp.abs(last_weights), axis=1), num_neurons)
    masked = jnp.asarray(mask)[:, :, None]
    first = masked * jax.random.uniform(random.as_typed(key), shape)

    def loss(pattern: Array) -> Array:
        return jnp.sum((features_fn(pattern[None])[0, neurons] - value) ** 2)

    def step(_: int, carry: _Search) -> _Search:
        loss_here, slope = jax.value_and_grad(loss)(carry.pattern)
        is_better = loss_here < carry.least
        moved = carry.pattern - step_size * jnp.sign(slope) * masked
        return _Search(
            balls.linf.project(moved[None], first[None], epsilon)[0],
            jnp.where(is_better, carry.pattern, carry.best),
            jnp.where(is_better, loss_here, carry.least),
        )

    start = _Search(first, first, jnp.asarray(jnp.inf))
    pattern, best, least = jax.lax.fori_loop(0, num_steps, step, start)
    return Partial(additive, pattern=jnp.where(loss(pattern) < least, pattern, best))


class _Search(NamedTuple):
    """The pattern, the best one so far and its loss."""

    pattern: Array
    best: Array
    least: Array
