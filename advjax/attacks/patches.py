"""What one painted pixel changes in a network, computed for many variants of each image.

Behind a few convolutions and poolings a painted pixel still reaches only a window of each map; all
around it a variant has the map of its clean image, which is computed once. So only the windows are
computed, until one fills half of its map or meets a step that mixes places (flattening, a mean).
This is found in the program of the function, not in its architecture, and what is not known here
is simply computed whole.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import AxisType

from advjax.attacks import queries
from advjax.core import programs
from advjax.core.typing import Array, LogitsFn
from advjax.models import layers


def answers(
    logits_fn: LogitsFn, x: Array, rows: jax.Array, columns: jax.Array, colours: jax.Array
) -> Array:
    """Logits of variants of each image with one pixel painted.

    Args:
      logits_fn: classifier, traceable.
      x: clean images, f32[b, h, w, c].
      rows: row of the pixel of each variant, int32[b, n].
      columns: its column, int32[b, n].
      colours: its new colour, f32[b, n, c].

    Returns:
      f32[b, n, k], those of `logits_fn` on the painted images up to rounding.
    """
    b, n = rows.shape
    if b * n == 0 or AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types:
        # Nothing to share, or arrays whose every step would have to say how it is divided.
        return queries.ask(logits_fn, _painted(x, rows, columns, colours))
    with layers.in_lax():
        program = programs.trace(logits_fn, jnp.repeat(x, n, axis=0))
    variants = _Variants(rows.reshape(-1), columns.reshape(-1), jnp.repeat(jnp.arange(b), n))
    window = colours.reshape(b * n, 1, 1, -1)
    start = _Local(jnp.asarray(x), window, np.arange(x.shape[1]), np.arange(x.shape[2]))
    if any(step.primitive.name in _CONTROL for step in programs.steps(program.jaxpr)):
        # What is inside would run as it was traced, in forms that are not the fast ones here.
        return queries.ask(logits_fn, _painted(x, rows, columns, colours))
    (logits,) = (variants.settled(value) for value in variants.evaluate(program, [start]))
    return logits.reshape(b, n, math.prod(logits.shape[1:]))


def _painted(x: Array, rows: jax.Array, columns: jax.Array, colours: jax.Array) -> jax.Array:
    def one(image, row, column, colour):
        return image.at[row, column].set(colour)

    return jax.vmap(jax.vmap(one, (None, 0, 0, 0)))(x, rows, columns, colours)


class _Local(NamedTuple):
    """A map of all variants: that of the clean image, but for a window within it.

    Attributes:
      clean: [b, height, width, c].
      window: [m, p, q, c].
      top: first row of the window for each row of the painted pixel, int[h].
      left: first column for each column of the pixel, int[w].
    """

    clean: jax.Array
    window: jax.Array
    top: np.ndarray
    left: np.ndarray


class _Constant(NamedTuple):
    """A value that does not depend on the images; its axes may still be 1 where `shape` is not."""

    value: Any
    shape: tuple[int, ...]


class _Axis(NamedTuple):
    """A window along one axis of a map: first place for each place of the pixel, and length."""

    first: np.ndarray
    length: int


class _Window(NamedTuple):
    """Where a window lies on a map, or beyond its edge."""

    rows: _Axis
    columns: _Axis


# Programs inside of these are not gone into.
_CONTROL = frozenset({"checkpoint", "cond", "remat2", "scan", "shard_map", "while"})
# Each place by itself.
_ELEMENTWISE = frozenset({
    "abs", "add", "add_any", "clamp", "convert_element_type", "copy", "cos", "div", "eq", "erf",
    "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "pcast", "pow", "pvary", "round",
    "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tanh",
})  # fmt: skip


class _Variants(NamedTuple):
    """Which pixel each variant has painted in which image, int32[m] each."""

    rows: jax.Array
    columns: jax.Array
    image: jax.Array

    def evaluate(self, program: core.ClosedJaxpr, inputs: list[Any]) -> list[Any]:
        """The outputs of the program, not settled."""
        values: dict[Any, Any] = dict(zip(program.jaxpr.invars, inputs, strict=True))
        for variable, const in zip(program.jaxpr.constvars, program.consts, strict=True):
            values[variable] = _Constant(const, variable.aval.shape)

        def read(atom):
            is_literal = isinstance(atom, core.Literal)
            return _Constant(atom.val, np.shape(atom.val)) if is_literal else values[atom]

        for step in program.jaxpr.eqns:
            outputs = self._step(step, [read(atom) for atom in step.invars])
            values.update(zip(step.outvars, outputs, strict=True))
        return [read(atom) for atom in program.jaxpr.outvars]

    def _step(self, step, operands: list[Any]) -> list[Any]:
        if all(isinstance(operand, _Constant) for operand in operands):
            return _on_constants(step, operands)
        inner = programs.inside(step)
        if inner is not None:  # windows go on inside a call, and behind it
            return self.evaluate(inner, operands)
        if any(isinstance(operand, _Local) for operand in operands):
            rule = _RULES.get(step.primitive.name)
            output = None if rule is None else rule(self, step, operands)
            if output is not None:
                return [output]
        operands = [self.settled(operand) for operand in operands]
        compute = _COMPUTE.get(step.primitive.name)
        return programs.run(step, operands) if compute is None else [compute(step, operands)]

    def settled(self, value: Any) -> Any:
        """The value as the program has it, whole for every variant."""
        if isinstance(value, _Constant):
            return jnp.broadcast_to(value.value, value.shape) if value.shape else value.value
        if not isinstance(value, _Local):
            return value
        b, height, width, c = value.clean.shape
        whole = jnp.broadcast_to(value.clean[:, None], (b, self.image.size // b, height, width, c))
        whole = whole.reshape(self.image.size, height, width, c)
        return self._pasted(whole, value, np.zeros_like(value.top), np.zeros_like(value.left))

    def region(self, value: _Local, axes: _Window, outside: float) -> jax.Array:
        """Every variant's map within a window, [m, p, q, c], and a number outside the map."""
        rows, columns = axes
        _, height, width, _ = value.clean.shape
        i, is_row = _places(rows, self.rows, height)
        j, is_column = _places(columns, self.columns, width)
        region = _rows_of(value.clean, self.image[:, None, None], i, j)
        region = self._pasted(region, value, rows.first, columns.first)
        if is_row is not None:
            region = jnp.where(is_row[:, :, None, None], region, outside)
        if is_column is not None:
            region = jnp.where(is_column[:, None, :, None], region, outside)
        return region

    def _pasted(
        self, region: jax.Array, value: _Local, top: np.ndarray, left: np.ndarray
    ) -> jax.Array:
        """The value's window within a region of its map that starts at `top` and `left`."""
        m, height, width, _ = region.shape
        _, p, q, _ = value.window.shape
        row = jnp.arange(height) - jnp.asarray(value.top - top)[self.rows][:, None]
        column = jnp.arange(width) - jnp.asarray(value.left - left)[self.columns][:, None]
        is_row, is_column = (row >= 0) & (row < p), (column >= 0) & (column < q)
        # Read, not written: a scatter is many times slower on a CPU.
        i, j = jnp.clip(row, 0, p - 1), jnp.clip(column, 0, q - 1)
        window = _rows_of(value.window, jnp.arange(m)[:, None, None], i, j)
        return jnp.where((is_row[:, :, None] & is_column[:, None, :])[..., None], window, region)


def _rows_of(maps: jax.Array, image: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """Places i [m, p], j [m, q] of maps [b, h, w, c], those of each image int[m, 1, 1]."""
    b, height, width, c = maps.shape
    index = (image * height + i[:, :, None]) * width + j[:, None, :]
    return maps.reshape(b * height * width, c).at[index].get(mode="promise_in_bounds")


def _places(axis: _Axis, pixel: jax.Array, size: int) -> tuple[jax.Array, jax.Array | None]:
    """Places of each variant's window, int32[m, length], and which lie on the map, if not all."""
    place = jnp.asarray(axis.first)[pixel][:, None] + jnp.arange(axis.length)
    if axis.first.min() >= 0 and axis.first.max() + axis.length <= size:
        return place, None
    return jnp.clip(place, 0, size - 1), (place >= 0) & (place < size)


def _on_constants(step, operands: list[_Constant]) -> list[_Constant]:
    if step.primitive.name == "broadcast_in_dim" and len(operands) == 1:
        # To the places of a map only where it is needed.
        shape = [1] * len(step.params["shape"])
        for axis, size in zip(
            step.params["broadcast_dimensions"], np.shape(operands[0].value), strict=True
        ):
            shape[axis] = size
        return [_Constant(jnp.reshape(operands[0].value, shape), step.params["shape"])]
    if len(operands) == 1 and step.primitive.name in _ELEMENTWISE:
        return [_Constant(programs.run(step, [operands[0].value])[0], operands[0].shape)]
    values = [
        operand.value
        if np.shape(operand.value) == operand.shape
        else jnp.broadcast_to(operand.value, operand.shape)
        for operand in operands
    ]
    return [_Constant(value, np.shape(value)) for value in programs.run(step, values)]


def _elementwise(variants: _Variants, step, operands: list[Any]) -> _Local | None:
    maps = [operand for operand in operands if isinstance(operand, _Local)]
    if len({value.clean.shape[:3] for value in maps}) > 1:
        return None
    for operand in operands:
        if isinstance(operand, _Constant):
            if np.shape(operand.value)[:-1] not in ((), (1, 1, 1)):
                return None  # it differs between places
        elif not isinstance(operand, _Local):
            return None
    _, height, width, _ = maps[0].clean.shape
    rows = _union([(value.top, value.window.shape[1]) for value in maps], height)
    columns = _union([(value.left, value.window.shape[2]) for value in maps], width)
    if 2 * rows.length * columns.length > height * width:
        return None

    def on_clean(operand):
        return operand.clean if isinstance(operand, _Local) else operand.value

    def on_window(operand):
        if isinstance(operand, _Constant):
            return operand.value
        is_same = operand.window.shape[1:3] == (rows.length, columns.length) and (
            np.array_equal(operand.top, rows.first) and np.array_equal(operand.left, columns.first)
        )
        return operand.window if is_same else variants.region(operand, _Window(rows, columns), 0)

    def output(values):
        shape = np.broadcast_shapes(*(np.shape(value) for value in values))
        values = [
            value if np.shape(value) in ((), shape) else jnp.broadcast_to(value, shape)
            for value in values
        ]
        return programs.run(step, values)[0]

    clean, window = (output([f(o) for o in operands]) for f in (on_clean, on_window))
    return _Local(clean, window, rows.first, columns.first)


def _is_convolution_of_images(params) -> bool:
    numbers = params["dimension_numbers"]
    return (
        (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
        == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        and set((*params["lhs_dilation"], *params["rhs_dilation"])) == {1}
        and params["batch_group_count"] == 1
    )


def _convolve(step, operands: list[jax.Array], **changes: Any) -> jax.Array:
    """The convolution of a step, in the form that is fast here."""
    params = {**step.params, **changes}
    x, kernel = operands
    is_default = params["precision"] is None and params["preferred_element_type"] in (None, x.dtype)
    is_padded = np.min(params["padding"]) >= 0  # and nothing cut off
    if not (is_default and is_padded and _is_convolution_of_images(params)):
        return programs.run(step, operands, **changes)[0]
    return layers.conv2d(
        x,
        kernel,
        strides=params["window_strides"],
        padding=params["padding"],
        groups=params["feature_group_count"],
    )


def _convolution(variants: _Variants, step, operands: list[Any]) -> _Local | None:
    value, kernel = operands
    is_plain = (
        isinstance(value, _Local)
        and isinstance(kernel, _Constant)
        and _is_convolution_of_images(step.params)
        # By channels it is no product, and XLA computes it anew for each place that reads it.
        and step.params["feature_group_count"] == 1
    )
    if not is_plain:
        return None
    kernel = variants.settled(kernel)
    strides, pads = step.params["window_strides"], step.params["padding"]
    reached = _reached(value, kernel.shape[:2], strides, pads, step.outvars[0].aval.shape[1:3])
    if reached is None:
        return None
    (rows, columns), seen = reached
    region = variants.region(value, seen, 0)
    window = _convolve(step, [region, kernel], padding=((0, 0), (0, 0)))
    return _Local(_convolve(step, [value.clean, kernel]), window, rows.first, columns.first)


def _pool(step, operands: list[jax.Array], **changes: Any) -> jax.Array:
    """The pooling of a step, in the form that is fast here."""
    params = {**step.params, **changes}
    over = params["window_dimensions"]
    is_of_squares = (
        len(over) == 4
        and over == params["window_strides"] == (1, over[1], over[1], 1)
        and set(params["padding"]) == {(0, 0)}
        and _is_undilated(params)
    )
    if is_of_squares and step.primitive.name == "reduce_window_max":
        return layers.max_pool(operands[0], over[1])
    if is_of_squares and step.primitive.name == "reduce_window_sum":
        return layers.avg_pool(operands[0], over[1]) * over[1] ** 2
    return programs.run(step, operands, **changes)[0]


def _is_undilated(params) -> bool:
    return set((*params["base_dilation"], *params["window_dilation"])) == {1}


def _pooling(neutral: float) -> Callable[..., _Local | None]:
    def rule(variants: _Variants, step, operands: list[Any]) -> _Local | None:
        (value,) = operands
        params = step.params
        over, strides = params["window_dimensions"], params["window_strides"]
        is_plain = (
            jnp.issubdtype(value.clean.dtype, jnp.floating)
            and _is_undilated(params)
            and {over[0], over[3], strides[0], strides[3]} == {1}
            and params["padding"][0] == params["padding"][3] == (0, 0)
        )
        if not is_plain:
            return None
        pads = params["padding"][1:3]
        reached = _reached(value, over[1:3], strides[1:3], pads, step.outvars[0].aval.shape[1:3])
        if reached is None:
            return None
        (rows, columns), seen = reached
        region = variants.region(value, seen, neutral)
        if over == strides and step.primitive.name == "reduce_window_max":
            # As a reduction, which XLA does not draw into what reads the window place by place.
            m, (p, q), c = region.shape[0], over[1:3], region.shape[3]
            window = region.reshape(m, rows.length, p, columns.length, q, c).max((2, 4))
        else:
            (window,) = programs.run(step, [region], padding=((0, 0),) * 4)
        return _Local(_pool(step, [value.clean]), window, rows.first, columns.first)

    return rule


def _reached(value: _Local, kernel, strides, pads, size) -> tuple[_Window, _Window] | None:
    """The window of the next map, of that size, that sees the value's, and the window that it sees.

    None if it is no small part of the map.
    """
    placed = zip(
        (value.top, value.left), value.window.shape[1:3], kernel, strides, pads, size, strict=True
    )
    reached = _Window(*(_reached_along(*axis) for axis in placed))
    if 2 * reached.rows.length * reached.columns.length > size[0] * size[1]:
        return None
    seen = [
        _Axis(axis.first * stride - low, (axis.length - 1) * stride + extent)
        for axis, extent, stride, (low, _) in zip(reached, kernel, strides, pads, strict=True)
    ]
    return reached, _Window(*seen)


def _reached_along(
    first: np.ndarray, length: int, extent: int, stride: int, pads: tuple[int, int], size: int
) -> _Axis:
    low = -((extent - 1 - first - pads[0]) // stride)
    high = (first + length - 1 + pads[0]) // stride
    return _fitted(np.clip(low, 0, size - 1), np.clip(high, 0, size - 1), size)


def _union(windows: list[tuple[np.ndarray, int]], size: int) -> _Axis:
    low = np.min([first for first, _ in windows], axis=0)
    high = np.max([first + length - 1 for first, length in windows], axis=0)
    return _fitted(low, high, size)


def _fitted(low: np.ndarray, high: np.ndarray, size: int) -> _Axis:
    """The window, of one length for all pixels, from `low` to `high` and within the map."""
    length = max(int((high - low).max()) + 1, 1)
    return _Axis(np.clip(low, 0, size - length), length)


_RULES: dict[str, Callable[..., _Local | None]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "conv_general_dilated": _convolution,
    "reduce_window_max": _pooling(-math.inf),
    "reduce_window_min": _pooling(math.inf),
    "reduce_window_sum": _pooling(0.0),
}

_COMPUTE = {
    "conv_general_dilated": _convolve,
    "reduce_window_max": _pool,
    "reduce_window_sum": _pool,
}
