"""Option ranges, declared next to each field. Validation, help and docs are generated from them.

    rank: Annotated[int, Bound(at_least=1)] = 16
    dtype: Literal["auto", "float32"] = "auto"

`check_fields` compares every field of an options dataclass, and of the dataclasses in it, with its annotation. Rules
about several fields are in the dataclass's `_check_together`. A program may give a text for a path, a path for a text,
one text for a list of texts, and what a `Convert` accepts. This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, ParamSpec, Self, TypeVar, get_args, get_origin

from backhand.errors import UsageError
from backhand.other_names import suggestion, value_suggestion
from backhand.words import shown, with_article

P = ParamSpec("P")
R = TypeVar("R")
Parse = Callable[[Sequence[str]], Any]
"""Converts the words after an option into the value of a field whose type the command line does not support."""


@dataclass(frozen=True)
class Bound:
    """The range of a number. The annotated type says whether it is an integer."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    noun: str = ""  # the value's name in an error; the field's name if empty
    why: str | None = None  # the reason for the upper limit
    next_step: str | None = None  # what to do about a larger value

    def check_number(self, where: str, value: Any, *, whole: bool) -> None:
        """Raise UsageError unless `value` is a number in the range, and an integer if `whole`."""
        noun = self.noun or where.partition("[")[0]
        if not _is_number(value, whole=whole) or self._too_small(value) or (self._too_large(value) and self._interval):
            as_text = isinstance(value, str) and _is_number(_number_in(value), whole=False)
            kind = "a text, not" if as_text else "not"
            raise UsageError(
                f"{noun} {shown(value)} is {kind} {self._expected(whole=whole)}",
                where=where,
                next_step=self._next_step(where, value, whole=whole),
            )
        if self._too_large(value):
            limit = f"above {self.at_most}" if self.at_most is not None else f"not below {_power(self.below)}"
            raise UsageError(f"{noun} {value} is {limit}", where=where, why=self.why, next_step=self.next_step)

    @property
    def sentence(self) -> str:
        """Return the range for the help: `At least 1.`, `1 to 1024.`, `In [0, 1).`."""
        if self._interval:
            return f"In {self._interval}."
        if self.at_most is not None:
            low = f"Above {self.above}, at most" if self.at_least is None else f"{self.at_least} to"
            return f"{low} {self.at_most}."
        if self.above is not None:
            return f"Above {self.above}."
        return f"At least {self.at_least}."

    @property
    def _interval(self) -> str:
        """Return the range as an interval if its ends are 0 and 1, otherwise ""."""
        low = self.above if self.above is not None else self.at_least
        high = self.below if self.below is not None else self.at_most
        if low != 0 or high != 1:
            return ""
        return f"{'[' if self.above is None else '('}0, 1{']' if self.below is None else ')'}"

    def _expected(self, *, whole: bool) -> str:
        if self._interval:
            return f"a number in {self._interval}"
        low = f" above {self.above}" if self.above is not None else ""
        low = f" of at least {self.at_least}" if self.at_least is not None else low
        return f"an integer{low}" if whole else f"a finite number{low}"

    def _next_step(self, where: str, value: Any, *, whole: bool) -> str:
        """Return the option with the number that is meant: of a text, rounded, or of percent; else with its range."""
        if "[" in where:  # a value of a mapping
            return f"give {self._expected(whole=whole)}"
        option = f"--{where.replace('_', '-')}"
        number: Any = _number_in(value) if isinstance(value, str) else value
        if _is_number(number, whole=False):
            meant = [(round(number), str(round(number)))] if whole else [(number, str(value).strip())]
            meant += [(number / 100, str(number / 100))] if self._interval and number > 1 else []
            for one, written in meant:
                if not self._too_small(one) and not self._too_large(one):
                    return f"give {option} {written}"
        return f"give {option} {f'{self.at_least} or more' if whole and self.at_least else self._expected(whole=whole)}"

    def _too_small(self, value: float) -> bool:
        return (self.at_least is not None and value < self.at_least) or (self.above is not None and value <= self.above)

    def _too_large(self, value: float) -> bool:
        return (self.at_most is not None and value > self.at_most) or (self.below is not None and value >= self.below)


@dataclass(frozen=True)
class Check:
    """A rule with its own check and sentence."""

    check: Callable[[str, Any], None]  # called with the field's name and value; raises UsageError
    sentence: str = ""  # for the help


def several(at_least: int = 1) -> Check:
    """Return a rule for the shortest length of a list."""

    def check(where: str, value: Any) -> None:
        if isinstance(value, tuple | list) and len(value) >= at_least:
            return
        if at_least == 1 and value in ((), []):
            raise UsageError(f"{where} is empty", where=where)
        raise UsageError(f"{shown(value)} is not a list of {at_least} or more", where=where)

    return Check(check, f"{at_least} or more." if at_least > 1 else "")


def given(what: str, next_step: str) -> Check:
    """Return a rule that a text is not empty, with the error's message and next step."""

    def check(where: str, value: Any) -> None:
        if not isinstance(value, str | os.PathLike):
            raise UsageError(f"{where} {shown(value)} is not text", where=where, next_step=next_step)
        if not value:
            raise UsageError(what, where=where, next_step=next_step)

    return Check(check)


@dataclass(frozen=True)
class Also:
    """Another name of an option on the command line, which users of other programs know."""

    name: str  # with underscores, like a field's name

    sentence = ""

    @property
    def option(self) -> str:
        """Return the option as it is typed."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Words:
    """The parser of a type that the command line does not support, also for a single text in a TOML file."""

    parse: Parse


@dataclass(frozen=True)
class Convert:
    """The conversion of a value that a program gives to the field's own type."""

    convert: Callable[[Any], Any]  # returns any other value unchanged

    sentence = ""


_OF_COLUMNS = ("prompt", "completion", "state")
"""Options whose text may have columns in braces."""


def comma_list(text: str) -> list[str]:
    """Return the parts of a text between commas, without the spaces around them and without empty parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


def check_text(where: str, text: Any) -> None:
    """Raise UsageError unless `text` is a string that can be written as UTF-8."""
    if not isinstance(text, str):
        next_step = "write it as text: str(…)"
        if isinstance(text, list | tuple | dict):
            next_step = "write it as text: json.dumps(…), where JSON is read"
        if where in _OF_COLUMNS and not isinstance(text, int | float):
            names = text if isinstance(text, list | tuple) else ("title", "text")
            columns = r"\n".join(f"{{{name}}}" for name in names)
            next_step = f'give the name of a column, or a text with columns in braces: {where}="{columns}"'
        raise UsageError(f"{where} {shown(text)} is not text", where=where, next_step=next_step)
    half = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    if half is None:
        return
    encoding = sys.getfilesystemencoding()
    if not "\udc80" <= half <= "\udcff":
        raise UsageError(f"{where} holds half of a surrogate pair, which no tokenizer can read", where=where)
    # Python represents a byte of the command line that it cannot decode by such a character.
    raise UsageError(
        f"{where} cannot be read",
        where=where,
        why=f"byte 0x{ord(half) & 0xFF:02x} in it is none of {encoding}, as which this command line is read",
        next_step="convert it to UTF-8, for example with iconv -f latin1 -t utf-8"
        if encoding == "utf-8"
        else "set LC_ALL=C.UTF-8, and leave PYTHONUTF8 unset",
    )


Count = Annotated[int, Bound(at_least=1)]
CountFromZero = Annotated[int, Bound(at_least=0)]
Seed = Annotated[int, Bound(at_least=0, below=2**63)]
Share = Annotated[float, Bound(at_least=0, below=1)]
Positive = Annotated[float, Bound(above=0)]
NotNegative = Annotated[float, Bound(at_least=0)]
Text = Annotated[str, Check(check_text)]
BaseModel = Annotated[str, given("no base model is given", "give a directory, a file or a hub id")]


if TYPE_CHECKING:
    Read = TypeVar("Read")
    Accepted = TypeVar("Accepted")

    class Given(Generic[Read, Accepted]):
        """For type checkers: a field whose constructor accepts more types than the field has."""

        def __get__(self, instance: object, owner: object) -> Read: ...
        def __set__(self, instance: object, value: Accepted) -> None: ...

    GivenPath = Given[Path, str | os.PathLike[str]]
    OptionalPath = Given[Path | None, str | os.PathLike[str] | None]
    GivenBaseModel = Given[str, str | os.PathLike[str]]
    GivenTexts = Given[tuple[str, ...], str | Sequence[str]]
    TextOrTexts = Given[str | tuple[str, ...], str | Sequence[str]]
else:
    GivenPath, OptionalPath = Path, Path | None
    GivenBaseModel, GivenTexts, TextOrTexts = BaseModel, tuple[str, ...], str | tuple[str, ...]


class Options:
    """Base class of option dataclasses: names of arguments, conversion of their values, and validation.

    Raises:
        UsageError: from the constructor, for a name that no field has.
    """

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Create the object. Every unknown name is answered with the one to write instead."""
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        check_names(cls.__name__, named, known, _homes())
        if len(values) > len(known):
            raise UsageError(
                f"{cls.__name__} has {len(known)} options, and {len(values)} values are given",
                next_step=f"give options by name: {', '.join(known)}",
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Convert the values that programs give: see `plain_value` and `_converted`."""
        cls: type = type(self)
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, Options):
                converted = _converted(plain_value(value), hints_of(cls)[name])
                if converted is not value:
                    object.__setattr__(self, name, converted)

    def validate(self) -> Self:
        """Check every field by itself, then the fields together; return self.

        Raises:
            UsageError: with the field, its value and its range.
        """
        check_fields(self)
        self._check_together()
        return self

    def _check_together(self) -> None:
        """Raise UsageError if the values of several fields contradict one another."""


def check_names(
    owner: str,
    given: Mapping[str, Any],
    known: Collection[str],
    homes: Mapping[str, str],
    *,
    text: str | None = None,
    shown: Callable[[str], str] = str,
) -> None:
    """Raise UsageError for names that a class or function does not have, with the names to write instead.

    Args:
        owner: name of the class or function.
        given: values by the names that were given.
        known: names that it has.
        homes: other names, with the class that has each.
        text: the one of `known` that takes a single text, if there is one.
        shown: formats the equivalent of another tool's option.
    """
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    aliases = also_names(_option_classes())
    near = [
        suggestion(name, known, homes, value=given[name], text=text, shown=shown, aliases=aliases) for name in unknown
    ]
    said = [one or f"it has {', '.join(known)}" for one in near]
    several = [f"{name}: {text}" for name, text in zip(unknown, said, strict=True)]
    raise UsageError(
        f"{owner} has no option {' and no option '.join(unknown)}",
        next_step=said[0] if len(said) == 1 else "\n    - ".join(["", *several]),
    )


def checked_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function of the package whose call with wrong arguments raises UsageError, not TypeError."""
    name, signature = f"backhand.{function.__name__}", inspect.signature(function)
    shown = (f"{one.name}{'' if one.default is one.empty else '=…'}" for one in signature.parameters.values())
    usage = f"call {name}({', '.join(shown)})"

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_names(name, kwargs, signature.parameters, _homes())
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"{name}: {error}", next_step=usage) from None
        return function(*args, **kwargs)

    return call


def also_names(classes: Iterable[type]) -> dict[str, str]:
    """Map the alternative names of options on the command line to the options of these dataclasses."""
    return {
        rule.name: option
        for cls in classes
        for option, hint in hints_of(cls).items()
        for rule in split_hint(hint)[1]
        if isinstance(rule, Also)
    }


def _option_classes() -> list[type]:
    """Return all classes of options that are imported, without their base classes."""

    def below(cls: type) -> Iterator[type]:
        subclasses: list[type] = cls.__subclasses__()
        for subclass in subclasses:
            yield subclass
            yield from below(subclass)

    return [cls for cls in below(Options) if not cls.__subclasses__()]


def _homes() -> dict[str, str]:
    """Return the name of the class that has each option, of all classes of options that are imported."""
    return {field.name: cls.__name__ for cls in reversed(_option_classes()) for field in dataclasses.fields(cls)}


def plain_value(value: Any) -> Any:
    """Return a value without NumPy's and pandas' types: numbers as Python's, arrays as lists, missing values as None.

    Elements of lists, tuples and dicts are converted as well. Any other value is returned unchanged.
    """
    if isinstance(value, str) or type(value) in (bool, int, float, type(None)):
        return value
    if isinstance(value, dict):
        return {name: plain_value(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain_value, value))
    if type(value).__name__ in ("NAType", "NaTType"):  # of pandas, which is not imported for them
        return None
    as_list = getattr(value, "tolist", None) or getattr(value, "to_list", None)  # polars has the second name
    return as_list() if hasattr(value, "dtype") and callable(as_list) else value


def _converted(value: Any, hint: Any) -> Any:
    """Return a value as its field takes it: texts as paths and lists, paths as texts, and others by `Convert`."""
    plain, rules = split_hint(hint)
    for rule in rules:
        if isinstance(rule, Convert):
            value = rule.convert(value)
    kinds = [split_hint(member)[0] for member in union_members(plain)]
    if isinstance(value, str) and get_origin(kinds[0]) is Mapping and (parse := parse_of(hint)):
        return parse(value)
    if Path in kinds and str not in kinds:
        return Path(value) if isinstance(value, str | os.PathLike) and value else value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if any(map(_is_list_of_texts, kinds)):
        if isinstance(value, str) and str not in kinds and parse_of(hint) is None:
            return (value,)
        if isinstance(value, Set | Iterator):
            value = tuple(sorted(value, key=str) if isinstance(value, Set) else value)
        if isinstance(value, tuple | list):
            return type(value)(os.fspath(one) if isinstance(one, os.PathLike) else one for one in value)
    return value


def check_fields(options: Any) -> None:
    """Check every field of a dataclass against its annotation; a nested dataclass validates itself.

    Raises:
        UsageError: with the first field that is out of range, its value and its range.
    """
    for name, hint in hints_of(options.__class__).items():
        value = getattr(options, name)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            check_kind(name, value, hint)
            value.validate() if isinstance(value, Options) else check_fields(value)
        else:
            check_value(name, value, hint)


def check_value(where: str, value: Any, hint: Any) -> None:
    """Check one value against an annotation.

    Args:
        where: the field's name; `name['key']` for a value in a mapping.
        hint: the annotation, including `Annotated`.

    Raises:
        UsageError: the value is not allowed.
    """
    plain, rules = split_hint(hint)
    members = union_members(plain)
    if value is None and type(None) in get_args(plain):
        return
    if hasattr(value, "__arrow_c_stream__"):  # it has no truth value, and is equal to nothing
        raise UsageError(f"{where} is a data frame", where=where, next_step="give rows as data=…, or as eval_data=…")
    words = [member for member in members if get_origin(member) is Literal]
    others = [member for member in members if member not in words] or words
    if isinstance(value, str) and any(value in get_args(member) for member in words):
        return
    if len(others) == 1 and others[0] is not plain:
        try:
            check_value(where, value, others[0])
        except UsageError as error:
            error.next_step = value_suggestion(value, [word for member in words for word in get_args(member)]) or (
                error.next_step
            )
            raise
        return
    for rule in rules:
        if isinstance(rule, Check):
            rule.check(where, value)
    bound = next((rule for rule in rules if isinstance(rule, Bound)), None)
    origin = get_origin(plain)
    if plain is Path and not isinstance(value, PurePath | str):
        raise UsageError(f"{shown(value)} is not a path", where=where, next_step="give the path as text, or as a Path")
    if plain is bool and not isinstance(value, bool):
        raise UsageError(
            f"{where} {shown(value)} is neither true nor false",
            where=where,
            next_step=f"give --{where.replace('_', '-')}, or leave it out",
        )
    if plain in (int, float):
        (bound or Bound()).check_number(where, value, whole=plain is int)
    elif origin is Literal and value not in (choices := get_args(plain)):
        raise UsageError(
            f"{where} {shown(value)} is not one of {', '.join(map(str, choices))}",
            where=where,
            next_step=value_suggestion(value, choices, where)
            or f"give --{where.replace('_', '-')} {choices[0]}, or another of these",
        )
    elif origin is tuple and _is_checked(element := get_args(plain)[0]):
        if not isinstance(value, tuple | list):
            raise UsageError(
                f"{where} {shown(value)} is not a list",
                where=where,
                next_step=value_suggestion(value, (), where) or f"give {where}=[…]",
            )
        for one in value:
            check_value(where, one, element)
    elif origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or any(not isinstance(key, str) for key in value):
            raise UsageError(f"{shown(value)} is not a table of names and values", where=where)
        for key, one in first_of_each(value).items():
            check_value(f"{where}[{key!r}]", one, get_args(plain)[1])


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise UsageError if a program passes an object of another class than the expected dataclass."""
    if not isinstance(value, kind):
        whole = "give rows and options by name, such as data=…, or " if name in ("config", "options") else ""
        raise UsageError(
            f"{name} is {with_article(type(value).__name__)}, not {with_article(kind.__name__)}",
            where=name,
            next_step=f"{whole}write {name}=backhand.{kind.__name__}(…)",
        )


def sentence_of(hint: Any) -> str:
    """Return the help's sentence on the range of an annotation, or ""."""
    plain, rules = split_hint(hint)
    said = [rule.sentence for rule in rules if not isinstance(rule, Words)]
    numbers = [member for member in union_members(plain) if get_origin(member) is not Literal]
    if len(numbers) == 1 and numbers[0] is not plain:
        said.append(sentence_of(numbers[0]))
    elif get_origin(plain) is tuple and (of_each := sentence_of(get_args(plain)[0])):
        said.append(f"Each {of_each[0].lower()}{of_each[1:]}")
    return " ".join(filter(None, said))


def parse_of(hint: Any) -> Parse | None:
    """Return the parser of an annotation, or None if the command line supports the type."""
    return next((rule.parse for rule in split_hint(hint)[1] if isinstance(rule, Words)), None)


@functools.cache
def hints_of(options: type) -> Mapping[str, Any]:
    """Return the resolved annotations of a dataclass's fields, including `Annotated`, in their order."""
    hints = typing.get_type_hints(options, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(options)}


def split_hint(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split an annotation into its type and the metadata of `Annotated`."""
    if get_origin(hint) is Annotated:
        plain, *rules = get_args(hint)
        return plain, tuple(rules)
    return hint, ()


def union_members(hint: Any) -> tuple[Any, ...]:
    """Return the types that `hint` allows except None: (int,) for `int` and for `int | None`."""
    if isinstance(hint, types.UnionType) or get_origin(hint) is typing.Union:
        return tuple(member for member in get_args(hint) if member is not type(None))
    return (hint,)


def first_of_each(table: Mapping[str, Any]) -> dict[str, Any]:
    """Drop keys whose number another key already has: many keys share few ranks, and each is checked once."""
    numbers: dict[tuple[type, float], str] = {}
    return {
        key: one
        for key, one in table.items()
        if not isinstance(one, int | float) or numbers.setdefault((type(one), one), key) is key
    }


def _is_checked(hint: Any) -> bool:
    """Return True if elements of this type are checked; names and paths are not."""
    plain, rules = split_hint(hint)
    return bool(rules) or plain in (int, float, bool) or get_origin(plain) is Literal


def _is_list_of_texts(hint: Any) -> bool:
    """Return True for a tuple of strings or of words that are choices."""
    if get_origin(hint) is not tuple:
        return False
    element = split_hint(get_args(hint)[0])[0]
    return element is str or (get_origin(element) is Literal and isinstance(get_args(element)[0], str))


def _number_in(text: str) -> float | None:
    """Return the number that a text is, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def _is_number(value: object, *, whole: bool) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (not whole and isinstance(value, float) and math.isfinite(value))


def _power(limit: float | None) -> str:
    return "2**63" if limit == 2**63 else f"{limit:g}"
