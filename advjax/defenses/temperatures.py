"""Defensive distillation: networks trained at a high temperature and used at temperature 1."""

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from advjax import training
from advjax.core import checks, losses
from advjax.core.typing import Array, Key, LogitsFn


def at_temperature(
    key: Key, logits_fn: LogitsFn, x: Array, y: Array, *, temperature: ArrayLike = 100.0
) -> Array:
    """Cross-entropy of `softmax(logits / T)` with the labels: how the teacher is trained.

    Args:
      key: not used.
      logits_fn: classifier in training mode.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      temperature: T.

    Returns:
      f32[b].

    Raises:
      ValueError: a temperature that is not positive, images that are not floats in [0, 1].

    Source: N. Papernot et al., "Distillation as a Defense to Adversarial Perturbations against Deep
    Neural Networks", IEEE S&P 2016.
    """
    del key
    _check_temperature("at_temperature", temperature)
    checks.images("at_temperature", x)
    return losses.cross_entropy(logits_fn(x) / temperature, y)


def distilled(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    teacher: LogitsFn,
    temperature: ArrayLike = 100.0,
) -> Array:
    """Defensive distillation: cross-entropy with the teacher's softened answers, both at T.

    `-sum_i softmax(teacher(x) / T)_i log softmax(logits / T)_i`. The teacher has the student's
    architecture and was trained at T itself (`at_temperature`). The student is used at T = 1, as it
    is: its logits are some T times larger than usual, so the softmax saturates and the gradient of
    the cross-entropy vanishes. That hides the way from attacks that follow it, and from no other.

    Args:
      key: not used.
      logits_fn: classifier in training mode, the student.
      x: images, f32[b, h, w, c] in [0, 1].
      y: not used: the student only sees the teacher's answers.
      teacher: classifier, with the same classes.
      temperature: T.

    Returns:
      f32[b].

    Raises:
      ValueError: a temperature that is not positive, images that are not floats in [0, 1].

    Example:
      >>> import functools, jax
      >>> teacher = lambda x: x[:, 0, 0] * jax.numpy.array([10.0, 0.0])
      >>> x, y = jax.numpy.ones((1, 1, 1, 1)), jax.numpy.array([0])
      >>> loss_fn = functools.partial(distilled, teacher=teacher, temperature=10.0)
      >>> loss = loss_fn(jax.random.key(0), teacher, x, y)
      >>> print(f"{loss[0]:.4f}")  # the entropy of softmax([1, 0])
      0.5822

    Source: N. Papernot et al., "Distillation as a Defense to Adversarial Perturbations against Deep
    Neural Networks", IEEE S&P 2016.
    """
    del key, y
    _check_temperature("distilled", temperature)
    checks.images("distilled", x)
    targets = jax.nn.softmax(jax.lax.stop_gradient(training.inference(teacher)(x)) / temperature)
    return optax.softmax_cross_entropy(logits_fn(x) / temperature, targets)


def _check_temperature(caller: str, temperature: ArrayLike) -> None:
    if not checks.is_concrete(temperature):
        return
    values = np.asarray(temperature)
    if not np.all((values > 0) & (values < np.inf)):
        raise ValueError(f"{caller}: need a finite temperature > 0, got temperature={temperature}.")
