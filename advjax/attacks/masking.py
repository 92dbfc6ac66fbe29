"""Signs that a classifier hides its gradients, and the logits behind probabilities."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advjax.core import checks, classifier, losses
from advjax.core.typing import Array, LogitsFn


class GradientMaskingWarning(UserWarning):
    """An attack by gradients may overestimate the robustness of the classifier."""


_NUM_RETRACED = 32  # images that are looked at for random numbers of the host


class MaskingSigns(NamedTuple):
    """What a classifier shows on clean images.

    Attributes:
      num_images: how many images were looked at.
      num_unanswered: images with a logit that is not finite.
      num_flat: images at which the gradient of the cross-entropy is exactly zero.
      num_saturated: images at which the softmax is exactly one for a class.
      is_random: the classifier answers differently when it is traced again.
      is_probability: all outputs are probabilities: not negative, with sum one.
    """

    num_images: int
    num_unanswered: int
    num_flat: int
    num_saturated: int
    is_random: bool
    is_probability: bool

    def sentences(self) -> tuple[str, ...]:
        """One sentence for each sign that is there."""
        of = f"of {self.num_images} clean images"
        found = []
        if self.num_unanswered:
            found.append(
                f"The classifier returns logits that are not finite for {self.num_unanswered} {of}:"
                " it does not answer, which counts as wrong but not as a success of the attack."
            )
        if self.is_random:
            found.append(
                'The classifier is random: make it an advjax.Randomised and use version="rand".'
            )
        if self.is_probability:
            found.append(
                "The classifier returns probabilities, whose gradients vanish; the attacks use "
                "their logarithms."
            )
        if self.num_flat > self.num_images // 10:
            found.append(
                f"The gradient of the cross-entropy is zero at {self.num_flat} {of}: the gradient "
                "is masked, and attacks that follow it fail; trust those that only use logits."
            )
        if self.num_saturated > self.num_images // 10:
            found.append(
                f"The softmax is saturated at {self.num_saturated} {of}: large logits mask the "
                "gradient of the cross-entropy; trust the losses that do not depend on their scale."
            )
        return tuple(found)


def looks_like_probabilities(logits: Array) -> Array:
    """Whether all rows are not negative and sum to one, bool[]; rows that are no answer aside.

    Args:
      logits: f32[b, k].
    """
    answered = jnp.all(jnp.isfinite(logits), axis=-1)
    fits = jnp.all(logits >= 0, axis=-1) & (jnp.abs(jnp.sum(logits, axis=-1) - 1) < 1e-3)
    return jnp.any(answered) & jnp.all(fits | ~answered)


def masking_signs(logits_fn: LogitsFn, x: Array, y: Array) -> MaskingSigns:
    """Looks for signs that gradients do not tell how robust the classifier is.

    Args:
      logits_fn: classifier, images to logits f32[b, k].
      x: clean images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].

    Returns:
      `MaskingSigns`; its `sentences()` say what was found.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes.

    Source: the checks of AutoAttack (F. Croce, M. Hein, ICML 2020) and A. Athalye, N. Carlini,
    D. Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018.
    """
    x, y = checks.min_norm_inputs("masking_signs", logits_fn, x, y)
    logits_fn = classifier.as_pytree(logits_fn)
    logits, is_flat = _look(logits_fn, x, y)
    is_finite = np.isfinite(logits).all(axis=-1)
    largest = np.asarray(jax.nn.softmax(logits, axis=-1)).max(axis=-1)
    return MaskingSigns(
        num_images=len(logits),
        num_unanswered=int(np.sum(~is_finite)),
        num_flat=int(np.sum(is_flat & is_finite)),
        num_saturated=int(np.sum(largest[is_finite] == 1)),
        is_random=_is_random(logits_fn, x[:_NUM_RETRACED]),
        is_probability=bool(looks_like_probabilities(logits)),
    )


def _is_random(logits_fn: LogitsFn, x: Array) -> bool:
    """Whether two traces answer differently: random numbers of the host are frozen in a trace."""
    first, second = (np.asarray(jax.jit(lambda x: logits_fn(x))(x)) for _ in range(2))
    return not np.array_equal(first, second, equal_nan=True)


@jax.jit
def _compiled_look(logits_fn: LogitsFn, x: Array, y: Array) -> tuple[Array, Array]:
    def total(images):
        logits = logits_fn(images)
        return jnp.sum(losses.cross_entropy(logits, y)), logits

    gradient, logits = jax.grad(total, has_aux=True)(x)
    return logits, jnp.all(gradient == 0, axis=(1, 2, 3))


def _look(logits_fn: LogitsFn, x: Array, y: Array) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and where the gradient of the cross-entropy is zero, in batches of at most 256."""
    parts = [
        _compiled_look(logits_fn, x[i : i + 256], y[i : i + 256]) for i in range(0, len(x), 256)
    ]
    logits, is_flat = (
        np.concatenate([np.asarray(a) for a in part]) for part in zip(*parts, strict=True)
    )
    return logits, is_flat
