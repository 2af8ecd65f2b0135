"""An options dataclass as a command: each field an option; what was typed is set, over a TOML file if one was named."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from cyclopts import Group, Parameter

from backhand.cli import fields
from backhand.cli.fields import OptionField, Parse
from backhand.errors import UsageError

Options = TypeVar("Options")

CONFIG_FILE = "config_file"
_CONFIG_FILE_HELP = "TOML file of options, in tables as in a run's config.toml; the command line wins over it."
_DEBUG_HELP = "Show a traceback with an error."


def command(
    options: type[Options],
    call: Callable[..., int | None],
    *,
    parse: Mapping[str, Parse] | None = None,
    positional: Sequence[str] = (),
    load: Callable[[Path], Options] | None = None,
    tell_typed: bool = False,
) -> Callable[..., int | None]:
    """Make the function that cyclopts parses the command line for.

    Args:
        options: dataclass whose fields, each with a docstring under it, are the options.
        call: gets the dataclass; what it returns is the exit code, None for 0.
        parse: for fields whose type no command line knows, what makes a value of the words given.
        positional: fields that are given by position, in this order.
        load: reads a TOML file that may be named first; the command line wins over what it says.
        tell_typed: give `call` also the set of field names that were typed, as `typed`.
    """
    parsers = parse or {}
    by_name = {field.name: field for field in fields.option_fields(options)}

    def run(*args: Any, **given: Any) -> int | None:
        given |= _by_position(leading, args)
        file = given.pop(CONFIG_FILE, None)
        base = load(file) if load is not None and file is not None else None
        typed = {name: value for name, value in given.items() if name in by_name}
        try:
            values = {name: _parsed(value, parsers.get(name)) for name, value in typed.items()}
            built = fields.build(options, _words_in_file(base, by_name, parsers) | values, base)
            return call(built, typed=frozenset(typed)) if tell_typed else call(built)
        except UsageError as error:
            _name_origin(error, by_name, typed, base, file, positional)
            raise

    leading = [_config_file()] if load is not None else []
    leading += [_positional(by_name[name]) for name in positional]
    rest = [field for name, field in by_name.items() if name not in positional]
    groups = _groups(rest)
    names = by_name.keys()
    parameters = leading + [_option(field, groups[field.section], names, field.name in parsers) for field in rest]
    if "debug" not in by_name:
        parameters.append(_flag("debug", _DEBUG_HELP))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _by_position(leading: Sequence[inspect.Parameter], args: Sequence[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for number, parameter in enumerate(leading[: len(args)]):
        several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        values[parameter.name] = tuple(args[number:]) if several else args[number]
    return values


def _parsed(value: Any, parse: Parse | None) -> Any:
    if parse is None:
        return value
    return parse((value,) if isinstance(value, str) else value)


def _words_in_file(base: Any, by_name: Mapping[str, OptionField], parsers: Mapping[str, Parse]) -> dict[str, Any]:
    """Fields with a parser that a TOML file gives as one text, such as "q_proj,v_proj", read as on the command line."""
    if base is None:
        return {}
    values = {name: fields.value_of(base, by_name[name]) for name in parsers}
    return {name: _parsed(value, parsers[name]) for name, value in values.items() if isinstance(value, str)}


def _groups(options: Sequence[OptionField]) -> dict[tuple[str, ...], Group]:
    titles = {field.section: field.title for field in options}
    return {section: Group(title, sort_key=number) for number, (section, title) in enumerate(titles.items())}


def _option(field: OptionField, group: Group, names: Set[str], parsed: bool) -> inspect.Parameter:
    silent = field.default in (None, (), {}, "") or field.default is MISSING or field.default is False
    parameter = Parameter(
        help=_help(field, names),
        group=group,
        # A flag that is off by default is turned off again, over a TOML file, with --flag=false.
        negative=None if field.default is True else (),
        consume_multiple=fields.takes_several(field.hint) or None,
        show_default=False if silent else _as_typed(field.default),
        metavar=_metavar(field),
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=_default_on_command_line(field, parsed),
        annotation=Annotated[_typed_on_command_line(field, parsed), parameter],
    )


def _metavar(field: OptionField) -> str | None:
    """What stands for the value in the help, where it is not the name of the type that is converted to."""
    if fields.is_mapping(field.hint):
        return "NAME=VALUE"
    return "NUMBER..." if float in get_args(field.hint) and fields.takes_several(field.hint) else None


def _as_typed(default: Any) -> str:
    """A default as one would type it: the words of a tuple side by side."""
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _help(field: OptionField, names: Set[str]) -> str:
    """The field's docstring, other fields named as the options they are here; words that are values stay."""
    members = fields.union_members(field.hint)
    # Literals may also stand within a tuple.
    literals = (*members, *(inner for member in members for inner in get_args(member)))
    values = {str(value) for literal in literals for value in get_args(literal)}

    def named(match: re.Match[str]) -> str:
        word = match[1]
        return f"`--{word.replace('_', '-')}`" if word in names and word not in values else match[0]

    return re.sub(r"`(\w+)`", named, field.help)


def _default_on_command_line(field: OptionField, parsed: bool) -> Any:
    """The field's default, of the type that is typed: cyclopts holds one against the other if pydantic is loaded."""
    if field.default is MISSING:
        return inspect.Parameter.empty
    if _typed_on_command_line(field, parsed) == tuple[str, ...] and not isinstance(field.default, tuple):
        return (str(field.default),) if field.default else ()
    return field.default


def _typed_on_command_line(field: OptionField, parsed: bool) -> Any:
    """The type cyclopts converts to: words for what a parser takes over, the field's own type otherwise."""
    several = fields.takes_several(field.hint) and (parsed or str in get_args(field.hint))
    return tuple[str, ...] if several or fields.is_mapping(field.hint) else field.hint


def _positional(field: OptionField) -> inspect.Parameter:
    several = fields.takes_several(field.hint)
    kind = inspect.Parameter.VAR_POSITIONAL if several else inspect.Parameter.POSITIONAL_ONLY
    hint: Any = get_args(field.hint)[0] if several else field.hint
    default = inspect.Parameter.empty if several or field.default is MISSING else field.default
    annotation = Annotated[hint, Parameter(help=field.help, negative=())]
    return inspect.Parameter(field.name, kind, default=default, annotation=annotation)


def _config_file() -> inspect.Parameter:
    annotation = Annotated[Path | None, Parameter(name="RUN.TOML", help=_CONFIG_FILE_HELP, show_default=False)]
    return inspect.Parameter(CONFIG_FILE, inspect.Parameter.POSITIONAL_ONLY, default=None, annotation=annotation)


def _flag(name: str, text: str) -> inspect.Parameter:
    group = Group("Errors", sort_key=1000)
    annotation = Annotated[bool, Parameter(help=text, group=group, negative=(), show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def _name_origin(
    error: UsageError,
    by_name: Mapping[str, OptionField],
    typed: Mapping[str, Any],
    base: Any,
    file: Path | None,
    positional: Sequence[str],
) -> None:
    """Say where the user wrote the value of a field that was refused: the option, its place, or file and key."""
    name, bracket, rest = (error.where or "").partition("[")
    if name not in by_name:
        return
    field = by_name[name]
    if base is not None and name not in typed and fields.value_of(base, field) != field.default:
        error.where = f"{file}: {'.'.join((*field.section, name))}{bracket}{rest}"
    elif name in positional:
        error.where = name.upper()  # as the help names it
    else:
        error.where = f"{field.option}{bracket}{rest}"
