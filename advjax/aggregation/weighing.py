"""The weights that a rule puts on the clients, and which function gives them."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from advjax.core.typing import Array

_ATTRIBUTE = "weights_function"
_IS_SUM = "is_weighted_sum"
_Rule = TypeVar("_Rule", bound=Callable[..., Any])


def weighted_by(
    weights_function: Callable[..., Any], *, is_sum: bool = True
) -> Callable[[_Rule], _Rule]:
    """Decorator that names the function `updates -> f32[n]` of a rule `updates -> f32[d]`.

    Args:
      weights_function: takes the same arguments as the rule.
      is_sum: whether the rule is the weighted sum of the updates; else the weights only tell whose
        values it kept.
    """

    def attach(rule: _Rule) -> _Rule:
        setattr(rule, _ATTRIBUTE, weights_function)
        setattr(rule, _IS_SUM, is_sum)
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


def is_weighted_sum(rule: Callable[..., Any]) -> bool:
    """Whether a rule, or the one that a `functools.partial` configures, is the weighted sum."""
    while isinstance(rule, functools.partial):
        rule = rule.func
    return getattr(rule, _IS_SUM, False)


def nearest(distances: Array, count: int | Array) -> jax.Array:
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
    return jnp.asarray(is_counted) / jnp.maximum(jnp.sum(is_counted), 1)
