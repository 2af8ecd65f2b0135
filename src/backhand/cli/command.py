"""Turn an options dataclass into a command: each field is an option. Typed options override those of a TOML file.

Nothing runs here. A parsed command line is a `Prepared`: a function with its options, which `cli.main` calls.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import MISSING
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from cyclopts import Group, Parameter, Token, convert

from backhand.bounds import Options, union_members
from backhand.cli.option_fields import OptionField, build, is_mapping, option_fields, takes_several, value_of
from backhand.errors import ResourceError, UsageError
from backhand.printing import going_on
from backhand.system import affinity_cores, may_reserve
from backhand.words import shorten

if typing.TYPE_CHECKING:
    from backhand.cli.entry import Command


CONFIG_FILE = "config_file"
_CONFIG_FILE_HELP = "TOML or .yaml file of options, in tables as in a run's config.toml. Typed options override it."
_DEBUG_HELP = "Show a traceback with an error."


_YIELDS = {"eval_fraction": "eval_data"}
"""Options of a file that are ignored if another option is typed. A run's config.toml contains the default share."""


class Prepared(NamedTuple):
    """A parsed command line, ready to run."""

    function: Callable[[], object]  # an integer that it returns is the exit code; any other result means 0
    report_of: Path | None  # the run that the command proves something about, or None; its report is updated
    name_origin: Callable[[UsageError], None]  # replaces a field's name in an error with the place where it was written


def command(entry: Command) -> Callable[..., Prepared]:
    """Return a function whose signature cyclopts parses. It runs nothing and returns the prepared command.

    Raises:
        TypeError: `option_fields` refuses the options.
    """
    options, load, positional = imported(entry.options), entry.file, entry.positional
    by_name = {field.name: field for field in option_fields(options)}

    def prepare(*args: Any, **given: Any) -> Prepared:
        given |= _by_position(leading, args)
        file = given.pop(CONFIG_FILE, None)
        base = load(file) if load is not None and file is not None else None
        typed = {name: value for name, value in given.items() if name in by_name}

        def name_origin(error: UsageError) -> None:
            """Replace the name of a refused field with the option, its position, or the file and key."""
            name, bracket, rest = (error.where or "").partition("[")
            if (field := by_name.get(name)) is None:
                return
            if base is not None and name not in typed and value_of(base, field) != field.default:
                error.where = f"{file}: {'.'.join((*field.section, name))}{bracket}{rest}"
            else:  # the name in the help
                error.where = name.upper() if name in positional else f"{field.option}{bracket}{rest}"

        try:
            values = {name: _parsed(value, by_name[name]) for name, value in typed.items()}
            if base is not None:
                untyped = by_name.keys() - typed
                yielding = [name for name, other in _YIELDS.items() if other in typed and name in untyped]
                values |= {name: by_name[name].default for name in yielding}
            built = build(options, _words_in_file(base, by_name) | values, base)
            _check_paths(built, by_name)
            if isinstance(built, Options):
                built.validate()  # before PyTorch is imported
            more = {"typed": frozenset(typed)} if entry.tell_typed else {}
            run = entry.report_of and entry.report_of(built)
            _check_address_space()
            with going_on("importing PyTorch"):
                function = imported(entry.function)
            return Prepared(partial(function, built, **more), run, name_origin)
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
    """Import what `module:name` names; any other value is returned unchanged."""
    if not isinstance(place, str):
        return place
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


_IMPORTED_BYTES, _THREAD_BYTES = 576 << 20, 40 << 20
"""Address space that importing NumPy and PyTorch needs, and that OpenBLAS needs per thread, in bytes (measured)."""


def _check_address_space() -> None:
    """Raise ResourceError if `ulimit -v` is too low for the imports: OpenBLAS would end the process with code 1."""
    if "torch" in sys.modules:
        return
    threads = affinity_cores()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        if (stated := os.environ.get(name, "")).isdecimal():
            threads = min(threads, max(1, int(stated)))
            break
    needed = _IMPORTED_BYTES + threads * _THREAD_BYTES
    if not may_reserve(needed):
        raise ResourceError(
            "the limit of this process's address space is too low to load PyTorch",
            where="ulimit -v",
            why=f"NumPy and PyTorch alone need some {needed >> 20:,} MiB",
            next_step="raise the limit (ulimit -v unlimited), or limit memory with --memory or a control group instead",
        )


LONGEST_PATH = 4000
MOST_PARTS = 256


def _check_paths(built: Any, by_name: Mapping[str, OptionField]) -> None:
    """Raise UsageError for a path that no system can open. Creating such directories fails in many ways."""
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
                    f"{shorten(text)!r} is not a possible path",
                    where=name,
                    why=f"it may have {MOST_PARTS} names of 255 bytes, {LONGEST_PATH:,} characters, and no zero byte",
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
    """Parse fields with a parser that a TOML file gives as text, such as "q_proj,v_proj", as on the command line."""
    if base is None:
        return {}
    values = {name: value_of(base, field) for name, field in by_name.items() if field.parse is not None}
    return {name: _parsed(value, by_name[name]) for name, value in values.items() if isinstance(value, str)}


def _parameter(
    name: str, hint: Any, parameter: Parameter, default: Any, kind: Any = inspect.Parameter.KEYWORD_ONLY
) -> inspect.Parameter:
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[hint, parameter])


def _option(field: OptionField, group: Group, names: Set[str]) -> inspect.Parameter:
    default = field.default  # displayed as typed: the words of a tuple separated by spaces
    silent = default in (None, (), {}, "") or default is MISSING or default is False
    parameter = Parameter(
        name=(field.option, *field.also) if field.also else None,
        help=_help(field, names),
        group=group,
        # --flag=false turns off a flag that is off by default, if a TOML file turned it on.
        negative=None if default is True else (),
        converter=_whole_numbers(field) if int in _types_in(field.hint) else None,
        consume_multiple=takes_several(field.hint) or None,
        show_default=False if silent else " ".join(map(str, default)) if isinstance(default, tuple) else str(default),
        metavar=_metavar(field),
    )
    return _parameter(field.name, _typed_on_command_line(field), parameter, _default_on_command_line(field))


_FOR_A_FRACTION = {
    "epochs": "; --max-steps ends a run within an epoch",
    "warmup_steps": ": it is a number of steps, not a share; the default is 3 % of all steps",
}


def _whole_numbers(field: OptionField) -> Callable[[Any, Sequence[Token]], Any]:
    """Return a converter that refuses fractions, which cyclopts would round to whole numbers."""

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
    """Return a type and all types inside it."""
    return {hint}.union(*map(_types_in, get_args(hint)))


def _metavar(field: OptionField) -> str | None:
    """Return the placeholder of the value in the help, or None for the name of the converted type."""
    if is_mapping(field.hint):
        return "NAME=VALUE"
    words = [word for member in get_args(field.hint) for word in get_args(member) if get_origin(member) is Literal]
    if float in get_args(field.hint) and words:
        return "|".join(("NUMBER", *words))
    return "NUMBER..." if float in get_args(field.hint) and takes_several(field.hint) else None


def _help(field: OptionField, names: Set[str]) -> str:
    """Return the field's docstring with the names of other fields as options. Names that are also values stay."""
    members = union_members(field.hint)
    # A tuple may contain literals too.
    literals = (*members, *(inner for member in members for inner in get_args(member)))
    values = {str(value) for literal in literals for value in get_args(literal)}

    def named(match: re.Match[str]) -> str:
        word = match[1]
        return f"`--{word.replace('_', '-')}`" if word in names and word not in values else match[0]

    return re.sub(r"`(\w+)`", named, field.help)


def _default_on_command_line(field: OptionField) -> Any:
    """Return the field's default in the type that is typed: cyclopts compares the two if pydantic is loaded."""
    if field.default is MISSING:
        return inspect.Parameter.empty
    if _typed_on_command_line(field) == tuple[str, ...] and not isinstance(field.default, tuple):
        return (str(field.default),) if field.default else ()
    return field.default


def _typed_on_command_line(field: OptionField) -> Any:
    """Return the type that cyclopts converts to: words for fields with a parser, otherwise the field's own type."""
    several = takes_several(field.hint) and (field.parse is not None or str in get_args(field.hint))
    return tuple[str, ...] if several or is_mapping(field.hint) else field.hint


def _positional(field: OptionField) -> inspect.Parameter:
    several = takes_several(field.hint)
    kind = inspect.Parameter.VAR_POSITIONAL if several else inspect.Parameter.POSITIONAL_ONLY
    hint: Any = get_args(field.hint)[0] if several else field.hint
    default = inspect.Parameter.empty if several or field.default is MISSING else field.default
    return _parameter(field.name, hint, Parameter(help=field.help, negative=()), default, kind)
