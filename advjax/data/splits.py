"""tensorflow-datasets' split syntax: `train`, `test[:80%]`, `train[10%:20%]+test[-500:]`, `all`.

tensorflow-datasets resolves the same text to the same examples (a test compares them); it is done
here again so that the digits and cached sets do not wait for its import. Shards
(`train[:2shard]`) mean nothing for a set that is whole in memory and are not known.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_PART = re.compile(r"(?P<name>[\w-]+)(?:\[(?P<start>[^:\]]*):(?P<stop>[^:\]]*)\])?")
_BOUND = re.compile(r"(?P<value>-?[\d_]+(?:\.\d*)?|-?\.\d+)(?P<unit>%?)")


class Part(NamedTuple):
    """One term of a split: a base split and two bounds, in examples or in percent."""

    name: str
    start: float | None = None
    stop: float | None = None
    is_percent: bool = False


class Interval(NamedTuple):
    """Examples `start` to `stop` of one base split."""

    name: str
    start: int
    stop: int


def parse(split: str) -> tuple[Part, ...]:
    """Reads a split.

    Args:
      split: the text, as tensorflow-datasets takes it.

    Returns:
      Its terms, in order.

    Raises:
      ValueError: the text is not a split.

    Example:
      >>> parse("train[10%:20%]")
      (Part(name='train', start=10.0, stop=20.0, is_percent=True),)
    """
    if not isinstance(split, str):
        raise _malformed(split)
    return tuple(_parse_part(part, split) for part in re.split(r"\s*\+\s*", split))


def resolve(parts: tuple[Part, ...], sizes: Mapping[str, int]) -> tuple[Interval, ...]:
    """Finds which examples a parsed split means.

    Percentages are rounded to the nearest example, as tensorflow-datasets does.

    Args:
      parts: what `parse` returned.
      sizes: the number of examples of each base split.

    Returns:
      One interval for each term, and for each base split where the term is `all`.

    Raises:
      ValueError: an unknown base split, a bound beyond its examples, or nothing selected.

    Example:
      >>> resolve(parse("test[:80%]"), {"train": 1438, "test": 359})
      (Interval(name='test', start=0, stop=287),)
    """
    named = []
    for part in parts:
        named += [Part(name) for name in sizes] if part.name == "all" else [part]
    return tuple(_resolve_part(part, sizes) for part in named)


def check_names(parts: tuple[Part, ...], names: tuple[str, ...], owner: str) -> None:
    """Checks the base splits of a parsed split.

    Raises:
      ValueError: one of them is not in `names`; the sentence lists `names`.
    """
    for part in parts:
        if part.name not in (*names, "all"):
            raise ValueError(
                f"data.load: unknown split {part.name!r} of {owner}; it has: {', '.join(names)}."
            )


def _parse_part(text: str, split: str) -> Part:
    match = _PART.fullmatch(text)
    if match is None:
        raise _malformed(split)
    name, start, stop = match.group("name", "start", "stop")
    if start is None:
        return Part(name)
    # `all[:10%]` and `train[:]` are refused by tensorflow-datasets too.
    if name == "all" or not (start or stop):
        raise _malformed(split)
    bounds = [_BOUND.fullmatch(bound) if bound else None for bound in (start, stop)]
    if any(text and bound is None for text, bound in zip((start, stop), bounds, strict=True)):
        raise _malformed(split)
    # One percent sign makes both bounds percentages.
    is_percent = any(bound is not None and bound["unit"] == "%" for bound in bounds)
    number = float if is_percent else int
    try:
        low, high = (None if bound is None else number(bound["value"]) for bound in bounds)
    except ValueError:
        raise _malformed(split) from None
    return Part(name, low, high, is_percent)


def _malformed(split: Any) -> ValueError:
    return ValueError(
        f"data.load: cannot read the split {split!r}; write 'test', 'test[:80%]', 'train[:1000]' "
        "or a sum of such with '+'."
    )


def _resolve_part(part: Part, sizes: Mapping[str, int]) -> Interval:
    size = sizes[part.name]
    bounds = []
    for bound, default in ((part.start, 0), (part.stop, size)):
        if bound is None:
            value = default
        elif part.is_percent:
            value = round(bound * size / 100)
        else:
            value = int(bound)
        if abs(value) > size:
            raise ValueError(
                f"data.load: the split {part.name!r} has {size} examples, "
                f"got the bound {bound:g}{'%' if part.is_percent else ''}."
            )
        bounds.append(value + size if value < 0 else value)
    start, stop = bounds
    if start >= stop:
        raise ValueError(
            f"data.load: nothing lies from example {start} to {stop} of the split {part.name!r}."
        )
    return Interval(part.name, start, stop)
