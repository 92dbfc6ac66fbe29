"""What a rule or an attack is, with the options that its functions hold, as a short text.

It tells checkpoints of different runs apart. It is the same in every process: nothing in it comes
from an address, a hash seed or the order of a set.
"""

import dataclasses
import functools
import types
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

_LARGEST_DEPTH = 40
_LONGEST_PART = 120  # characters; of a longer part stands the beginning and a checksum


def described(value: Any) -> str:
    """A value with what it is made of, as far as it can be told.

    Functions are told by their names, what they close over, and, where they are made inside others,
    their defaults; arrays by their checksums; tuples, lists, dictionaries, NamedTuples, dataclasses
    and callable objects by what they hold. Of anything else there is the name of its type. The code
    of a function does not count.

    Args:
      value: anything.

    Example:
      >>> import functools
      >>> from advjax import aggregation
      >>> described(functools.partial(aggregation.krum, num_byzantine=2))
      'krum(num_byzantine=2)'
    """
    return _Describer().text(value, ())


class _Describer:
    """One description, whose parts are made once each however often they occur."""

    def __init__(self) -> None:
        # By identity; the value is kept, so that no other one gets its address.
        self._texts: dict[int, tuple[Any, str]] = {}

    def text(self, value: Any, above: tuple[int, ...]) -> str:
        if id(value) in self._texts:
            return self._texts[id(value)][1]
        if id(value) in above or len(above) > _LARGEST_DEPTH:  # a function that closes over itself
            return type(value).__name__
        try:
            made = self._made(value, (*above, id(value)))
        except Exception:  # whatever a foreign object does when it is looked at
            made = type(value).__name__
        if len(made) > _LONGEST_PART and above:
            made = f"{made[:_LONGEST_PART]}...#{zlib.crc32(made.encode()):08x}"
        self._texts[id(value)] = value, made
        return made

    def _made(self, value: Any, above: tuple[int, ...]) -> str:
        kind = type(value).__name__
        if isinstance(value, float) and value.is_integer():
            return repr(int(value))  # optax makes the steps of a schedule a float when it is used
        if value is None or isinstance(value, bool | int | float | complex | str):
            return repr(value)
        if isinstance(value, bytes):
            return f"bytes#{zlib.crc32(value):08x}"
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return _of_array(value)
        if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
            return value.__name__
        if isinstance(value, functools.partial):
            return self.text(value.func, above) + self._parts(
                value.args, value.keywords.items(), above
            )
        if isinstance(value, types.MethodType):
            return self.text(value.__func__, above) + self._parts((value.__self__,), (), above)
        if isinstance(value, types.FunctionType):
            return value.__qualname__ + self._parts((), _options(value), above)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind + self._parts((), zip(value._fields, value, strict=True), above)
        if isinstance(value, tuple | list):
            return kind + self._parts(value, (), above)
        if isinstance(value, set | frozenset):
            return f"{kind}({', '.join(sorted(self.text(part, above) for part in value))})"
        if isinstance(value, Mapping):
            named = sorted((self.text(key, above), part) for key, part in value.items())
            return kind + self._parts((), named, above)
        if dataclasses.is_dataclass(value):
            fields = [(field.name, getattr(value, field.name)) for field in
                      dataclasses.fields(value)]  # fmt: skip
            return kind + self._parts((), fields, above)
        if hasattr(value, "__wrapped__"):  # such as what jax.jit makes
            return kind + self._parts((value.__wrapped__,), (), above)
        if callable(value):
            return kind + self._parts((), sorted(vars(value).items()), above)
        return kind

    def _parts(
        self, unnamed: Iterable[Any], named: Iterable[tuple[str, Any]], above: tuple[int, ...]
    ) -> str:
        texts = [self.text(value, above) for value in unnamed]
        texts += [f"{name}={self.text(value, above)}" for name, value in named]
        return f"({', '.join(texts)})" if texts else ""


def _options(function: types.FunctionType) -> list[tuple[str, Any]]:
    """What a function closes over and, if it is no function of a module, its defaults."""
    options = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            options.append((name, cell.cell_contents))
        except ValueError:  # not filled yet
            options.append((name, None))
    if "<" in function.__qualname__:
        options += [(str(i), value) for i, value in enumerate(function.__defaults__ or ())]
        options += sorted((function.__kwdefaults__ or {}).items())
    return options


def _of_array(array: Any) -> str:
    shape = f"{array.dtype}{list(array.shape)}"
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    values = np.asarray(array)
    if values.dtype.hasobject:  # its bytes are addresses
        return shape
    return f"{shape}#{zlib.crc32(values.tobytes()):08x}"
