"""Type checks for JSON that is read back from a file.

A shape is a type: `bool`, `int`, `float`, `str`, `None`, `Any`, a `Literal`, a union of these, `list[X]`,
`dict[K, X]`, `tuple[X, ...]`, `tuple[X, Y]`, a dataclass or a `TypedDict`. `Annotated[X, Rule(…)]` adds a rule for the
value. `load` accepts a value that has the shape, and nothing else. `fitting` keeps the parts of a value that have the
right types.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


class ShapeError(ValueError):
    """A JSON value of another type than expected; the message names the place and both types."""


class Rule(NamedTuple):
    """A rule for a value of the right type, such as a range."""

    holds: Callable[[Any], bool]
    expected: str  # the values that it allows, after "not"


def parse(data: bytes | str) -> Any:
    """Parse JSON. Raises ValueError, also for bytes that are not UTF-8 and for values nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load(data: bytes | str, shape: type[T]) -> T:
    """Parse JSON that must have a shape. Raises ValueError as `parse`, and ShapeError."""
    return convert(parse(data), shape)


def convert(value: object, shape: type[T], place: str = "") -> T:
    """Return a JSON value as an instance of its shape: dataclasses are built, tuples and floats are made.

    Fields without a default must be present. Unknown fields are ignored in a dataclass and kept in a TypedDict.
    Integers must fit into 64 bits.

    Args:
        place: name of the value in an error.

    Raises:
        ShapeError: some part has another type, or breaks a rule.
    """
    converted: T = _convert(value, shape, place)
    return converted


def fitting(value: object, shape: Any) -> Any:
    """Return the parts of a JSON value that have a shape, still as JSON: records stay dictionaries, integers integers.

    Misfits in lists and dictionaries are left out, and keys that the shape does not name are kept. A TypedDict without
    one of its required keys is itself a misfit. A value that does not fit at all becomes {} or [], if the shape allows.

    Raises:
        ShapeError: the value does not fit, and its shape is neither a list nor a dictionary.
    """
    try:
        return _fitting(value, shape)
    except ShapeError:
        origin = get_origin(shape)
        if origin is list:
            return []
        if origin is dict or _is_record(shape):
            return {}
        raise


def _convert(value: Any, shape: Any, place: str) -> Any:
    origin, arguments = get_origin(shape), get_args(shape)
    if origin is Annotated:
        converted = _convert(value, arguments[0], place)
        for rule in arguments[1:]:
            if isinstance(rule, Rule) and not rule.holds(converted):
                raise ShapeError(
                    f"{place or 'it'} is {json.dumps(value, ensure_ascii=False)[:60]}, not {rule.expected}"
                )
        return converted
    if origin in (Union, types.UnionType):
        return _convert(value, _member(value, shape, place), place)
    if origin is list and isinstance(value, list):
        return [_convert(one, arguments[0], f"{place}[{i}]") for i, one in enumerate(value)]
    if origin is tuple and isinstance(value, list):
        expected = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(expected) != len(value):
            raise ShapeError(f"{place or 'it'} has {len(value)} elements, not {len(expected)}")
        return tuple(
            _convert(one, kind, f"{place}[{i}]") for i, (one, kind) in enumerate(zip(value, expected, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        for key in value:
            _convert(key, arguments[0], f"the key {json.dumps(key)} of {place or 'it'}")
        return {key: _convert(one, arguments[1], _below(place, key)) for key, one in value.items()}
    if _is_record(shape) and isinstance(value, dict):
        found = {}
        for field in _fields(shape):
            if field.name in value:
                found[field.name] = _convert(value[field.name], field.shape, _below(place, field.name))
            elif field.required:
                raise ShapeError(f"{_below(place, field.name)} is missing")
        return value | found if typing.is_typeddict(shape) else shape(**found)
    if not _is_scalar(value, shape):
        raise ShapeError(f"{place or 'it'} is {_name(value)}, not {_expected(shape)}")
    return float(value) if shape is float else value


def _fitting(value: Any, shape: Any) -> Any:
    origin, arguments = get_origin(shape), get_args(shape)
    if origin is Annotated:
        return _fitting(value, arguments[0])
    if origin in (Union, types.UnionType):
        return _fitting(value, _member(value, shape, ""))
    if origin is list and isinstance(value, list):
        return list(_those_fitting((one, arguments[0]) for one in value))
    if origin is tuple and isinstance(value, list):
        return list(_convert(value, shape, ""))
    if origin is dict and isinstance(value, dict):
        parts = ((key, list(_those_fitting([(one, arguments[1])]))) for key, one in value.items())
        return {key: part for key, fit in parts for part in fit}
    if _is_record(shape) and isinstance(value, dict):
        found = dict(value)
        for field in _fields(shape):
            fit = list(_those_fitting([(found.pop(field.name), field.shape)])) if field.name in found else []
            if fit:
                found[field.name] = fit[0]
            elif field.required and not dataclasses.is_dataclass(shape):
                raise ShapeError(f"{field.name} is missing")
        return found
    if not _is_scalar(value, shape):
        raise ShapeError(f"it is {_name(value)}, not {_expected(shape)}")
    return value


def _those_fitting(parts: typing.Iterable[tuple[Any, Any]]) -> Iterator[Any]:
    for value, shape in parts:
        with suppress(ShapeError):
            yield _fitting(value, shape)


def _member(value: object, union: Any, place: str) -> Any:
    """Return the first member of a union whose kind of JSON value this is."""
    for member in get_args(union):
        origin = get_origin(_plain(member))
        kinds = dict if _is_record(member) else list if origin is tuple else origin
        if isinstance(value, kinds) if kinds in (dict, list) else _is_scalar(value, _plain(member)):
            return member
    raise ShapeError(f"{place or 'it'} is {_name(value)}, not {_expected(union)}")


def _is_scalar(value: object, shape: Any) -> bool:
    if shape is Any:
        return True
    if get_origin(shape) is Literal:
        return any(value == one and type(value) is type(one) for one in get_args(shape))
    if shape is None or shape is type(None):
        return value is None
    if shape is float and isinstance(value, float):
        return True
    if shape in (int, float):
        return type(value) is int and _fits_64_bits(value)
    return shape in (str, bool) and isinstance(value, shape)


class _Field(NamedTuple):
    name: str
    shape: Any
    required: bool


def _is_record(shape: Any) -> bool:
    return isinstance(shape, type) and (dataclasses.is_dataclass(shape) or typing.is_typeddict(shape))


@functools.cache
def _fields(shape: Any) -> tuple[_Field, ...]:
    hints = typing.get_type_hints(shape, include_extras=True)
    if typing.is_typeddict(shape):
        # The required keys of postponed annotations contain those that are marked NotRequired.
        optional = {name for name, hint in hints.items() if get_origin(hint) is typing.NotRequired}
        return tuple(
            _Field(name, get_args(hint)[0] if name in optional else hint, name in shape.__required_keys__ - optional)
            for name, hint in hints.items()
        )
    missing = dataclasses.MISSING
    return tuple(
        _Field(one.name, hints[one.name], one.default is missing and one.default_factory is missing)
        for one in dataclasses.fields(shape)
    )


def known_keys(shape: Any) -> set[str]:
    """Return the keys that an object of this shape can have."""
    return {field.name for field in _fields(shape)}


def required_keys(shape: Any) -> set[str]:
    """Return the keys that an object of this shape must have."""
    return {field.name for field in _fields(shape) if field.required}


def _plain(shape: Any) -> Any:
    """Return a shape without its rules."""
    return get_args(shape)[0] if get_origin(shape) is Annotated else shape


def _below(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _name(value: object) -> str:
    if value is None:
        return "null"
    if type(value) is int:
        return "an integer" if _fits_64_bits(value) else "an integer of more than 64 bits"
    return _NAMES[type(value)]


def _fits_64_bits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def _expected(shape: Any) -> str:
    shape = _plain(shape)
    if get_origin(shape) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_expected, get_args(shape))))
    if get_origin(shape) is Literal:
        return " or ".join(map(repr, get_args(shape)))
    if _is_record(shape):
        return _NAMES[dict]
    return _NAMES[type(None) if shape is None else get_origin(shape) or shape]


_NAMES: dict[Any, str] = {
    dict: "an object",
    list: "a list",
    tuple: "a list",
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    type(None): "null",
}
