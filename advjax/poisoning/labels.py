"""Poisoning of the data that a malicious client trains on."""

import jax
import jax.numpy as jnp
import numpy as np

from advjax.core import checks
from advjax.core.typing import Array


def _classes(caller: str, name: str, values: Array, num_classes: int) -> None:
    if not hasattr(values, "dtype") or not jnp.issubdtype(values.dtype, jnp.integer):
        got = f"dtype {values.dtype}" if hasattr(values, "dtype") else type(values).__name__
        raise ValueError(f"{caller}: need {name} as an array of integers, got {got}.")
    if checks.is_concrete(values) and np.size(values):
        low, high = int(np.min(values)), int(np.max(values))
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{caller}: need {name} in 0 ... {num_classes - 1}, got {low} ... {high}."
            )


def label_flip(labels: Array, num_classes: int, *, target: Array | None = None) -> jax.Array:
    """Label flip: label l becomes `num_classes - 1 - l`, or what a table says.

    Knowledge: the malicious client's own data.

    Args:
      labels: labels of any shape, int32[...].
      num_classes: k.
      target: what each label becomes, int32[k].

    Returns:
      The labels to train on, like `labels`.

    Static: num_classes.

    Raises:
      ValueError: labels or targets that are not integers in 0 ... k - 1, a table of another
        length, fewer than two classes.

    Example:
      >>> import jax.numpy as jnp
      >>> label_flip(jnp.array([0, 1, 9]), 10)
      Array([9, 8, 0], dtype=int32)

    Source: V. Tolpegin et al., "Data Poisoning Attacks Against Federated Learning Systems",
    ESORICS 2020 (tables); M. Fang, X. Cao, J. Jia, N. Gong, "Local Model Poisoning Attacks to
    Byzantine-Robust Federated Learning", USENIX Security 2020 (the reversal).
    """
    checks.at_least("label_flip", "num_classes", num_classes, 2)
    _classes("label_flip", "labels", labels, num_classes)
    if target is None:
        return num_classes - 1 - jnp.asarray(labels)
    _classes("label_flip", "target", target, num_classes)
    if jnp.shape(target) != (num_classes,):
        raise ValueError(
            f"label_flip: need one target a class ({num_classes}), got shape {jnp.shape(target)}."
        )
    return jnp.asarray(target)[labels].astype(labels.dtype)
