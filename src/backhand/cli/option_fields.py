"""Fields of nested options dataclasses as a flat list, with their sections, help texts and parsers.

A field whose type is itself a dataclass is a section. The command line shows the fields of all sections as options of
one command, under the section's name in the help. A TOML file has a table per section. Field names are unique over all
sections.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_origin

from docstring_parser import parse_from_object

from backhand.bounds import Also, Parse, hints_of, parse_of, sentence_of, split_hint, union_members

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OptionField:
    """A field of an options dataclass as an option of the command line."""

    name: str  # unique over all sections; with `--` and dashes it is the option
    section: tuple[str, ...]  # names of the dataclass fields that lead to it, () at the top
    title: str  # heading of its section in the help: the beginning of the docstring of the section's dataclass
    hint: Any
    default: Any  # `dataclasses.MISSING` if it has none
    help: str  # the docstring under the field, and the declared range
    parse: Parse | None  # parses the typed words, for a type that cyclopts cannot convert
    also: tuple[str, ...] = ()  # other names of the option, as typed

    @property
    def option(self) -> str:
        """The name of the option, as typed."""
        return as_option(self.name)


def as_option(name: str) -> str:
    """Return the name of a field as an option of the command line."""
    return "--" + name.replace("_", "-")


def option_fields(options: type, section: tuple[str, ...] = ()) -> tuple[OptionField, ...]:
    """Return all fields of `options` and of its nested dataclasses, in order.

    Raises:
        TypeError: two fields have the same name, or a field has no docstring.
        OSError: the source file, which contains the docstrings, cannot be read.
    """
    hints = typing.get_type_hints(options)
    docs = _docs_of(options)
    title = re.split(r"[.,:;]", inspect.cleandoc(options.__doc__ or ""), maxsplit=1)[0] if section else "Options"
    collected: list[OptionField] = []
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            collected += option_fields(hint, (*section, field.name))
            continue
        if field.name not in docs:
            Path(inspect.getfile(options)).open("rb").close()  # the parser hides that the source is unreadable
            raise TypeError(f"{options.__name__}.{field.name} has no docstring under it")
        default = field.default_factory() if callable(field.default_factory) else field.default
        rules = hints_of(options)[field.name]
        text = f"{docs[field.name]} {sentence_of(rules)}".rstrip()
        also = tuple(rule.option for rule in split_hint(rules)[1] if isinstance(rule, Also))
        collected.append(OptionField(field.name, section, title, hint, default, text, parse_of(rules), also))
    names = [field.name for field in collected]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TypeError(f"{options.__name__} has two fields named {', '.join(sorted(twice))}")
    return tuple(collected)


def build(options: type[T], values: Mapping[str, Any], base: T | None = None) -> T:
    """Create `options` and its nested dataclasses from flat `values`. Other fields are those of `base`, or default."""
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
    """Return the value of a field from an instance of the outermost dataclass."""
    for section in field.section:
        options = getattr(options, section)
    return getattr(options, field.name)


def takes_several(hint: Any) -> bool:
    """Return True if an option of this type takes any number of words, as tuples and mappings do."""
    return any(_is_kind(member, (tuple, list, Mapping)) for member in union_members(hint))


def is_mapping(hint: Any) -> bool:
    """Return True for a mapping, which is typed as NAME=VALUE words and is a table in a TOML file."""
    return any(_is_kind(member, (Mapping,)) for member in union_members(hint))


def _is_kind(hint: Any, kinds: tuple[Any, ...]) -> bool:
    kind = get_origin(hint) or hint
    return isinstance(kind, type) and any(issubclass(kind, wanted) for wanted in kinds)


@cache
def _docs_of(options: type) -> dict[str, str]:
    """Return the docstring under each field, including those of base classes, each joined into one paragraph."""
    docs: dict[str, str] = {}
    for base in reversed(options.__mro__[:-1]):
        for described in parse_from_object(base).params:
            if described.description:
                docs[described.arg_name] = " ".join(described.description.split())
    return docs
