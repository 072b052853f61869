"""Which values a sweep tries: lists (`rank=4,8,16`) and ranges (`learning_rate=1e-5..1e-3`)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from pydantic import JsonValue

from posttrain.errors import UsageError
from posttrain.recipe.load import apply_override

Point = Mapping[str, JsonValue]
"""One value for each swept key."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"^({_NUMBER})\.\.({_NUMBER})$")
_WORD = re.compile(r"^[\w./:@-]+$")
"""Text that needs no quotes in YAML, unless it would be read as something else."""
_LOGARITHMIC_FROM = 10
"""A positive range whose ends differ by more than this factor is searched by powers."""


@dataclass(frozen=True)
class Choices:
    """A key and the values to try, in the order given."""

    key: str
    values: tuple[JsonValue, ...]


@dataclass(frozen=True)
class Range:
    """A key and the interval that values are drawn from, ends included."""

    key: str
    low: float
    high: float
    whole: bool
    """Whether only whole numbers are drawn."""

    @property
    def log(self) -> bool:
        """Whether equal ratios, and not equal differences, are equally likely."""
        return self.low > 0 and self.high / self.low > _LOGARITHMIC_FROM

    @property
    def ends(self) -> tuple[JsonValue, JsonValue]:
        """Lowest and highest value."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


@dataclass(frozen=True)
class Space:
    """All swept keys."""

    axes: tuple[Choices | Range, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The swept keys, as the user wrote them."""
        return tuple(axis.key for axis in self.axes)

    @property
    def is_grid(self) -> bool:
        """Whether every combination can be tried."""
        return all(isinstance(axis, Choices) for axis in self.axes)

    def grid(self) -> list[Point]:
        """Every combination, the last key changing fastest; of a range, its ends."""
        columns = [self._corners(axis) for axis in self.axes]
        return [dict(zip(self.keys, values, strict=True)) for values in product(*columns)]

    def star(self) -> list[Point]:
        """The first combination, and all that differ from it in one key: what each key changes."""
        first = self.grid()[0]
        points = [first]
        for axis in self.axes:
            points += [{**first, axis.key: value} for value in self._corners(axis)[1:]]
        return points

    @staticmethod
    def _corners(axis: Choices | Range) -> tuple[JsonValue, ...]:
        return axis.values if isinstance(axis, Choices) else axis.ends


def parse_space(texts: Sequence[str]) -> Space:
    """Read what follows `--over`, each `KEY=A,B,C` or `KEY=LOW..HIGH`.

    Values are YAML, so `sft.adapter={rank: 8},null` works as well.

    Raises:
        UsageError: one of them is not written like this, or a key comes twice.
    """
    if not texts:
        raise UsageError("a sweep needs a key and its values: --over sft.adapter.rank=4,8,16,32")
    axes = tuple(_parse_axis(text) for text in texts)
    keys = [axis.key for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"--over {key}: given twice; write all its values in one")
    return Space(axes)


def override(key: str, value: JsonValue) -> str:
    """`key=value` as `--set` takes it."""
    return f"{key}={show_value(value)}"


def show_value(value: JsonValue) -> str:
    """A value as YAML in one line, short for plain words."""
    if isinstance(value, str) and _WORD.match(value) and read_value(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def read_value(text: str) -> JsonValue:
    """The value that `--set KEY=TEXT` gives a key.

    Raises:
        UsageError: it is not YAML.
    """
    data: dict[str, JsonValue] = {}
    apply_override(data, f"name={text}")
    return data["name"]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last words of each key, as many as tell it from the others: `rank`."""
    parts = {key: key.split(".") for key in keys}
    short = {}
    for key, words in parts.items():
        others = [other for name, other in parts.items() if name != key]
        length = next(
            (n for n in range(1, len(words)) if all(o[-n:] != words[-n:] for o in others)),
            len(words),
        )
        short[key] = ".".join(words[-length:])
    return short


def label(point: Point) -> str:
    """`rank=8, learning_rate=0.0002`."""
    short = short_keys(list(point))
    return ", ".join(f"{short[key]}={show_value(value)}" for key, value in point.items())


def _parse_axis(text: str) -> Choices | Range:
    key, separator, values = text.partition("=")
    key, values = key.strip(), values.strip()
    if not separator or not key or not values:
        raise UsageError(f"--over {text}: write KEY=A,B,C or KEY=LOW..HIGH")
    if found := _RANGE.match(values):
        return _range(text, key, found[1], found[2])
    try:
        # The commas of a flow sequence: those inside brackets, braces and quotes do not split.
        parsed = read_value(f"[{values}]")
    except UsageError:
        raise UsageError(f"--over {text}: the values are not valid YAML") from None
    if not isinstance(parsed, list):
        raise UsageError(f"--over {text}: write KEY=A,B,C or KEY=LOW..HIGH")
    unique = {json.dumps(value, sort_keys=True): value for value in parsed}
    if len(unique) < 2:
        raise UsageError(f"--over {text}: one value is no sweep; name two or more, or use --set")
    return Choices(key, tuple(unique.values()))


def _range(text: str, key: str, low: str, high: str) -> Range:
    ends = float(low), float(high)
    if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] < ends[1]):
        raise UsageError(f"--over {text}: the first end of a range must be below the second")
    whole = all(re.fullmatch(r"[-+]?\d+", end) is not None for end in (low, high))
    return Range(key, *ends, whole=whole)
