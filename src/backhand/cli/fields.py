"""The fields of an options dataclass as one flat list, and the dataclass again from flat values.

A field whose type is itself a dataclass is a section: its fields stand beside those of the others on the command line,
under its name in the help, and in a table of its name in a TOML file. Field names are unique over all sections.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, get_origin

from docstring_parser import parse_from_object

from backhand.bounds import Also, Parse, hints_of, parse_of, sentence_of, split_hint, union_members

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OptionField:
    """One field of an options dataclass."""

    name: str  # the field's name, unique over all sections; `--` and dashes make it an option
    section: tuple[str, ...]  # names of the dataclass fields that lead to it, () at the top
    title: str  # heading of its section in the help: how the docstring of the section's dataclass begins
    hint: Any
    default: Any  # its default value, `dataclasses.MISSING` where it has none
    help: str  # the docstring under the field, and the range that stands beside it
    parse: Parse | None  # makes its value of the words given, for a type that no command line knows
    also: tuple[str, ...] = ()  # other names that the command line takes for it, as they are typed

    @property
    def option(self) -> str:
        """The field as an option of the command line."""
        return as_option(self.name)


def as_option(name: str) -> str:
    """A field's name as an option of the command line."""
    return "--" + name.replace("_", "-")


def option_fields(options: type, section: tuple[str, ...] = ()) -> tuple[OptionField, ...]:
    """All fields of `options` and of the dataclasses in it, in order.

    Raises:
        TypeError: two fields of the same name, or a field without a docstring.
    """
    hints = typing.get_type_hints(options)
    docs = _docs_of(options)
    title = re.split(r"[.,:;]", inspect.cleandoc(options.__doc__ or ""), maxsplit=1)[0] if section else "Options"
    found: list[OptionField] = []
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            found += option_fields(hint, (*section, field.name))
            continue
        if field.name not in docs:
            raise TypeError(f"{options.__name__}.{field.name} has no docstring under it")
        default = field.default_factory() if callable(field.default_factory) else field.default
        said = hints_of(options)[field.name]
        text = f"{docs[field.name]} {sentence_of(said)}".rstrip()
        also = tuple(rule.option for rule in split_hint(said)[1] if isinstance(rule, Also))
        found.append(OptionField(field.name, section, title, hint, default, text, parse_of(said), also))
    names = [field.name for field in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TypeError(f"{options.__name__} has two fields named {', '.join(sorted(twice))}")
    return tuple(found)


def build(options: type[T], values: Mapping[str, Any], base: T | None = None) -> T:
    """Make `options`, and the dataclasses in it, of flat `values`; other fields are those of `base`, else defaults."""
    hints = typing.get_type_hints(options)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        hint = hints[field.name]
        base_value = getattr(base, field.name, None)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            arguments[field.name] = build(hint, values, base_value)
        elif field.name in values:
            arguments[field.name] = values[field.name]
        elif base is not None:
            arguments[field.name] = base_value
    return options(**arguments)


def value_of(options: Any, field: OptionField) -> Any:
    """The value of one field in an instance of the outermost dataclass."""
    for section in field.section:
        options = getattr(options, section)
    return getattr(options, field.name)


def takes_several(hint: Any) -> bool:
    """Whether an option of this type takes any number of words: tuples and mappings do."""
    return any(_is_kind(member, (tuple, list, Mapping)) for member in union_members(hint))


def is_mapping(hint: Any) -> bool:
    """Whether the type is a mapping, written as NAME=VALUE words on a command line and as a table in a TOML file."""
    return any(_is_kind(member, (Mapping,)) for member in union_members(hint))


def _is_kind(hint: Any, kinds: tuple[Any, ...]) -> bool:
    kind = get_origin(hint) or hint
    return isinstance(kind, type) and any(issubclass(kind, wanted) for wanted in kinds)


@cache
def _docs_of(options: type) -> dict[str, str]:
    """The docstring under each field, those of base classes included, lines joined into one paragraph."""
    docs: dict[str, str] = {}
    for base in reversed(options.__mro__[:-1]):
        for described in parse_from_object(base).params:
            if described.description:
                docs[described.arg_name] = " ".join(described.description.split())
    return docs
