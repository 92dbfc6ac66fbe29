"""Checks of what backdoors are given, beyond those of `advjax.core.checks`."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.core import checks
from advjax.core.typing import Array


def images(caller: str, x: Array) -> None:
    """Images are floats in [0, 1], [..., h, w, c] with any leading axes."""
    checks.images(caller, x)
    if jnp.ndim(x) < 3:
        raise ValueError(f"{caller}: need images of shape [..., h, w, c], got {jnp.shape(x)}.")


def same_shape(caller: str, x: Array, changed: Array) -> None:
    """A trigger keeps the shape of the images."""
    if jnp.shape(changed) != jnp.shape(x):
        raise ValueError(
            f"{caller}: need a trigger that keeps the images' shape {jnp.shape(x)}, got "
            f"{jnp.shape(changed)}."
        )


def share(caller: str, name: str, value: ArrayLike) -> None:
    """A share or a shade, where it is concrete, lies in [0, 1]."""
    if checks.is_concrete(value):
        numbers = np.asarray(value, np.float32)
        if not np.all((numbers >= 0) & (numbers <= 1)):
            raise ValueError(f"{caller}: need 0 <= {name} <= 1, got {name}={numbers.tolist()}.")


def label_map(caller: str, table: Array, num_classes: int) -> None:
    """A label map is int32[k]: classes, or -1 for not attacked, but not -1 everywhere.

    A class may stay what it is only where all that are attacked become that class.
    """
    table = table if hasattr(table, "dtype") else np.asarray(table)
    if jnp.shape(table) != (num_classes,) or not jnp.issubdtype(
        jnp.result_type(table), jnp.integer
    ):
        raise ValueError(
            f"{caller}: need a label map int32[{num_classes}], one entry a class, got "
            f"{jnp.result_type(table)}{list(jnp.shape(table))}."
        )
    if checks.is_concrete(table):
        entries = np.asarray(table)
        if entries.min() < -1 or not 0 <= entries.max() < num_classes:
            raise ValueError(
                f"{caller}: need a label map to 0 ... {num_classes - 1}, with -1 for the classes "
                f"that are not attacked and at least one that is, got {entries.tolist()}."
            )
        is_kept = entries == np.arange(num_classes)
        if is_kept.any() and len(set(entries[entries >= 0].tolist())) > 1:
            raise ValueError(
                f"{caller}: need a label map that changes every class that is attacked, or one "
                f"target for all of them, got {entries.tolist()}."
            )
