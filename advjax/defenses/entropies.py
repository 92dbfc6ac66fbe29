"""Entropy regularisation: a loss that also looks at how sure the network is."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax import training
from advjax.core import losses
from advjax.core.typing import Array, Key, LogitsFn


def entropy_regularised(
    key: Key,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    weight: ArrayLike,
    base_loss: Callable[..., Array] = training.cross_entropy,
    all_images: bool = False,
) -> Array:
    """Entropy regularisation: `base_loss + weight H(p(x))`, H the entropy of the softmax in nats.

    A positive weight is that of Cubuk et al.: it asks for answers of low entropy, which moves the
    largest logit away from the second, whose difference decides how far an adversarial example is.
    A negative weight is the opposite, the confidence penalty of Pereyra et al. Both change the
    scale of the logits, and with it the gradient of the cross-entropy: measure what they do with
    attacks that do not depend on that scale too (`losses.dlr`, `attacks.auto_attack`).

    Args:
      key: for `base_loss`.
      logits_fn: classifier in training mode.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].
      weight: of the entropy, of either sign.
      base_loss: what it is added to, such as `functools.partial(least_likely, epsilon=0.3)`.
      all_images: add the entropy to what every image costs, the attacked ones too; for a base loss
        with an `image_loss`, as `adversarial`, `least_likely` and `ensemble_adversarial` are.
        Otherwise it is the entropy of the clean images, whatever the base loss attacks.

    Returns:
      f32[b].

    Static: base_loss, all_images.

    Raises:
      ValueError: all images asked for with a base loss without an `image_loss`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x, y = jnp.zeros((1, 1, 1, 1)), jnp.array([0])
      >>> logits_fn = lambda x: jnp.zeros((1, 2))
      >>> entropy_regularised(jax.random.key(0), logits_fn, x, y, weight=1.0)  # log 2 twice
      Array([1.3862944], dtype=float32)

    Source: E. Cubuk, B. Zoph, S. Schoenholz, Q. Le, "Intriguing Properties of Adversarial
    Examples", 2017; G. Pereyra et al., "Regularizing Neural Networks by Penalizing Confident Output
    Distributions", 2017.
    """
    if all_images:
        if "image_loss" not in inspect.signature(base_loss).parameters:
            raise ValueError(
                "entropy_regularised: all_images=True needs a base_loss with an image_loss "
                "(adversarial, least_likely, ensemble_adversarial), got one without."
            )
        return base_loss(
            key, logits_fn, x, y,
            image_loss=lambda logits, labels: (
                losses.cross_entropy(logits, labels) + weight * _entropy(logits)
            ),
        )  # fmt: skip
    # The base loss last: training reports the accuracy on its last images.
    entropy = _entropy(logits_fn(x))
    return base_loss(key, logits_fn, x, y) + weight * entropy


def _entropy(logits: Array) -> Array:
    """Of the softmax in nats, f32[b]."""
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
