"""Errors and notes of the package's functions: they name options as a call does.

    give --objective dpo, or --data FILE      →      give objective="dpo", or data=… (a path, …)
    add: --prompt '{a}' --completion b         →      add: prompt="{a}", completion="b"
    use backhand generate --labels auto        →      use backhand.generate(…, labels="auto")

    give --skip-bad, or use `backhand lint`    →      give skip_bad=True, or use `backhand.lint`

Messages are written for the command line, where most of them are read. A command that is no function, or has
options that the function does not have, stays as it is: alone if it is in backquotes, else with the whole part.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from backhand.bounds import Options, check_names, plain_value, split_hint, union_members
from backhand.cli.exit_status import is_secondary_process
from backhand.cli.openmp_limits import remove_limits
from backhand.cli.openmp_spin import adaptive_spinning, set_spin_count
from backhand.cli.option_fields import as_option, is_mapping, option_fields, takes_several, value_of
from backhand.data.given_rows import GivenRows, refuse_column
from backhand.errors import BackhandError, UsageError
from backhand.printing import may_be_silent, never_silent, wording

remove_limits()  # before a function imports torch
set_spin_count()

P = ParamSpec("P")
R = TypeVar("R")

_COMMAND = re.compile(r"(`?)\bbackhand ([a-z]+)")
_OPTION = re.compile(r"--[a-z][a-z0-9-]*[a-z0-9]")
_VALUE = re.compile(
    r""" (\$'(?:[^'\\]|\\.)*'|\w+='[^']*'|(?:'[^']*'|"'")+|(?![\s-])(?:[^\s'"`,;()]|,(?=\S))*[^\s'"`,;().:!?])"""
)
"""The word after an option, quoted for a shell or without the punctuation at its end."""
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_]+|…")
_NUMBER = re.compile(r"\d[\d.,]*(e-?\d+)?")
_NOT_PROSE = re.compile(r"\S[./_:,=]\S|\d")
"""Part of a value such as `runs/a`, `f.py:g` or `run-2`. No word of a sentence contains it."""
_SPECIAL = ("auto", "none", "chosen")
"""Values of options that take any text."""
_CONJUNCTIONS = ("and", "or")
"""Words between options, which are no values unless they are quoted."""
_LIST_STARTS = (": ", "- ", "add ", "trained with ")
"""Text in front of options that says nothing of them. It may be missing."""
_ROWS = ("data", "eval_data")
"""Options that take rows."""
_ROWS_MEANT = " (a path, a list of dicts or a data frame)"
"""Explanation of rows. A call in a sentence leaves it out."""
_TEXT_ARGUMENTS: dict[str, str] = {}
"""The argument that takes one text, by function."""
_HINTS: dict[str, dict[str, Any]] = {}
"""The type of each option by its name with dashes, by function."""
_REQUIRED: dict[str, set[str]] = {}
"""The arguments without which a call is only a part of one, by function: the first and those without a default."""


def errors_in_python(*kinds: type, takes_text: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator: errors and notes of a function name the options of these dataclasses as keyword arguments.

    A long call prints its progress as a command does, unless it is quiet, and its threads wait like those of one.

    Args:
        kinds: the dataclasses.
        takes_text: the first argument of the function is a text.
    """
    of_options = {as_option(field.name): field.hint for kind in kinds for field in option_fields(kind)}

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        named = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
        arguments = {as_option(one.name): str for one in named}  # some are no options of the command
        _HINTS[function.__name__] = hints = arguments | of_options
        if takes_text:
            _TEXT_ARGUMENTS[function.__name__] = named[0].name
        _REQUIRED[function.__name__] = {
            one.name for place, one in enumerate(named) if one.default is one.empty or not place
        }

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            words = _Words(hints)
            token = wording.set(words)
            try:
                _check_arguments(function, args, kwargs, kinds)
                for option in _ROWS:
                    refuse_column(option, kwargs.get(option))
                with ExitStack() as stack:
                    if is_secondary_process() or _is_quiet((*args, *kwargs.values()), kwargs):
                        stack.enter_context(may_be_silent())
                    stack.enter_context(never_silent(f"backhand.{function.__name__}"))
                    stack.enter_context(adaptive_spinning())
                    return function(*map(plain_value, args), **plain_value(kwargs))
            except BackhandError as error:
                error.reword(words)
                raise
            finally:
                wording.reset(token)

        return call

    return decorate


class _Words:
    """Change texts of one call: options become keyword arguments, and rows in memory have the name of their argument.

    Attributes:
        names: the argument of rows in memory, by their name. The row of a single text has a name of its own.
    """

    def __init__(self, hints: dict[str, Any]) -> None:
        self._hints = hints
        self.names: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        """Change a note or a part of an error."""
        if "--" in text or "backhand " in text:
            text = in_python(text, _HINTS["train"] | self._hints)  # messages about an adapter name training's options
        for rows, option in self.names.items():
            text = text.replace(rows, option)
        return text


def _is_quiet(values: Iterable[Any], named: Mapping[str, Any]) -> bool:
    """Return the value of the option `quiet`, given by name or in an object of options."""
    quiet = False
    for value in values:
        if isinstance(value, Options):
            quiet = any(value_of(value, field) for field in option_fields(type(value)) if field.name == "quiet")
    return bool(named.get("quiet", quiet))


def name_rows(options: Any) -> None:
    """Let the messages of this call name rows in memory by their argument instead of their digest."""
    words = wording.get()
    assert isinstance(words, _Words)
    for option in _ROWS:
        for section in (options, *vars(options).values()):
            names = getattr(section, option, None)
            if isinstance(names, tuple) and names and isinstance(name := names[0], GivenRows):
                if name.option and len(name.rows) == 1:
                    words.names.setdefault(f"{name} row 1", name.option)
                words.names.setdefault(name, name.option or option)


def _check_arguments(
    function: Callable[..., Any], args: Collection[Any], kwargs: Mapping[str, Any], kinds: tuple[type, ...]
) -> None:
    """Raise UsageError if a name does not exist, a required argument is missing, or there are too many."""
    name, signature = f"backhand.{function.__name__}", inspect.signature(function)
    named = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        by_name = ", ".join(one.name for one in named if one.kind is inspect.Parameter.KEYWORD_ONLY)
        raise UsageError(f"{name}: {error}", next_step=f"give these by name: {by_name}") from None
    missing = [one.name for one in named if one.default is inspect.Parameter.empty and one.name not in given]
    hints = {field.name: field.hint for kind in kinds for field in option_fields(kind)}
    known = {**dict.fromkeys(one.name for one in named), **hints}
    of_train = {option[2:].replace("-", "_"): "backhand.train" for option in _HINTS.get("train", {})}
    unknown = None
    try:
        check_names(name, kwargs, known, of_train, text=_TEXT_ARGUMENTS.get(function.__name__), shown=as_option)
    except UsageError as error:
        if not missing:
            raise
        unknown = error
    if not missing:
        return
    choices = {one: _choices(hints.get(one)) for one in missing}
    needs = f"needs the argument{'s' * (len(missing) > 1)} {', '.join(missing)}"
    answer = str(unknown.next_step) if unknown else ""
    steps = [
        f"give {one}=…" + (f", one of {', '.join(words)}" if words else "")
        for one, words in choices.items()
        if one not in answer
    ]
    texts = {key: value for key, value in kwargs.items() if isinstance(value, str)}
    meant = {one: (key, value) for key, value in texts.items() for one, words in choices.items() if value in words}
    if meant:
        steps = [f'give {one}="{value}" instead of {key}' for one, (key, value) in meant.items()]
    if unknown is not None:
        steps = steps if meant else [answer, *steps]
        needs = f"{unknown.what}, and {needs}"
    raise UsageError(needs if unknown else f"{name} {needs}", next_step="; ".join(steps))


def in_python(text: str, hints: dict[str, Any]) -> str:
    """Return a text with options as keyword arguments.

    Args:
        text: a part of an error.
        hints: the type of each option, by its name with dashes. Other words that look like options stay as they are.
    """
    pieces: list[str] = []
    end = 0
    for match in re.finditer(rf"{_COMMAND.pattern}|{_OPTION.pattern}", text):
        if match.start() < end:
            continue
        quote, command = match[1] or "", match[2]
        start = match.end() if command else match.start()
        arguments, after = _arguments(text, start, _HINTS.get(command, {}) if command else hints)
        if command and (command not in _HINTS or text.startswith(" --", after)):  # a command for a shell
            if not quote:
                return text
            after = text.find(quote, match.end()) + 1 or len(text)
            pieces.append(text[end:after])
            end = after
            continue
        written = ", ".join(arguments)
        if command:
            written = written.replace(_ROWS_MEANT, "")
            complete = _REQUIRED[command] <= {one.partition("=")[0] for one in arguments}
            others = "" if complete or written.startswith("data=…") else "…, "
            written = quote + (f"backhand.{command}({others}{written})" if arguments else f"backhand.{command}")
        if written:
            pieces += [text[end : match.start()], written]
            end = after
    return "".join(pieces) + text[end:]


def _arguments(text: str, end: int, hints: Mapping[str, Any]) -> tuple[list[str], int]:
    """Return the keyword arguments of the options that follow each other from `end` on, and the end of the last one."""
    arguments: list[str] = []
    while (option := _OPTION.match(text, end + text.startswith(" ", end))) and option[0] in hints:
        name = option[0][2:].replace("-", "_")
        word = _VALUE.match(text, option.end())
        rest = text[word.end() :] if word else ""
        alone = (not rest or rest[0] in ",;") and (not option.start() or text[: option.start()].endswith(_LIST_STARTS))
        typed = alone or rest.startswith(" --") or (bool(arguments) and "=" in arguments[-1])
        value, after = _value(name, hints[option[0]], word, typed=typed)
        if value and arguments and arguments[-1].startswith(f"{name}="):  # an option that takes several values
            arguments[-1] = _joined(arguments[-1], value)
        else:
            arguments.append(name + value)
        end = after or option.end()
    return arguments, end


def _joined(argument: str, value: str) -> str:
    """Return a keyword argument of a list or a mapping with a further value, which begins with "="."""
    name, _, first = argument.partition("=")
    if value.startswith("={"):
        return f"{name}={first[:-1]}, {value[2:]}"
    return f"{name}=[{first.strip('[]')}, {value[1:].strip('[]')}]"


def _value(name: str, hint: Any, word: re.Match[str] | None, *, typed: bool) -> tuple[str, int]:
    """Return the value of a keyword argument with its sign of equality, and the end of the word that it replaces.

    Args:
        typed: another option directly precedes or follows, or nothing else is said, so the word is a value and no
            prose.
    """
    if split_hint(hint)[0] is bool:
        return "=True", 0
    if word is None:
        return "", 0
    text = word[1]
    if text in _CONJUNCTIONS:
        return "", 0
    if name in _ROWS and text == "FILE":
        return f"=…{_ROWS_MEANT}", word.end()
    if _PLACEHOLDER.fullmatch(text):
        return f"={text}", word.end()
    quoted = text[0] == "$" or "'" in text
    if not (quoted or typed or text in (*_SPECIAL, *_choices(hint)) or _NOT_PROSE.search(text)):
        return "", 0
    if text.startswith("$"):
        text = text[2:-1].replace('"', r"\"")  # Python has the same escapes
        return f'="{text}"', word.end()
    text = "".join(shlex.split(text)) if quoted else text
    key, equals, value = text.partition("=")
    if is_mapping(hint) and equals:
        return f"={{{_literal(key)}: {_literal(value)}}}", word.end()
    if takes_several(hint) and "," in text and not quoted:
        return f"=[{', '.join(_literal(part) for part in text.split(','))}]", word.end()
    literal = f'"{text}"' if name in ("prompt", "completion", "state") and _NUMBER.fullmatch(text) else _literal(text)
    return f"={literal}", word.end()


def _literal(text: str) -> str:
    r"""Return a typed value as Python. `\n` and `\t` stay, which options also read as a line break and a tab."""
    if _NUMBER.fullmatch(text):
        return text.replace(",", "")
    if text in ("true", "false"):
        return text.capitalize()
    return '"' + re.sub(r'\\(?![nt])|"', r"\\\g<0>", text) + '"'


def _choices(hint: Any) -> list[str]:
    """Return the words that an option takes, or [] if it has no choices."""
    members = union_members(split_hint(hint)[0])
    return [one for member in members if get_origin(member) is Literal for one in get_args(member)]
