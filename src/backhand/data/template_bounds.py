"""Limits of templates: the size of each result, checked before it is created, and the work per render."""

from __future__ import annotations

import re
import time
import types
from collections.abc import Mapping
from typing import Any

import jinja2

from backhand.system import highest_rss_bytes

LARGEST_VALUE = 2**26
"""Largest number of characters of a text. A list or table counts `ITEM` per item plus the characters of its texts."""
ITEM = 64
LONGEST_NUMBER = 1024
"""Largest number of bits of an integer that a template contains or multiplies."""
_DEEPEST = 100
_WIDEST = 10_000


class TemplateLimitError(Exception):
    """The template exceeds a limit, which the text of the error states."""


_VIEWS_OF_NONE: Any = ({}.keys(), {}.values(), {}.items())
VIEWS: tuple[Any, ...] = tuple(map(type, _VIEWS_OF_NONE))
ONCE: tuple[Any, ...] = (types.GeneratorType, *(type(reversed(one)) for one in ([], (), {}, range(0), *_VIEWS_OF_NONE)))
"""Types that can be iterated only once and have no length; the filter `reverse` returns one of them."""


def weight(value: Any) -> int:
    """Return the size of a value with all its contents, in the unit of `LARGEST_VALUE`.

    Raises:
        TemplateLimitError: it is larger than that, or nested too deeply.
    """
    return _weight_and_depth(value)[0]


def _weight_and_depth(value: Any) -> tuple[int, int]:
    total, deepest = 0, 0
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        total += ITEM
        inner: Any = ()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            inner = [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset, *VIEWS)):
            inner = item
        elif isinstance(item, jinja2.utils.Namespace):
            inner = list(item._Namespace__attrs.values())
        if inner:
            deepest = max(deepest, depth + 1)
            if deepest > _DEEPEST:
                raise TemplateLimitError(f"it nests lists or tables more than {_DEEPEST} deep")
            check_size(ITEM * (len(stack) + len(inner)))
            stack.extend((part, depth + 1) for part in inner)
        check_size(total)
    return total, deepest


def check_size(size: int) -> None:
    """Raise TemplateLimitError if a result of this size would be too large."""
    if size > LARGEST_VALUE:
        raise TemplateLimitError(f"it creates a value of more than {LARGEST_VALUE:,} characters")


def check_product(left: Any, right: Any) -> None:
    """Raise TemplateLimitError if a product would be a number of thousands of digits or too long a text."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
        return
    for items, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(items, str | list | tuple):
            check_size((len(items) if isinstance(items, str) else weight(items)) * max(0, times))


def check_power(base: Any, exponent: Any) -> None:
    """Raise TemplateLimitError if a power would have thousands of digits."""
    if isinstance(base, int) and isinstance(exponent, int):
        _check_bits(base.bit_length() * abs(exponent))


def _check_bits(bits: int) -> None:
    if bits > 4 * LONGEST_NUMBER:
        raise TemplateLimitError("it computes a number of thousands of digits")


def refuse_method(owner: Any) -> None:
    """Raise SecurityError for a method that templates do not need or whose cost has no bound."""
    raise jinja2.exceptions.SecurityError(f"templates may not call this method of a {type(owner).__name__}")


def check_call(name: str, value: Any, args: tuple[Any, ...], values: Mapping[str, Any]) -> None:
    """Check the size of a call's result before the call.

    Args:
        name: name of a filter, or of a method of a text with a dot before it.

    Raises:
        TemplateLimitError: the result would be too large.
    """
    reach = sum(map(_reach, (*args, *values.values())))
    first: Any = args[0] if args else None
    more = 0
    match name.removeprefix("."):
        case "center" | "ljust" | "rjust" | "zfill":
            more = reach
        case "expandtabs":
            more = value.count("\t") * (reach + 8)
        case "indent":
            more = (str(value).count("\n") + 1) * (reach + 4)
        case "replace":
            text = str(value)
            more = (text.count(first) if isinstance(first, str) and first else len(text) + 1) * reach
        case "split" | "rsplit" | "splitlines":
            more = ITEM * (value.count(first) if isinstance(first, str) and first else len(value) // 2)
        case "strip" | "lstrip" | "rstrip" | "trim":
            more = reach * _WIDEST  # every character is compared with these
        case "batch" | "slice":
            more = ITEM * reach
        case "list" if isinstance(value, str):
            more = ITEM * len(value)
        case "urlencode":
            more = ITEM * weight(value)
        case "join" if name == ".join":
            if isinstance(first, ONCE):
                raise TemplateLimitError("it joins an iterator without a length; use the filter `join`")
            more = reach + (len(first) if hasattr(first, "__len__") else 0) * len(value)
        case "join":
            more = (len(value) if hasattr(value, "__len__") else 0) * reach
        case "tojson":
            size, depth = _weight_and_depth(value)
            more = size // ITEM * (depth * reach + 2)
        case "format" | "format_map":
            check_form(str(value), "{" if name.startswith(".") else "%", args, values)
        case "round" if reach > 300:
            raise TemplateLimitError("it rounds to hundreds of digits")
        case "int" | "float" if isinstance(value, str) and len(value) > LONGEST_NUMBER:
            raise TemplateLimitError("it reads a number of hundreds of digits")
        case "sum" if not isinstance(values.get("start", (*args, 0, 0)[1]), int | float):
            raise TemplateLimitError("it sums values that are not numbers")
    check_size((len(value) if isinstance(value, str) else weight(value)) + more)


def _reach(value: Any) -> int:
    """Return the characters that an argument can add at one place: the value of a number, the size of other values."""
    if isinstance(value, int):
        return abs(value)
    return 0 if value is None else len(value) if isinstance(value, str) else weight(value)


_TOO_WIDE = {
    "%": re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:\*|\d{5}|\d*\.(?:\*|\d{5}))"),
    "{": re.compile(r":[^{}]*\d{5}|\{[^{}]*\{[^{]"),
}


def check_form(form: str, place: str, *values: Any) -> None:
    """Check a format string: each place needs at most the size of all values plus the widest padding."""
    check_size(len(form) + form.count(place) * (weight(values) + _WIDEST))
    if len(form) > LARGEST_VALUE // ITEM or _TOO_WIDE[place].search(form):
        raise TemplateLimitError("it pads a value without a bound")


TEXT_METHODS = frozenset(
    (
        *("capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "format_map"),
        *("index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric"),
        *("isprintable", "isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition"),
        *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip"),
        *("split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "zfill"),
    )
)
"""Methods of text that templates may call."""
GROWING = frozenset(
    (
        *("batch", "center", "float", "format", "indent", "int", "join", "list", "replace", "round", "slice", "sum"),
        *("tojson", "trim", "urlencode"),
    )
)
"""Filters whose result may be larger than their value."""
ALL_AT_ONCE = frozenset(
    ("dictsort", "groupby", "join", "list", "max", "min", "replace", "sort", "string", "sum", "tojson", "unique")
)
"""Filters that read the whole value. Its size is counted, and a generator is made a list first."""


MOST_STEPS = 2**25
"""Largest number of steps per conversation."""
MOST_SECONDS = 4
"""CPU seconds per conversation. The simplest templates need a hundred-thousandth of that."""
SECONDS_TOGETHER, SECONDS_EACH = 1.0, 0.05
"""CPU seconds for many conversations: a fixed amount, plus an amount per conversation."""
MOST_BYTES = 2**30
_STEPS_BETWEEN_LOOKS = 2**16


class Work:
    """The remaining work of one render."""

    __slots__ = ("_began", "_bytes", "left", "next_look")

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Reset the counts for a new render."""
        self.left = MOST_STEPS
        self.next_look = MOST_STEPS - _STEPS_BETWEEN_LOOKS
        self._began, self._bytes = time.thread_time(), highest_rss_bytes()

    def step(self, count: int) -> None:
        """Count steps. Raises TemplateLimitError: the steps, the CPU time or the memory exceed their limits."""
        self.left -= count
        if self.left < self.next_look:
            self._look()

    def _look(self) -> None:
        if self.left < 0:
            raise TemplateLimitError(f"it needs more than {MOST_STEPS:,} steps for one conversation")
        self.next_look = self.left - _STEPS_BETWEEN_LOOKS
        if time.thread_time() - self._began > MOST_SECONDS:
            raise TemplateLimitError(f"it needs more than {MOST_SECONDS} s for one conversation")
        if highest_rss_bytes() - self._bytes > MOST_BYTES:
            raise TemplateLimitError(f"it needs more than {MOST_BYTES >> 30} GiB of memory for one conversation")
