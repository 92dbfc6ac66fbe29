"""Adversarial error over epsilon, of one classifier or of a stack."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax import evaluation
from advjax.core import checks, classifier, metrics, random, traits
from advjax.core.typing import Array, Attack, Key, LogitsFn


class AdversarialError(NamedTuple):
    """What an attack does to classifiers, at every epsilon; with a model axis first for a stack.

    Attributes:
      error: share of the images answered correctly when clean that are adversarial, f32[e].
      success: which images are, bool[e, n].
      is_correct: which images are answered correctly when clean, bool[n].
    """

    error: Array
    success: Array
    is_correct: Array


def adversarial_error(
    key: Key,
    attack: Attack,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    epsilons: ArrayLike,
    *,
    models: str | None = None,
    batch_size: int | None = None,
) -> AdversarialError:
    """The adversarial error at every epsilon, of the images that are answered correctly when clean.

    It goes to 0 with epsilon, as a power law does; the error over all images would go to the clean
    one. An image that is adversarial at epsilon counts at every larger one (`evaluation.survival`).

    Args:
      key: a key.
      attack: such as `attacks.fgsm`, `attacks.fgm`, `attacks.pgd` or `attacks.least_likely`.
      logits_fn: a classifier, or with `models` a stack of them.
      x: images, f32[n, h, w, c] in [0, 1].
      y: labels, int32[n].
      epsilons: f32[e].
      models: None for one classifier; for a stack "vmap", side by side, or "map", one after the
        other, which needs less memory and on a CPU is as fast for all but the smallest networks.
      batch_size: images at a time; all by default.

    Returns:
      An `AdversarialError`. Its error is NaN where no image is answered correctly.

    Static: attack, models, batch_size.

    Raises:
      ValueError: what `evaluation.robust_accuracy` raises, an unknown `models`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from advjax import attacks
      >>> x, y = jnp.array([0.1, 0.4, 0.6, 0.9]).reshape(4, 1, 1, 1), jnp.array([0, 0, 1, 1])
      >>> logits_fn = lambda x: (x[:, 0, 0] - 0.5) * jnp.array([-1.0, 1.0])
      >>> adversarial_error(jax.random.key(0), attacks.fgsm, logits_fn, x, y, [0.05, 0.2]).error
      Array([0. , 0.5], dtype=float32)

    Source: E. Cubuk, B. Zoph, S. Schoenholz, Q. Le, "Intriguing Properties of Adversarial
    Examples", 2017. That the clean errors are left out is our choice.
    """
    checks.known("adversarial_error", "models", str(models), ("None", "vmap", "map"))
    key = random.as_typed(key)
    epsilons = jnp.asarray(epsilons, jnp.float32)
    # Side by side an attack of one step takes its gradient once, since epsilon is not in it.
    is_iterated = traits.of(attack).monotone
    method = "bisect" if is_iterated else "vmap"

    def of_one(logits_fn: LogitsFn) -> AdversarialError:
        logits = evaluation.predict(logits_fn, x, batch_size=batch_size)
        is_correct = metrics.is_correct(logits, jnp.asarray(y))
        withstands = evaluation.survival(
            key, attack, logits_fn, x, y, epsilons, method=method, batch_size=batch_size
        )
        success = is_correct & ~withstands
        return AdversarialError(
            jnp.sum(success, axis=-1) / jnp.sum(is_correct), success, is_correct
        )

    if models is None:
        return of_one(logits_fn)
    stack = classifier.as_pytree(logits_fn)
    return jax.vmap(of_one)(stack) if models == "vmap" else jax.lax.map(of_one, stack)
