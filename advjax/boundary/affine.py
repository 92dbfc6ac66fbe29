"""What a network computes alike for all points of a plane, computed once.

On the points `x + a * u + b * v` everything that is affine in the image is itself
`f(x) + a * g(u) + b * g(v)`, with g the linear part of f: normalisation and a first convolution
cost three images, whatever the number of points. This is found in the program of the function, not
in its architecture: the program for one image says what is shared, the program for a batch, which
has the same steps, goes on from there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from advjax.core import programs
from advjax.core.typing import Array


class _Affine(NamedTuple):
    """A value `at + a * u + b * v` of one image, with a and b not yet chosen."""

    at: Array
    u: Array
    v: Array


class _Constant(NamedTuple):
    """A value that does not depend on the image, in the program for one and in that for many."""

    one: Any
    many: Any


# Linear in the first operand, whatever the others are.
_STRUCTURAL = frozenset({
    "broadcast_in_dim", "copy", "div", "dynamic_slice", "neg", "optimization_barrier", "reduce_sum",
    "reduce_window_sum", "reshape", "rev", "slice", "squeeze", "transpose",
})  # fmt: skip
_PRODUCTS = frozenset({"conv_general_dilated", "dot_general", "mul"})  # linear in either operand
_SUMS = frozenset({"add", "add_any", "concatenate", "pad", "sub"})  # linear in all together


class _DifferentError(Exception):
    """The two programs do not fit each other, so that nothing can be shared."""


def on_points(
    function: Callable[[Array], Array], x: Array, u: Array, v: Array, a: Array, b: Array
) -> Array:
    """The function on points of a plane, its affine start shared by all of them.

    Args:
      function: images f32[m, ...] to an array, traceable, each image by itself.
      x: where the plane starts, f32[...].
      u: its first direction.
      v: its second direction.
      a: coordinates along `u`, f32[m].
      b: coordinates along `v`, f32[m].

    Returns:
      `function(x + a * u + b * v)`, up to rounding.
    """
    batch = jnp.broadcast_to(x, (a.size, *x.shape))
    one, many = programs.trace(function, x[None]), programs.trace(function, batch)
    points, start = _Points(a, b), _Affine(x[None], u[None], v[None])
    try:
        (value,) = points.evaluate(one, many, [start])
        return points.settled(value)
    except _DifferentError:
        return function(points.settled(start))


class _Points(NamedTuple):
    a: Array
    b: Array

    def settled(self, value: Any) -> Any:
        """The value at all points, the first axis, as the program for many has it there."""
        if isinstance(value, _Constant):
            return value.many
        if not isinstance(value, _Affine):
            return value
        at, u, v = value
        a, b = (c.astype(at.dtype).reshape(-1, *[1] * (at.ndim - 1)) for c in self)
        return at + a * u + b * v

    def evaluate(self, one, many, inputs: list[Any]) -> list[Any]:
        """The outputs of the program for many, not settled, step by step with that for one."""
        values: dict[Any, Any] = dict(zip(many.jaxpr.invars, inputs, strict=True))
        for variable, *consts in zip(many.jaxpr.constvars, one.consts, many.consts, strict=True):
            values[variable] = _Constant(*consts)
        if [e.primitive for e in one.jaxpr.eqns] != [e.primitive for e in many.jaxpr.eqns]:
            raise _DifferentError

        def read(atom):
            is_literal = isinstance(atom, core.Literal)
            return _Constant(atom.val, atom.val) if is_literal else values[atom]

        for step_one, step_many in zip(one.jaxpr.eqns, many.jaxpr.eqns, strict=True):
            operands = [read(atom) for atom in step_many.invars]
            outputs = self._step(step_one, step_many, operands)
            values.update(zip(step_many.outvars, outputs, strict=True))
        return [read(atom) for atom in many.jaxpr.outvars]

    def _step(self, one, many, operands: list[Any]) -> list[Any]:
        if all(isinstance(operand, _Constant) for operand in operands):
            parts = (programs.run(s, [o[i] for o in operands]) for i, s in enumerate((one, many)))
            return [_Constant(*both) for both in zip(*parts, strict=True)]
        if any(isinstance(operand, _Affine) for operand in operands):
            inner = programs.inside(one), programs.inside(many)
            if inner[0] is not None and inner[1] is not None:
                # What is shared goes on inside a call, and behind it.
                return self.evaluate(*inner, operands)
            parts = _linear(one, operands)
            if parts is not None and self._are_images(parts, many):
                return parts
        return programs.run(many, [self.settled(operand) for operand in operands])

    def _are_images(self, values: list[Any], many) -> bool:
        """Whether each value has one entry an image, first axis, in the order of the images.

        Its shape tells: copies of a batch or an axis before it make another one. Only a reversal
        does not.
        """
        if many.primitive.name == "rev" and 0 in many.params["dimensions"]:
            return False
        return all(
            value.at.shape[:1] == (1,) and variable.aval.shape == (self.a.size, *value.at.shape[1:])
            for value, variable in zip(values, many.outvars, strict=True)
        )


def _linear(step, operands: list[Any]) -> list[Any] | None:
    """The step on the three parts of its affine operands, or None if it is not linear in them."""
    name = step.primitive.name
    is_affine = [isinstance(operand, _Affine) for operand in operands]
    if not all(isinstance(operand, _Affine | _Constant) for operand in operands):
        return None
    is_cast = name == "convert_element_type" and jnp.issubdtype(
        step.outvars[0].aval.dtype, jnp.floating
    )
    is_linear = (
        ((name in _STRUCTURAL or is_cast) and is_affine == [True] + [False] * (len(operands) - 1))
        or (name in _PRODUCTS and sum(is_affine) == 1)
        or name in _SUMS
    )
    if not is_linear:
        return None

    def part(number: int) -> list[Any]:
        def of(operand):
            if isinstance(operand, _Affine):
                return operand[number]
            # What is added belongs to `at` alone; what is multiplied belongs to all parts.
            adds = name in _SUMS and number > 0
            return jnp.zeros_like(operand.one) if adds else operand.one

        return programs.run(step, [of(operand) for operand in operands])

    return [_Affine(*parts) for parts in zip(part(0), part(1), part(2), strict=True)]
