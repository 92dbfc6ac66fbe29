"""What is measured on logits: right or wrong, and how confident."""

import jax
import jax.numpy as jnp

from advjax.core.typing import Array


def predictions(logits: Array) -> Array:
    """Class with the largest logit, int32[b]; -1 where the logits are not finite.

    Args:
      logits: f32[b, k].
    """
    is_finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return jnp.where(is_finite, jnp.argmax(logits, axis=-1).astype(jnp.int32), -1)


def is_correct(logits: Array, labels: Array) -> Array:
    """Whether the network answers the label, bool[b]. Logits that are not finite are wrong.

    Args:
      logits: f32[b, k].
      labels: int32[b].
    """
    return predictions(logits) == labels


def is_fooled(logits: Array, labels: Array) -> Array:
    """Whether the network answers, and answers something else than the label, bool[b].

    Logits that are not finite are no answer: neither correct nor fooled.

    Args:
      logits: f32[b, k].
      labels: int32[b].
    """
    answers = predictions(logits)
    return (answers >= 0) & (answers != labels)


def confidence(logits: Array) -> Array:
    """Softmax probability of the network's answer, f32[b].

    Args:
      logits: f32[b, k].
    """
    return jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)
