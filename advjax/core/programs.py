"""Steps of traced programs, for parts that read a classifier's program and not its architecture."""

from typing import Any

from jax.extend import core

_CALLS = ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit")


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
