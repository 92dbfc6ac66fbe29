"""Checks of what detectors are given, beyond those of `advjax.core.checks`."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from advjax.core import checks, classifier
from advjax.core.typing import Array, LogitsFn
from advjax.detectors.outliers import MIN_VALUES


def classes(
    caller: str,
    logits_fn: LogitsFn,
    image_shape: Sequence[int],
    num_classes: int,
    *,
    least: int = MIN_VALUES,
) -> None:
    """The classifier has `num_classes` classes, for images of that shape; and at least some."""
    checks.at_least(caller, "num_classes", num_classes, least)
    found = classifier.num_classes(logits_fn, np.zeros((1, *image_shape), np.float32))
    if found != num_classes:
        raise ValueError(
            f"{caller}: need num_classes={found}, as many as the classifier's logits, got "
            f"num_classes={num_classes}."
        )


def clean_images(
    caller: str, logits_fn: LogitsFn, x: Array, y: Array | None, num_classes: int
) -> Array:
    """Checks clean images, their labels where there are any, and the number of classes."""
    checks.images(caller, x)
    checks.four_axes(caller, x)
    if len(x) == 0:
        raise ValueError(f"{caller}: need at least one clean image, got none.")
    classes(caller, logits_fn, x.shape[1:], num_classes)
    if y is not None:
        checks.labels(caller, y, x, logits_fn)
    return jnp.asarray(x)
