"""What people are told: text from outside made visible, and at least a line every ten seconds.

Names, paths, rows, settings of a file and messages of libraries come from outside. A terminal obeys some of their
characters: ESC and the other control characters colour, move and delete, direction marks (U+202E, U+2066 …) reorder
what is read, a line break begins a line that looks like ours. `visible` writes each of them out, as Python's `repr`
does; everything that is printed goes through it here, in `terminal.console` or in `errors.bounded`.

Whoever prints says so by `said`. Within `never_silent` a thread says what goes on when nothing else was said.
"""

from __future__ import annotations

import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Categories of characters that show nothing themselves: control, format, surrogates, line and paragraph breaks."""
_OF_TEXTS = "\n\t\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
"""What a text may hold without changing more than itself: Persian and emoji have joiners, Hebrew has marks."""


def visible(text: str, keep: str = "") -> str:
    """The text with every character written out that commands a terminal, or that shows nothing itself.

    Args:
        text: anybody's.
        keep: characters that stay as they are, such as a line break.
    """
    if text.isprintable():
        return text
    return "".join(
        repr(one)[1:-1] if not one.isprintable() and one not in keep and unicodedata.category(one) in _UNSEEN else one
        for one in text
    )


LONGEST_LINE = 1000
LONGEST_TEXT = 8000


_ITEM = "\n    - "
"""The one line break of an error's part that is ours: every other one came from outside."""


def bounded(text: str) -> str:
    """What is said of anybody's input, visible and bounded, each line and all of them: beginning and end are kept."""
    items = text[: 4 * LONGEST_TEXT].split(_ITEM) if _ITEM in text else [text]
    return _cut(_ITEM.join(visible(_cut(item, LONGEST_LINE)) for item in items), LONGEST_TEXT)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    kept = most // 2 - 30
    return f"{text[:kept]} … ({len(text) - 2 * kept:,} characters left out) … {text[-kept:]}"


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines, on standard error if no file is given; a line break within one is written out."""
    for line in lines:
        print(visible(line), file=sys.stderr if file is None else file, flush=True)
    said()


def write_answer(text: str) -> None:
    """Write a model's own text on standard output: as it is into a pipe or a file.

    On a terminal all that commands it is written out. Line breaks, tabs, and the joiners and marks of scripts stay.
    """
    sys.stdout.write(visible(text, _OF_TEXTS) if sys.stdout.isatty() else text)
    sys.stdout.flush()
    said()


def show_what_libraries_say() -> None:
    """From now on what libraries log or warn of is made visible, too."""
    import logging
    import warnings

    class Record(logging.LogRecord):
        def getMessage(self) -> str:
            return visible(super().getMessage(), "\n")

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return visible(as_usual(message, category, filename, lineno, line), "\n")

    if logging.getLogRecordFactory().__name__ != Record.__name__:
        as_usual = warnings.formatwarning
        logging.setLogRecordFactory(Record)
        warnings.formatwarning = formatted


# ---------------------------------------------------------------------------------------------------------------------
# A bound on silence.


SILENCE_S = 10.0
_LOOK_S = 0.25

_last_said = time.monotonic()
_going_on: list[str | Callable[[], str]] = []
"""What takes its time, innermost last."""
_may_be_silent = 0


def said() -> None:
    """Something was printed just now."""
    global _last_said  # noqa: PLW0603 - one process has one terminal
    _last_said = time.monotonic()


def silent_for_s() -> float:
    """Seconds since something was printed."""
    return time.monotonic() - _last_said


@contextmanager
def going_on(what: str | Callable[[], str]) -> Iterator[None]:
    """Within, `what` is what takes its time; a function is called when it is to be said."""
    _going_on.append(what)
    try:
        yield
    finally:
        _going_on.remove(what)


@contextmanager
def counting(what: str, total: int, many: str = "rows") -> Iterator[Callable[..., None]]:
    """Within, `what` takes its time; yields what is called for each of so many that is done."""
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1

    with going_on(lambda: f"{what}, {done:,} of {total:,} {many}"):
        yield count


def now() -> str:
    """What takes its time, the innermost; nothing where it cannot be told."""
    try:
        innermost = _going_on[-1]
        return innermost if isinstance(innermost, str) else innermost()
    except Exception:  # noqa: BLE001 - what it looks at may be changed meanwhile
        return ""


@contextmanager
def may_be_silent() -> Iterator[None]:
    """Within, nothing is said by itself: a person is waited for, a bar moves, or others speak."""
    global _may_be_silent  # noqa: PLW0603 - as above
    _may_be_silent += 1
    try:
        yield
    finally:
        _may_be_silent -= 1
        said()


@contextmanager
def never_silent(command: str) -> Iterator[None]:
    """Within, a line on standard error says what goes on whenever nothing was said for `SILENCE_S`."""
    ended = threading.Event()
    began = time.monotonic()

    def look() -> None:
        while not ended.wait(_LOOK_S):
            if _may_be_silent or silent_for_s() < SILENCE_S - 2 * _LOOK_S:
                continue
            with suppress(OSError, ValueError):  # nobody is left to read it
                say(f"still at work after {time.monotonic() - began:.0f} s: {now() or command}")
            said()

    said()
    with going_on(command):
        thread = threading.Thread(target=look, name="never silent", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=1.0)
