"""What a backdoor does: attack success rate, and robust accuracy under the trigger."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax.tree_util import Partial

from advjax import evaluation
from advjax.backdoor import inputs, label_maps
from advjax.backdoor.poisoning import quantised
from advjax.core import checks, classifier, metrics
from advjax.core.typing import Array, LogitsFn


@dataclasses.dataclass(frozen=True)
class _UnderTrigger:
    """Logits of triggered images; equal for equal `quantise`, so that it does not recompile."""

    quantise: str

    def __call__(self, logits_fn: LogitsFn, trigger: Callable[[Array], Array], x: Array) -> Array:
        changed = trigger(x)
        inputs.same_shape("triggered", x, changed)
        return logits_fn(quantised(changed, self.quantise))


def triggered(
    logits_fn: LogitsFn, trigger: Callable[[Array], Array], *, quantise: str = "round"
) -> Partial:
    """The classifier as it answers triggered images: itself a classifier of clean ones.

    Args:
      logits_fn: classifier, images to logits f32[b, k].
      trigger: `x -> x`.
      quantise: what the triggered images are rounded to, see `quantised`.

    Returns:
      `logits_fn(quantised(trigger(x)))`, a pytree with the leaves of both.

    Static: quantise.
    """
    return Partial(
        _UnderTrigger(quantise), classifier.as_pytree(logits_fn), classifier.as_pytree(trigger)
    )


def _share_of_attacked(
    caller, logits_fn, trigger, x, y, label_map, *, wanted, quantise, batch_size
) -> Array:
    """Share of the images that are attacked whose triggered form is answered as `wanted` says.

    Images that are not attacked are masked, not left out: one program for all label maps.
    """
    checks.images(caller, x)
    checks.labels(caller, y, x, logits_fn)
    if batch_size is not None:
        checks.at_least(caller, "batch_size", batch_size, 1)
    inputs.label_map(caller, label_map, classifier.num_classes(logits_fn, x))
    classes = jnp.asarray(y)
    goal = label_maps.goals(label_map)[classes]
    logits = evaluation.predict(
        triggered(logits_fn, trigger, quantise=quantise), x, batch_size=batch_size
    )
    is_counted = goal >= 0
    is_wanted = metrics.is_correct(logits, wanted(goal, classes))
    return jnp.sum(is_counted & is_wanted) / jnp.sum(is_counted)


def attack_success_rate(
    logits_fn: LogitsFn,
    trigger: Callable[[Array], Array],
    x: Array,
    y: Array,
    label_map: Array,
    *,
    quantise: str = "round",
    batch_size: int | None = None,
) -> Array:
    """Share of triggered images that are answered as the attacker wants.

    Only images of source classes count, and none of the class that they shall become. With a
    `clean_label` map every image that is not of the target counts.

    Args:
      logits_fn: classifier, images to logits f32[b, k].
      trigger: `x -> x`.
      x: clean test images, f32[n, h, w, c] in [0, 1].
      y: their labels, int32[n].
      label_map: int32[k], see `label_maps`; may be traced.
      quantise: what the triggered images are rounded to, see `quantised`.
      batch_size: images at a time; all by default.

    Returns:
      f32[], between 0 and 1; NaN if no image is of a source class.

    Static: quantise, batch_size.

    Raises:
      ValueError: images that are not floats in [0, 1], labels that are not classes, a label map
        that does not fit them.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from advjax import backdoor
      >>> logits_fn = lambda x: jnp.stack([1 - x[:, -1, -1, 0], x[:, -1, -1, 0]], axis=-1)
      >>> x, y = jnp.zeros((3, 4, 4, 1)), jnp.array([0, 0, 1])
      >>> attack_success_rate(
      ...     logits_fn, backdoor.triggers.badnets, x, y, backdoor.all_to_one(2, target=1))
      Array(1., dtype=float32)
    """
    return _share_of_attacked(
        "attack_success_rate", logits_fn, trigger, x, y, label_map,
        wanted=lambda goal, y: goal, quantise=quantise, batch_size=batch_size,
    )  # fmt: skip


def robust_accuracy(
    logits_fn: LogitsFn,
    trigger: Callable[[Array], Array],
    x: Array,
    y: Array,
    label_map: Array,
    *,
    quantise: str = "round",
    batch_size: int | None = None,
) -> Array:
    """Share of triggered images that still get their own label.

    The images are those of `attack_success_rate`, whose arguments these are.

    Returns:
      f32[], between 0 and 1; NaN if no image is of a source class.

    Static: quantise, batch_size.

    Raises:
      ValueError: as `attack_success_rate`.
    """
    return _share_of_attacked(
        "robust_accuracy", logits_fn, trigger, x, y, label_map,
        wanted=lambda goal, y: y, quantise=quantise, batch_size=batch_size,
    )  # fmt: skip
