"""Dimensions of a search: parsing `--over`, values in a configuration, and values for a trial.

    learning_rate=1e-4:1e-2:log     a range, even on a logarithmic scale
    dropout=0:0.2                   a range
    rank=8,16,32                    choices
    layers=last:8,last:16           choices as well: last is not a number

The first trials of `tpe` are spread evenly for any number of trials. Point n in d dimensions is

    x_j = frac(1/2 + n g^-j),  j = 1 … d,   with g^(d+1) = g + 1     [Roberts, the R_d sequence; g is golden for d = 1]
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from backhand.bounds import comma_list
from backhand.errors import UsageError
from backhand.options.config import TrainConfig
from backhand.options.config_file import config_from_table, config_table
from backhand.words import nearest_names

Value = float | int | str
Values = dict[str, Value]
_PARTS = ("adapter", "optimization")
_RANGE = re.compile(r"([^:,]+):([^:,]+)(:\s*log\s*)?")
_NUMBERS = re.compile(r"[-+.\deE\s]+")
_LARGEST_GRID = 10_000


@dataclass(frozen=True)
class Dimension:
    """One option to vary: a range or a set of choices."""

    name: str  # of the option
    part: str  # part of the configuration that contains it
    choices: tuple[Value, ...] = ()  # values as typed; empty for a range
    # low, high: bounds of a range
    low: float = 0.0
    high: float = 0.0
    log: bool = False  # whether the range is sampled evenly on a logarithmic scale
    whole: bool = False  # whether the values are whole numbers

    @property
    def ends(self) -> tuple[Value, ...]:
        """Both bounds of a range, or every choice. If these are valid, every value is."""
        return tuple(map(self._number, (self.low, self.high))) if not self.choices else self.choices

    def at(self, position: float) -> Value:
        """Return the value at a position between 0 and 1."""
        if self.choices:
            return self.choices[min(int(position * len(self.choices)), len(self.choices) - 1)]
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + position * (high - low)
        return self._number(math.exp(value) if self.log else value)

    def holds(self, value: Value) -> bool:
        """Return True if a value lies within this dimension."""
        return value in self.choices if self.choices else self.low <= float(value) <= self.high

    def allows(self, value: Any) -> bool:
        """Return True if a value from a file has a type of this dimension, and is one of its choices if it has any."""
        if self.choices:
            return value in self.choices
        kinds = (int,) if self.whole else (int, float)
        return type(value) in kinds and abs(value) <= sys.float_info.max

    def rounded(self, value: Value) -> Value:
        """Return a number of a range with four significant digits."""
        return value if self.choices else min(max(self._number(float(value)), self.low), self.high)

    def _number(self, value: float) -> float:
        return round(value) if self.whole else float(f"{value:.4g}")

    def applied(self, config: TrainConfig, value: Value) -> TrainConfig:
        """Return the configuration with this value. Raises UsageError for a value of another type."""
        hint = _hints()[self.name][1]
        several = any(kind in str(hint) for kind in ("tuple", "Sequence"))
        plain: Any = value.split("+") if several and isinstance(value, str) and value != "all-linear" else value
        part = config_table(config)[self.part] | {self.name: plain}
        table = config_from_table({self.part: part}, f"--over {self.name}")
        return dataclasses.replace(config, **{self.part: getattr(table, self.part)})

    def of(self, config: TrainConfig) -> Value | None:
        """Return the value in a configuration as it would be typed; None if it cannot be typed in this dimension.

        An option without a value, such as `warmup_steps` by default, cannot, nor a word if numbers are varied.
        """
        value = getattr(getattr(config, self.part), self.name)
        if isinstance(value, tuple | list):
            return "+".join(map(str, value)) or None
        return value if isinstance(value, (str, int, float) if self.choices else (int, float)) else None


def parse_dimensions(over: Sequence[str]) -> tuple[Dimension, ...]:
    """Parse the values of `--over`.

    Raises:
        UsageError: a value has none of the forms, or names an option twice, an unknown one, or one that decides which
            losses are compared.
    """
    dimensions = [_dimension(word) for word in over]
    names = [dimension.name for dimension in dimensions]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{name} is given twice", where="over", next_step="give all of its values in one --over")
    return tuple(dimensions)


def _hints() -> Mapping[str, tuple[str, Any]]:
    """Return part and type of every option that can be varied."""
    parts = get_type_hints(TrainConfig)
    return {name: (part, hint) for part in _PARTS for name, hint in get_type_hints(parts[part]).items()}


def _dimension(word: str) -> Dimension:
    name, equals, text = word.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    known = _hints()
    if not equals or not text.replace(",", "").strip():
        raise UsageError(
            f"{word!r} is not of the form NAME=VALUES",
            where="over",
            next_step="for example learning_rate=1e-4:1e-2:log, or rank=8,16,32",
        )
    if name not in known:
        near = nearest_names(name.replace("-", "_"), known, count=1)
        raise UsageError(
            f"{name!r} is not an option that can be searched over",
            where="over",
            why="only options of the adapter and of the optimization can; others decide which losses are compared",
            next_step=f"did you mean {near[0]}?" if near else f"give one of {', '.join(sorted(known))}",
        )
    part, hint = known[name]
    kinds = {hint, *get_args(hint)}
    matched = _RANGE.fullmatch(text)
    # No option with numbers has a word that contains a colon. `layers` has words alone, such as last:8.
    if matched is None or not (kinds & {int, float} or all(map(_NUMBERS.fullmatch, matched.group(1, 2)))):
        choices = tuple(dict.fromkeys(map(_value, comma_list(text))))
        dimension = Dimension(name, part, choices=choices)
    else:
        try:
            low, high = float(matched[1]), float(matched[2])
        except ValueError:
            low = high = math.nan
        log, whole = matched[3] is not None, int in kinds and float not in kinds
        if not low < high < math.inf or (log and low <= 0) or not kinds & {int, float}:
            why, how = "a logarithmic range starts above 0" if log and low <= 0 else None, "write LOW:HIGH, or A,B,C"
            if -math.inf < high < low < math.inf:
                why, how = "the first number is the larger one", f"write {matched[2]}:{matched[1]}{matched[3] or ''}"
            raise UsageError(f"{text!r} is not a range of {name}", where="over", why=why, next_step=how)
        dimension = Dimension(name, part, low=low, high=high, log=log, whole=whole)
    for value in dimension.ends:
        try:
            dimension.applied(TrainConfig(), value)
        except UsageError as error:
            raise UsageError(f"{word!r}: {error.what}", where="over", next_step=error.next_step) from None
    return dimension


def _value(text: str) -> Value:
    try:
        value = json.loads(text.strip().lower() if text.strip().lower() in ("true", "false") else text)
    except (ValueError, RecursionError):
        return text.strip()
    return value if isinstance(value, int | float) else text.strip()


def applied(config: TrainConfig, dimensions: Sequence[Dimension], values: Mapping[str, Value]) -> TrainConfig:
    """Return the configuration with the values of a trial."""
    for dimension in dimensions:
        if dimension.name in values:
            config = dimension.applied(config, values[dimension.name])
    return config


def largest(config: TrainConfig, dimensions: Sequence[Dimension]) -> TrainConfig:
    """Return the configuration with the largest number of every dimension, or the first choice of words."""
    return applied(config, dimensions, {one.name: max(one.ends, key=_size) for one in dimensions})


def _size(value: Value) -> float:
    return value if isinstance(value, int | float) else 0.0


def evenly(dimensions: Sequence[Dimension], number: int) -> Values:
    """Return point `number` of a sequence of which every beginning is evenly spread."""
    g = 2.0
    for _ in range(50):
        g = (1 + g) ** (1 / (len(dimensions) + 1))
    return {one.name: one.at((0.5 + number * g ** -(j + 1)) % 1) for j, one in enumerate(dimensions)}


def grid(dimensions: Sequence[Dimension], trials: int) -> list[Values]:
    """Return all combinations of the choices and of even steps of the ranges, at most `trials` points.

    Raises:
        UsageError: the choices and the bounds of the ranges alone have more combinations than `trials`.
    """
    ranges = sum(not one.choices for one in dimensions)
    choices = math.prod(len(one.choices) for one in dimensions if one.choices)
    steps = int((trials / choices) ** (1 / max(1, ranges)) + 1e-9)
    if steps < (2 if ranges else 1) or trials > _LARGEST_GRID:
        needed = choices * 2**ranges
        raise UsageError(
            f"a grid has {needed} points or more, and there are {trials} trials",
            where="trials",
            next_step=f"give --trials {needed}, fewer values, or --sampler tpe",
        )
    sides = [one.choices or [one.at(step / (steps - 1)) for step in range(steps)] for one in dimensions]
    return [dict(zip((one.name for one in dimensions), point, strict=True)) for point in itertools.product(*sides)]
