"""How large a result of a template may be, asked before there is one, and how much work: see `bounded_template`."""

from __future__ import annotations

import re
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import jinja2

from backhand.system import highest_rss_bytes

LARGEST_VALUE = 2**26
"""Characters of a text; a list or table counts `ITEM` for everything in it, and the characters of its texts."""
ITEM = 64
LONGEST_NUMBER = 1024
"""Bits of a whole number that a template writes or multiplies."""
_MOST_ITEMS = LARGEST_VALUE // ITEM
_DEEPEST = 100
_WIDEST = 10_000


class TemplateLimitError(Exception):
    """The template asks for more than it may; its text is the reason."""


VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))


def weight(value: Any) -> int:
    """The size of a value with all that it holds, in the measure of `LARGEST_VALUE`.

    Raises:
        TemplateLimitError: it is larger than that, or nested too deeply.
    """
    return _weight_and_depth(value)[0]


def _weight_and_depth(value: Any) -> tuple[int, int]:
    total, deepest = 0, 0
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str | bytes):
            total += ITEM + len(item)
        else:
            total += ITEM
            inner: Any = ()
            if isinstance(item, Mapping):
                inner = [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, set, frozenset, *VIEWS)):
                inner = item
            if inner:
                deepest = max(deepest, depth + 1)
                if deepest > _DEEPEST:
                    raise TemplateLimitError(f"it nests lists or tables more than {_DEEPEST} deep")
                if len(waiting) + len(inner) > _MOST_ITEMS:
                    raise too_large()
                waiting.extend((part, depth + 1) for part in inner)
        if total > LARGEST_VALUE:
            raise too_large()
    return total, deepest


def too_large() -> TemplateLimitError:
    """The error for a value over `LARGEST_VALUE`."""
    return TemplateLimitError(f"it makes a value of more than {LARGEST_VALUE:,} characters")


def check_size(size: int) -> None:
    """Raise TemplateLimitError for a result that would be too large."""
    if size > LARGEST_VALUE:
        raise too_large()


WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:\*|\d{5}|\d*\.(?:\*|\d{5}))")
WIDE_BRACES = re.compile(r":[^{}]*\d{5}|\{[^{}]*\{[^{]")


def check_form(form: str, place: str, size: int, wide: re.Pattern[str]) -> None:
    """A text with places for values, each of which takes no more than `size` and the widest padding."""
    check_size(len(form) + form.count(place) * (size + _WIDEST))
    if len(form) > _MOST_ITEMS or wide.search(form):
        raise TemplateLimitError("it pads a value without a bound")


def check_product(left: Any, right: Any) -> None:
    """Raise TemplateLimitError for a product too large: a number of thousands of digits, a text many times over."""
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > 4 * LONGEST_NUMBER:
            raise TemplateLimitError("it computes a number of thousands of digits")
        return
    for items, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(items, str | bytes | list | tuple):
            size = len(items) if isinstance(items, str | bytes) else weight(items)
            check_size(size * max(0, times))


def check_power(base: Any, exponent: Any) -> None:
    """Raise TemplateLimitError for a power of thousands of digits."""
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and base.bit_length() * abs(exponent) > 4 * LONGEST_NUMBER:
        raise TemplateLimitError("it computes a number of thousands of digits")


def refuse_method(owner: Any, *_arguments: Any, **_values: Any) -> None:
    """Raise SecurityError for a method that templates have no use for, or whose cost has no bound."""
    raise jinja2.exceptions.SecurityError(f"this method of a {type(owner).__name__} is not for templates")


def _check_padded(text: str, width: Any = 0, *_more: Any, **_values: Any) -> None:
    if isinstance(width, int):
        check_size(max(len(text), width))


def _check_tabs(text: str, tabsize: Any = 8) -> None:
    if isinstance(tabsize, int):
        check_size(len(text) + text.count("\t") * max(0, tabsize))


def _check_replaced(text: Any, old: Any = "", new: Any = "", *_more: Any, **_values: Any) -> None:
    text = text if isinstance(text, str) else str(text)
    if isinstance(old, str) and isinstance(new, str):
        check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _check_split(text: str, sep: Any = None, *_more: Any, **_values: Any) -> None:
    parts = text.count(sep) if isinstance(sep, str) and sep else len(text) // 2
    if parts > _MOST_ITEMS:
        raise too_large()


def _check_joined(separator: str, items: Any) -> None:
    if hasattr(items, "__len__"):
        check_size(len(items) * len(separator) + weight(items))
    elif isinstance(items, types.GeneratorType):
        raise TemplateLimitError("it joins what has no length; the filter `join` does that")


def _check_stripped(_text: Any, characters: Any = None) -> None:
    if isinstance(characters, str) and len(characters) > _WIDEST:
        raise too_large()


def _check_text_to_items(value: Any) -> None:
    if isinstance(value, str) and len(value) > _MOST_ITEMS:
        raise too_large()


TEXT_METHODS: dict[str, Callable[..., None] | None] = {
    **dict.fromkeys(
        (
            *("capitalize", "casefold", "count", "endswith", "find", "index", "lower", "partition", "removeprefix"),
            *("removesuffix", "rfind", "rindex", "rpartition", "startswith", "swapcase", "title", "upper"),
            *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric"),
            *("isprintable", "isspace", "istitle", "isupper"),
            *("format", "format_map"),  # never reached as methods: `wrap_str_format` gives others for them
        )
    ),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _check_padded),
    **dict.fromkeys(("split", "rsplit"), _check_split),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), _check_stripped),
    "expandtabs": _check_tabs,
    "join": _check_joined,
    "replace": _check_replaced,
    "splitlines": lambda text, *_more, **_values: _check_split(text),
}
"""By the name of a text's method, what is checked before it is called; None where its result is no larger than it."""


def _check_indent(text: Any, width: Any = 4, *_more: Any, **_values: Any) -> None:
    size = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
    check_size(weight(text) + (str(text).count("\n") + 1) * max(0, size))


def _check_json(value: Any, _ascii: bool = False, indent: Any = None, separators: Any = None, **_v: Any) -> None:
    size, depth = _weight_and_depth(value)
    gap = len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0
    gap = max(0, gap) * depth + (weight(separators) if separators is not None else 2)
    check_size(size + size // ITEM * gap)


def _check_filter_join(items: Any, d: Any = "", *_more: Any, **_values: Any) -> None:
    if hasattr(items, "__len__"):
        check_size(len(items) * len(str(d)) + weight(items))


def _check_count(_items: Any, count: Any = 0, *_more: Any, **_values: Any) -> None:
    if isinstance(count, int) and count > _MOST_ITEMS:
        raise too_large()


def _check_batch(items: Any, count: Any = 0, fill_with: Any = None) -> None:
    _check_count(items, count)
    if fill_with is not None and isinstance(count, int):
        check_size(max(0, count) * weight(fill_with))


def _check_precision(_value: Any, precision: Any = 0, *_more: Any, **_values: Any) -> None:
    if isinstance(precision, int) and abs(precision) > 300:
        raise TemplateLimitError("it rounds to hundreds of digits")


def _check_digits(value: Any, *_more: Any, **_values: Any) -> None:
    if isinstance(value, str) and len(value) > LONGEST_NUMBER:
        raise TemplateLimitError("it reads a number of hundreds of digits")


def _check_sum(_items: Any, _attribute: Any = None, start: Any = 0, **_values: Any) -> None:
    if not isinstance(start, int | float):
        raise TemplateLimitError("it adds up what are no numbers")


def _check_format(form: Any, *args: Any, **kwargs: Any) -> None:
    check_form(str(form), "%", weight(args) + weight(kwargs), WIDE_PERCENT)


def _check_quoted(value: Any, *_more: Any, **_values: Any) -> None:
    if weight(value) > _MOST_ITEMS:
        raise too_large()


FILTERS: dict[str, Callable[..., None]] = {
    "batch": _check_batch,
    "center": _check_padded,
    "float": _check_digits,
    "format": _check_format,
    "indent": _check_indent,
    "int": _check_digits,
    "join": _check_filter_join,
    "list": _check_text_to_items,
    "replace": _check_replaced,
    "round": _check_precision,
    "slice": _check_count,
    "sum": _check_sum,
    "tojson": _check_json,
    "trim": _check_stripped,
    "urlencode": _check_quoted,
}
ALL_AT_ONCE = frozenset(
    ("dictsort", "groupby", "join", "list", "max", "min", "replace", "sort", "string", "sum", "tojson", "unique")
)
"""Filters that read all of a value: what they are given is weighed, and a generator made a list before."""


MOST_STEPS = 2**25
MOST_SECONDS = 4
"""Of the processor, for one conversation; the plainest take a hundred-thousandth of that."""
SECONDS_TOGETHER, SECONDS_EACH = 1.0, 0.05
"""Of the processor, for many conversations: so much once, and so much for each of them."""
MOST_BYTES = 2**30
_STEPS_BETWEEN_LOOKS = 2**16


class Work:
    """What one render may still do."""

    __slots__ = ("_began", "_bytes", "left", "next_look")

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new render."""
        self.left = MOST_STEPS
        self.next_look = MOST_STEPS - _STEPS_BETWEEN_LOOKS
        self._began: float | None = None
        self._bytes = 0

    def step(self, count: int) -> None:
        """Count steps. Raises TemplateLimitError: they are too many, or took too long or too much memory."""
        self.left -= count
        if self.left < self.next_look:
            self._look()

    def _look(self) -> None:
        if self.left < 0:
            raise TemplateLimitError(f"it takes more than {MOST_STEPS:,} steps for one conversation")
        self.next_look = self.left - _STEPS_BETWEEN_LOOKS
        if self._began is None:
            self._began, self._bytes = time.thread_time(), highest_rss_bytes()
            return
        if time.thread_time() - self._began > MOST_SECONDS:
            raise TemplateLimitError(f"it takes more than {MOST_SECONDS} s for one conversation")
        if highest_rss_bytes() - self._bytes > MOST_BYTES:
            raise TemplateLimitError(f"it takes more than {MOST_BYTES >> 30} GiB of memory for one conversation")
