"""What the next global model will be: double exponential smoothing of those that were sent."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.core.typing import Array


class Smoothed(NamedTuple):
    """A history of global models, smoothed once and twice.

    Attributes:
      level: s1, the models smoothed once, f32[d].
      trend: s1 - s2, where s2 is s1 smoothed again, f32[d]; kept as a difference, since s1 and s2
        agree in most digits.
      num_seen: how many models were seen, int32[].
    """

    level: Array
    trend: Array
    num_seen: Array


def start(params: Array) -> Smoothed:
    """The history before the first model, of which only its shape is used.

    Args:
      params: a global model, f32[d].
    """
    zeros = jnp.zeros(jnp.shape(params), jnp.float32)
    return Smoothed(zeros, zeros, jnp.zeros((), jnp.int32))


def see(history: Smoothed, params: Array, *, alpha: ArrayLike, warmup: int = 1) -> Smoothed:
    """The history with one more model.

    `s1 <- alpha g + (1 - alpha) s1`, `s2 <- alpha s1 + (1 - alpha) s2`. The first `warmup` models
    only enter the mean from which both start.

    Args:
      history: the models before.
      params: the model that the server sent, g, f32[d].
      alpha: in (0, 1); the larger, the sooner the past is forgotten.
      warmup: 1 starts at the first model, as the paper's algorithm does; its text speaks of the
        mean of several.

    Static: warmup.
    """
    is_start = history.num_seen < warmup
    share = jnp.where(is_start, 1 / (history.num_seen + 1), alpha)
    level = history.level + share * (params - history.level)
    trend = (1 - alpha) * (level - history.level + history.trend)
    return Smoothed(level, jnp.where(is_start, 0, trend), history.num_seen + 1)


def predict(history: Smoothed, *, alpha: ArrayLike) -> jax.Array:
    """The next model, f32[d].

    `(2 - alpha) / (1 - alpha) s1 - 1 / (1 - alpha) s2`: Brown's level and trend, one round ahead.

    Args:
      history: the models so far, the present one included.
      alpha: as in `see`.

    Source: H. Zhang, Z. Yao, L. Y. Zhang, S. Hu, C. Chen, A. Liew, Z. Li, "Denial-of-Service or
    Fine-Grained Control: Towards Flexible Model Poisoning Attacks on Federated Learning", IJCAI
    2023, equation 6.
    """
    return jnp.asarray(history.level + history.trend / (1 - alpha))


def errors(path: Array, *, alpha: ArrayLike, warmup: int = 1) -> jax.Array:
    """How far each prediction is from the model that came, `||predicted_{t+1} - g_{t+1}||`.

    That of the historical reference, which takes the present model for the next one, is
    `jnp.linalg.norm(jnp.diff(path, axis=0), axis=1)`.

    Args:
      path: the global models of a simulation in their order, f32[rounds, d].
      alpha: as in `see`.
      warmup: as in `see`.

    Returns:
      f32[rounds - 1], the first for the model after `path[0]`.

    Static: warmup.

    Example:
      >>> import jax.numpy as jnp
      >>> from advjax.poisoning import prediction
      >>> prediction.errors(jnp.float32([[0], [1], [2], [3]]), alpha=0.5)
      Array([1.  , 1.  , 0.75], dtype=float32)
    """

    def step(history, models):
        present, following = models
        history = see(history, present, alpha=alpha, warmup=warmup)
        return history, jnp.linalg.norm(predict(history, alpha=alpha) - following)

    return jax.lax.scan(step, start(path[0]), (path[:-1], path[1:]))[1]
