"""An options dataclass as a command: each field an option; what was typed is set, over a TOML file if one was named.

A field whose type is itself a dataclass is a section: its fields stand beside those of the others on the command line,
under its name in the help, and in a table of its name in a TOML file. Field names are unique over all sections.

Nothing runs here. What is parsed is a `Prepared`: a function with its options, which `cli.main` calls.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import MISSING
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from cyclopts import Group, Parameter, Token, convert
from docstring_parser import parse_from_object

from backhand.bounds import Also, Parse, hints_of, parse_of, sentence_of, split_hint, union_members
from backhand.errors import ResourceError, UsageError
from backhand.system import may_reserve
from backhand.words import shorten

if typing.TYPE_CHECKING:
    from backhand.cli.commands import Command

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
        OSError: the source, which has the docstrings, cannot be read.
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
            Path(inspect.getfile(options)).open("rb").close()  # the parser hides that it could not read the source
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


CONFIG_FILE = "config_file"
_CONFIG_FILE_HELP = "TOML or .yaml file of options, in tables as in a run's config.toml; the command line wins over it."
_DEBUG_HELP = "Show a traceback with an error."


_YIELDS = {"eval_fraction": "eval_data"}
"""What gives way in a file where another option is typed: a run's config.toml holds the share that the run chose."""


class Prepared(NamedTuple):
    """A command line that was parsed: all that is left is to run it."""

    function: Callable[[], object]  # takes nothing; a number that it returns is the exit code, anything else is 0
    report_of: Path | None  # the run about which it proves something, if any: its report is written again
    name_origin: Callable[[UsageError], None]  # makes an error about an option say where the user wrote it


def command(entry: Command) -> Callable[..., Prepared]:
    """Make the function that cyclopts parses the command line for; it runs nothing, and returns what is to run.

    Raises:
        TypeError: the options are not what `option_fields` takes.
    """
    options, load, positional = imported(entry.options), entry.file, entry.positional
    by_name = {field.name: field for field in option_fields(options)}

    def prepare(*args: Any, **given: Any) -> Prepared:
        given |= _by_position(leading, args)
        file = given.pop(CONFIG_FILE, None)
        base = load(file) if load is not None and file is not None else None
        typed = {name: value for name, value in given.items() if name in by_name}

        def name_origin(error: UsageError) -> None:
            """Say where the user wrote a value that was refused: the option, its place, or file and key."""
            name, bracket, rest = (error.where or "").partition("[")
            if (field := by_name.get(name)) is None:
                return
            if base is not None and name not in typed and value_of(base, field) != field.default:
                error.where = f"{file}: {'.'.join((*field.section, name))}{bracket}{rest}"
            else:  # as the help names it
                error.where = name.upper() if name in positional else f"{field.option}{bracket}{rest}"

        try:
            values = {name: _parsed(value, by_name[name]) for name, value in typed.items()}
            if base is not None:
                untyped = by_name.keys() - typed
                yielding = [name for name, other in _YIELDS.items() if other in typed and name in untyped]
                values |= {name: by_name[name].default for name in yielding}
            built = build(options, _words_in_file(base, by_name) | values, base)
            _check_paths(built, by_name)
            more = {"typed": frozenset(typed)} if entry.tell_typed else {}
            run = entry.report_of and entry.report_of(built)
            _check_addresses()
            return Prepared(partial(imported(entry.function), built, **more), run, name_origin)
        except UsageError as error:
            name_origin(error)
            raise

    leading = []
    if load is not None:
        file_help = Parameter(name="RUN.TOML", help=_CONFIG_FILE_HELP, show_default=False)
        leading.append(_parameter(CONFIG_FILE, Path | None, file_help, None, inspect.Parameter.POSITIONAL_ONLY))
    leading += [_positional(by_name[name]) for name in positional]
    rest = [field for name, field in by_name.items() if name not in positional]
    titles = {field.section: field.title for field in rest}
    groups = {section: Group(title, sort_key=number) for number, (section, title) in enumerate(titles.items())}
    parameters = leading + [_option(field, groups[field.section], by_name.keys()) for field in rest]
    if "debug" not in by_name:
        group = Group("Errors", sort_key=1000)
        flag = Parameter(help=_DEBUG_HELP, group=group, negative=(), show_default=False)
        parameters.append(_parameter("debug", bool, flag, False))
    prepare.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return prepare


def imported(place: Any) -> Any:
    """What `module:name` names; anything but a text as it is."""
    if not isinstance(place, str):
        return place
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


_IMPORTED_BYTES, _THREAD_BYTES = 576 << 20, 40 << 20
"""Addresses that NumPy and PyTorch take when they are imported, and OpenBLAS for each of its threads (measured)."""


def _check_addresses() -> None:
    """Raise ResourceError under a `ulimit -v` too low for the imports: OpenBLAS would end the process with 1."""
    if "torch" in sys.modules:
        return
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        if (stated := os.environ.get(name, "")).isdecimal():
            threads = min(threads, max(1, int(stated)))
            break
    needed = _IMPORTED_BYTES + threads * _THREAD_BYTES
    if not may_reserve(needed):
        raise ResourceError(
            "the limit of this process's addresses is too low to load PyTorch",
            where="ulimit -v",
            why=f"NumPy and PyTorch alone take some {needed >> 20:,} MiB",
            next_step="raise the limit (ulimit -v unlimited), or limit memory with --memory or a control group instead",
        )


LONGEST_PATH = 4000
MOST_PARTS = 256


def _check_paths(built: Any, by_name: Mapping[str, OptionField]) -> None:
    """Raise UsageError for a path that no system opens: making a directory of a thousand parts fails in many ways."""
    for name, field in by_name.items():
        value = value_of(built, field)
        for path in value if isinstance(value, tuple) else (value,):
            if not isinstance(path, Path):
                continue
            text = str(path)
            if (
                len(text) > LONGEST_PATH
                or len(path.parts) > MOST_PARTS
                or any(len(os.fsencode(part)) > 255 for part in path.parts)
                or "\0" in text
            ):
                raise UsageError(
                    f"{shorten(text)!r} cannot be a path",
                    where=name,
                    why=f"it has at most {MOST_PARTS} names of 255 bytes, {LONGEST_PATH:,} characters, no zero byte",
                )


def _by_position(leading: Sequence[inspect.Parameter], args: Sequence[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for number, parameter in enumerate(leading[: len(args)]):
        several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        values[parameter.name] = tuple(args[number:]) if several else args[number]
    return values


def _parsed(value: Any, field: OptionField) -> Any:
    if field.parse is None:
        return value
    try:
        return field.parse((value,) if isinstance(value, str) else value)
    except UsageError as error:
        error.where = error.where or field.name
        raise


def _words_in_file(base: Any, by_name: Mapping[str, OptionField]) -> dict[str, Any]:
    """Fields with a parser that a TOML file gives as one text, such as "q_proj,v_proj", read as on the command line."""
    if base is None:
        return {}
    values = {name: value_of(base, field) for name, field in by_name.items() if field.parse is not None}
    return {name: _parsed(value, by_name[name]) for name, value in values.items() if isinstance(value, str)}


def _parameter(
    name: str, hint: Any, said: Parameter, default: Any, kind: Any = inspect.Parameter.KEYWORD_ONLY
) -> inspect.Parameter:
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[hint, said])


def _option(field: OptionField, group: Group, names: Set[str]) -> inspect.Parameter:
    default = field.default  # shown as one would type it, the words of a tuple side by side
    silent = default in (None, (), {}, "") or default is MISSING or default is False
    said = Parameter(
        name=(field.option, *field.also) if field.also else None,
        help=_help(field, names),
        group=group,
        # A flag that is off by default is turned off again, over a TOML file, with --flag=false.
        negative=None if default is True else (),
        converter=_whole_numbers(field) if int in _types_in(field.hint) else None,
        consume_multiple=takes_several(field.hint) or None,
        show_default=False if silent else " ".join(map(str, default)) if isinstance(default, tuple) else str(default),
        metavar=_metavar(field),
    )
    return _parameter(field.name, _typed_on_command_line(field), said, _default_on_command_line(field))


_FOR_A_FRACTION = {
    "epochs": "; --max-steps ends a run within an epoch",
    "warmup_steps": ": it counts steps, and is no share of them; left out, it is 3 % of them",
}


def _whole_numbers(field: OptionField) -> Callable[[Any, Sequence[Token]], Any]:
    """What cyclopts converts whole numbers by: left to itself, it rounds a fraction."""

    def converted(hint: Any, tokens: Sequence[Token]) -> Any:
        for token in tokens:
            with suppress(ValueError):
                if not float(token.value).is_integer():
                    raise UsageError(
                        f"{token.value} is not a whole number",
                        where=field.option,
                        next_step=f"give a whole number{_FOR_A_FRACTION.get(field.name, '')}",
                    )
        return convert(hint, tokens)

    return converted


def _types_in(hint: Any) -> set[Any]:
    """A type, and all that it is made of."""
    return {hint}.union(*map(_types_in, get_args(hint)))


def _metavar(field: OptionField) -> str | None:
    """What stands for the value in the help, where it is not the name of the type that is converted to."""
    if is_mapping(field.hint):
        return "NAME=VALUE"
    words = [word for member in get_args(field.hint) for word in get_args(member) if get_origin(member) is Literal]
    if float in get_args(field.hint) and words:
        return "|".join(("NUMBER", *words))
    return "NUMBER..." if float in get_args(field.hint) and takes_several(field.hint) else None


def _help(field: OptionField, names: Set[str]) -> str:
    """The field's docstring, other fields named as the options they are here; words that are values stay."""
    members = union_members(field.hint)
    # Literals may also stand within a tuple.
    literals = (*members, *(inner for member in members for inner in get_args(member)))
    values = {str(value) for literal in literals for value in get_args(literal)}

    def named(match: re.Match[str]) -> str:
        word = match[1]
        return f"`--{word.replace('_', '-')}`" if word in names and word not in values else match[0]

    return re.sub(r"`(\w+)`", named, field.help)


def _default_on_command_line(field: OptionField) -> Any:
    """The field's default, of the type that is typed: cyclopts holds one against the other if pydantic is loaded."""
    if field.default is MISSING:
        return inspect.Parameter.empty
    if _typed_on_command_line(field) == tuple[str, ...] and not isinstance(field.default, tuple):
        return (str(field.default),) if field.default else ()
    return field.default


def _typed_on_command_line(field: OptionField) -> Any:
    """The type cyclopts converts to: words for what a parser takes over, the field's own type otherwise."""
    several = takes_several(field.hint) and (field.parse is not None or str in get_args(field.hint))
    return tuple[str, ...] if several or is_mapping(field.hint) else field.hint


def _positional(field: OptionField) -> inspect.Parameter:
    several = takes_several(field.hint)
    kind = inspect.Parameter.VAR_POSITIONAL if several else inspect.Parameter.POSITIONAL_ONLY
    hint: Any = get_args(field.hint)[0] if several else field.hint
    default = inspect.Parameter.empty if several or field.default is MISSING else field.default
    return _parameter(field.name, hint, Parameter(help=field.help, negative=()), default, kind)
