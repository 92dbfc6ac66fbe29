"""Steps of traced programs, for parts that read a classifier's program and not its architecture."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from advjax.core.typing import Array

_CALLS = ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit")


def trace(function: Callable[[Array], Any], x: Array) -> core.ClosedJaxpr:
    """The program of a function for arrays like `x`, read anew each time.

    `jax.make_jaxpr` of the function itself would return what it was when it was first read, and a
    function may have got other weights since.
    """
    return jax.make_jaxpr(lambda x: function(x))(x)


def steps(program: Any) -> Iterator[Any]:
    """All steps of a program, those that call others and those inside of them."""
    for step in program.eqns:
        yield step
        for inner in core.jaxprs_in_params(step.params):
            yield from steps(inner)


def inside(step: Any) -> core.ClosedJaxpr | None:
    """The program that a step calls, or None if it calls none that can be read."""
    if step.primitive.name not in _CALLS:
        return None
    inner = step.params.get("call_jaxpr", step.params.get("jaxpr"))
    return inner if isinstance(inner, core.ClosedJaxpr) else None


def run(step: Any, operands: list[Any], **changes: Any) -> list[Any]:
    """The outputs of a step on other operands, and with other parameters if some are given."""
    params = step.primitive.get_bind_params(step.params)
    outputs = step.primitive.bind(*operands, **{**params, **changes})
    return list(outputs) if step.primitive.multiple_results else [outputs]
