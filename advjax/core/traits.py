"""What an attack promises beyond its signature, so that a sweep can use it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

_ATTRIBUTE = "advjax_traits"
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Traits(NamedTuple):
    """Promises of an attack.

    Attributes:
      example_keys: it accepts one key an example, so its result does not depend on batching.
      monotone: if it fails at epsilon, it nearly always fails at every smaller one, as iterated
        and projected attacks do; a one-step attack overshoots, so it does not promise this.
    """

    example_keys: bool = False
    monotone: bool = False


def declare(
    *, example_keys: bool = False, monotone: bool = False
) -> Callable[[_Function], _Function]:
    """Decorator that attaches the promises to an attack."""

    def attach(function: _Function) -> _Function:
        setattr(function, _ATTRIBUTE, Traits(example_keys, monotone))
        return function

    return attach


def of(function: Callable[..., Any]) -> Traits:
    """The promises of an attack, or of the attack that a `functools.partial` configures."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, _ATTRIBUTE, Traits())
