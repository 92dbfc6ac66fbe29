"""Checks of what users hand in: one sentence that says what was given and what is allowed.

Shapes and dtypes are always checked; values only where they are concrete, so that nothing is paid
under `jit`.
"""

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advjax.core import classifier
from advjax.core.typing import Array, LogitsFn

# Decoders and resizers overshoot the box by a rounding; anything beyond is a scale mistake.
_BOX_TOLERANCE = 1e-6


def is_concrete(*values: ArrayLike) -> bool:
    """Whether the values can be looked at: nothing is being traced and this process holds them."""
    return all(
        not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)
        for value in values
    )


def known(caller: str, kind: str, name: str, names: Iterable[str]) -> None:
    """Raises a ValueError that lists the known names unless `name` is one of them."""
    names = list(names)
    if name not in names:
        raise ValueError(f"{caller}: unknown {kind} {name!r}; known: {', '.join(names)}.")


def _array(caller: str, name: str, value: Array) -> None:
    if not hasattr(value, "dtype"):
        raise ValueError(f"{caller}: need {name} as an array, got {type(value).__name__}.")


def four_axes(caller: str, x: Array) -> None:
    """Images have the shape [b, h, w, c]."""
    if jnp.ndim(x) != 4:
        raise ValueError(f"{caller}: need images of shape [b, h, w, c], got {jnp.shape(x)}.")


def images(caller: str, x: Array) -> None:
    """Images are floats in [0, 1], [b, ...]."""
    _array(caller, "images", x)
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(
            f"{caller}: need float images in [0, 1], got dtype {jnp.result_type(x)}; "
            "divide uint8 images by 255."
        )
    if jnp.ndim(x) < 2:
        raise ValueError(f"{caller}: need images of shape [b, h, w, c], got {jnp.shape(x)}.")
    if is_concrete(x) and np.size(x):
        values = np.asarray(x)  # numpy, since jnp would trace even a constant under jit
        low, high = float(values.min()), float(values.max())
        if not (low >= -_BOX_TOLERANCE and high <= 1 + _BOX_TOLERANCE):
            raise ValueError(f"{caller}: need images in [0, 1], got values in [{low}, {high}].")


def labels(caller: str, y: Array, x: Array, logits_fn: LogitsFn | None = None) -> None:
    """Labels are int[b], and classes of `logits_fn` where it is given."""
    _array(caller, "labels", y)
    if not jnp.issubdtype(jnp.result_type(y), jnp.integer):
        raise ValueError(f"{caller}: need integer labels, got dtype {jnp.result_type(y)}.")
    if jnp.shape(y) != jnp.shape(x)[:1]:
        raise ValueError(
            f"{caller}: need one label an image, got labels of shape {jnp.shape(y)} for images of "
            f"shape {jnp.shape(x)}."
        )
    if is_concrete(y) and np.size(y) and logits_fn is not None:
        num_classes = classifier.num_classes(logits_fn, x)
        values = np.asarray(y)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{caller}: need labels in 0 ... {num_classes - 1}, got {low} ... {high}."
            )


def updates(caller: str, value: Array) -> None:
    """Updates of clients are floats f32[n, d] of at least one client and one parameter."""
    _array(caller, "updates", value)
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"{caller}: need updates of shape [n, d], at least one client and one parameter, got "
            f"shape {shape}."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{caller}: need float updates, got dtype {dtype}.")


def untargeted(caller: str, attack: Any) -> None:
    """An attack that a `functools.partial` configures does not have `targeted=True`.

    For functions that take the labels of the attack for the truth.
    """
    function = attack
    while isinstance(function, functools.partial):
        if "targeted" in function.keywords:
            targeted = function.keywords["targeted"]
            if is_concrete(targeted) and targeted:
                raise ValueError(
                    f"{caller}: need an untargeted attack, since y are the true labels here, got "
                    "targeted=True; make the images with the attack itself and see "
                    "evaluation.accuracy on the true labels."
                )
            return
        function = function.func


def fixed_budget(caller: str, attack: Any) -> None:
    """An attack is called as `attack(key, logits_fn, x, y, epsilon)` and is not targeted."""
    try:
        signature = inspect.signature(attack, follow_wrapped=False)
    except (TypeError, ValueError):  # it does not say
        signature = None
    if signature is not None:
        try:
            signature.bind("key", "logits_fn", "x", "y", "epsilon")
        except TypeError:
            raise ValueError(
                f"{caller}: need attack(key, logits_fn, x, y, epsilon), got an attack with the "
                f"parameters ({', '.join(signature.parameters)}); for a minimum-norm attack see "
                "evaluation.minimal_curve."
            ) from None
    untargeted(caller, attack)


def one_or_each(caller: str, name: str, value: ArrayLike, x: Array) -> None:
    """A quantity is finite and not negative, one for all images or one an image."""
    if jnp.shape(value) not in ((), jnp.shape(x)[:1]):
        raise ValueError(
            f"{caller}: need one {name} or one an image ({jnp.shape(x)[0]}), got shape "
            f"{jnp.shape(value)}."
        )
    non_negative(caller, name, value)


def epsilon(caller: str, value: ArrayLike, x: Array) -> None:
    """An epsilon is finite and not negative, one for all images or one an image."""
    if jnp.shape(value) not in ((), jnp.shape(x)[:1]):
        raise ValueError(
            f"{caller}: need one epsilon or one an image ({jnp.shape(x)[0]}), got shape "
            f"{jnp.shape(value)}; for a curve over epsilons see evaluation.robust_accuracy."
        )
    non_negative(caller, "epsilon", value)


def non_negative(caller: str, name: str, value: ArrayLike) -> None:
    """A quantity, where it is concrete, is finite and not negative."""
    if is_concrete(value):
        numbers = np.asarray(value, np.float32)
        if not np.all(np.isfinite(numbers) & (numbers >= 0)):
            given = np.asarray(value, np.float64).tolist()  # -0.1, not -0.10000000149011612
            raise ValueError(f"{caller}: need a finite {name} >= 0, got {name}={given}.")


def at_least(caller: str, name: str, value: int, least: int) -> None:
    """A static count is an integer that is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{caller}: need {name} >= {least}, got {name}={value!r}.")


def attack_inputs(
    caller: str, logits_fn: LogitsFn, x: Array, y: Array, value: ArrayLike
) -> tuple[Array, Array]:
    """Checks what every attack is given and returns `x, y` as jax arrays."""
    images(caller, x)
    labels(caller, y, x, logits_fn)
    epsilon(caller, value, x)
    # What overshot the box by a rounding is moved into it.
    return jnp.clip(jnp.asarray(x), 0, 1), jnp.asarray(y)


def min_norm_inputs(caller: str, logits_fn: LogitsFn, x: Array, y: Array) -> tuple[Array, Array]:
    """Checks what every minimum-norm attack is given and returns `x, y` as jax arrays."""
    images(caller, x)
    four_axes(caller, x)
    labels(caller, y, x, logits_fn)
    if jnp.shape(x)[0] == 0:
        raise ValueError(f"{caller}: need at least one image, got none.")
    if classifier.num_classes(logits_fn, x) < 2:
        raise ValueError(f"{caller}: need a classifier of at least two classes, got one.")
    return jnp.clip(jnp.asarray(x), 0, 1), jnp.asarray(y)
