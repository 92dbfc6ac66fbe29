"""Losses that attacks ascend: functions of logits f32[b, k] and labels int32[b], one value each.

All are large when the network is wrong about the label, so an untargeted attack ascends them and
a targeted attack descends them with the target as the label.
"""

import jax
import jax.numpy as jnp
import optax

from advjax.core.typing import Array


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy of the softmax with the label.

    Args:
      logits: f32[b, k].
      labels: int32[b].

    Returns:
      f32[b], in nats.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _best_other(logits: Array, labels: Array) -> Array:
    """Largest logit among the other classes, f32[b]; minus infinity masks the label itself."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)


def _of_label(logits: Array, labels: Array) -> Array:
    return jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def margin(logits: Array, labels: Array) -> Array:
    """Margin by which the best other class beats the label: `max_{i != y} z_i - z_y`.

    Positive exactly when the label is not the network's answer. Unlike the cross-entropy it does
    not saturate where the softmax is confident.

    Args:
      logits: f32[b, k].
      labels: int32[b].

    Returns:
      f32[b].

    Source: N. Carlini, D. Wagner, "Towards Evaluating the Robustness of Neural Networks",
    IEEE S&P 2017 (their f_6 with kappa infinite).
    """
    return _best_other(logits, labels) - _of_label(logits, labels)


def dlr(logits: Array, labels: Array) -> Array:
    """Difference of logits ratio: `-(z_y - max_{i != y} z_i) / (z_(1) - z_(3))`.

    Invariant to shifting and to scaling the logits, so a temperature cannot mask its gradient.

    Args:
      logits: f32[b, k] with k >= 3.
      labels: int32[b].

    Returns:
      f32[b], at least -1.

    Raises:
      ValueError: fewer than three classes.

    Source: F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
    Diverse Parameter-free Attacks", ICML 2020.
    """
    if logits.shape[-1] < 3:
        raise ValueError(f"dlr: need at least 3 classes, got num_classes={logits.shape[-1]}.")
    top, _ = jax.lax.top_k(logits, 3)
    spread = top[..., 0] - top[..., 2]
    # Three equal top logits would divide by zero, and by a tiny number the gradient would overflow.
    spread = jnp.where(spread > 0, spread, 1)
    return margin(logits, labels) / spread


def dlr_targeted(logits: Array, labels: Array, targets: Array) -> Array:
    """Targeted difference of logits ratio: `-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)`.

    Ascended by an untargeted attack that goes by way of one class.

    Args:
      logits: f32[b, k] with k >= 4.
      labels: int32[b].
      targets: int32[b].

    Returns:
      f32[b].

    Raises:
      ValueError: fewer than four classes.

    Source: F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
    Diverse Parameter-free Attacks", ICML 2020.
    """
    if logits.shape[-1] < 4:
        raise ValueError(
            f"dlr_targeted: need at least 4 classes, got num_classes={logits.shape[-1]}."
        )
    top, _ = jax.lax.top_k(logits, 4)
    spread = top[..., 0] - (top[..., 2] + top[..., 3]) / 2
    spread = jnp.where(spread > 0, spread, 1)
    return (_of_label(logits, targets) - _of_label(logits, labels)) / spread
