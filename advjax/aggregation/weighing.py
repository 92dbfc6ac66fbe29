"""The weights that a rule puts on the clients, and which function gives them."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from advjax.core.typing import Array

_ATTRIBUTE = "weights_function"
_Rule = TypeVar("_Rule", bound=Callable[..., Any])


def weighted_by(weights_function: Callable[..., Any]) -> Callable[[_Rule], _Rule]:
    """Decorator that names the function `updates -> f32[n]` of a rule `updates -> f32[d]`.

    Both take the same arguments.
    """

    def attach(rule: _Rule) -> _Rule:
        setattr(rule, _ATTRIBUTE, weights_function)
        return rule

    return attach


def weights_function_of(rule: Callable[..., Any]) -> Callable[..., Any] | None:
    """The weights function of a rule, with the arguments of the `functools.partial` that
    configures it; None where a rule has no such weights.
    """
    if not isinstance(rule, functools.partial):
        return getattr(rule, _ATTRIBUTE, None)
    weights_function = weights_function_of(rule.func)
    if weights_function is None:
        return None
    return functools.partial(weights_function, *rule.args, **rule.keywords)


def nearest(distances: Array, count: ArrayLike) -> jax.Array:
    """Which entries are among the `count` smallest of their row, the first ones of equals.

    Args:
      distances: f32[..., n].
      count: how many; may be traced.

    Returns:
      bool[..., n].
    """
    return jnp.argsort(jnp.argsort(distances, axis=-1), axis=-1) < count


def equal(is_counted: Array) -> jax.Array:
    """Equal weights f32[n] for the clients bool[n] that are counted; 0 if none is."""
    return is_counted / jnp.maximum(jnp.sum(is_counted), 1)
