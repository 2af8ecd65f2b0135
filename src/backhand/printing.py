"""Printing: control characters in foreign text are escaped, and a long command reports its progress.

Names, paths, rows, settings in files and messages of libraries are foreign text. A terminal obeys some of its
characters. ESC and other control characters colour, move and delete; direction marks (U+202E, U+2066 …) reorder the
text; a line break starts a line that looks like one of Backhand's. `visible` escapes each of them as Python's `repr`
does. Everything that is printed goes through it: in this module, in `terminal.console` or in `bounded`.

Every printing function calls `said`. Within `never_silent`, a thread prints the current activity after a silence.
"""

from __future__ import annotations

import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TextIO, TypeVar

_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode categories without a visible form: control, format, surrogates, line and paragraph separators."""
_HARMLESS_IN_TEXT = "\n\t\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
"""Invisible characters that affect only their own text, such as the joiners of Persian and the marks of Hebrew."""


def visible(text: str, keep: str = "") -> str:
    """Escape every character that controls a terminal or has no visible form.

    Args:
        text: any text.
        keep: characters that are not escaped, such as a line break.
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
"""The only line break that Backhand itself writes in a part of an error; any other one is foreign."""


def bounded(text: str) -> str:
    """Escape a message and limit the length of each list item and of the whole; start and end are kept."""
    items = text[: 4 * LONGEST_TEXT].split(_ITEM) if _ITEM in text else [text]
    return _cut(_ITEM.join(visible(_cut(item, LONGEST_LINE)) for item in items), LONGEST_TEXT)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    kept = most // 2 - 30
    return f"{text[:kept]} … ({len(text) - 2 * kept:,} characters left out) … {text[-kept:]}"


wording: ContextVar[Callable[[str], str]] = ContextVar("wording", default=str)
"""Change of a note. Messages are written for the command line; in Python, they name options as a call does."""


def reworded(note: str) -> str:
    """Return a note or advice in the words of the caller. Commands, answers and other foreign text stay as they are."""
    return wording.get()(note)


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines, to standard error if no file is given. A line break within a line is escaped."""
    for line in lines:
        print(visible(line), file=sys.stderr if file is None else file, flush=True)
    said()


def write_answer(text: str) -> None:
    """Write a model's answer to standard output, unchanged if that is a pipe or a file.

    On a terminal, control characters are escaped. Line breaks, tabs, and the joiners and marks of scripts are kept.
    """
    sys.stdout.write(visible(text, _HARMLESS_IN_TEXT) if sys.stdout.isatty() else text)
    sys.stdout.flush()
    said()


def show_what_libraries_say() -> None:
    """Escape the log records and warnings of libraries from now on."""
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
# A limit on silence.


T = TypeVar("T")

SILENCE_S, LATER_SILENCE_S = 10.0, 60.0
"""Longest silence in the first minutes of a command, and later, when nobody waits for every line."""
_FIRST_MINUTES_S = 180.0
_LOOK_S = 0.25

_began = _last_said = time.monotonic()
_activities: list[str | Callable[[], str]] = []
"""Descriptions of the current activities, innermost last."""
_may_be_silent = 0
_never_silent = False


def said() -> None:
    """Record that something was printed now."""
    global _last_said  # noqa: PLW0603 - one process has one terminal
    _last_said = time.monotonic()


def line_due(share: float = 1.0) -> bool:
    """Return True after this share of the longest silence, counted from the last line."""
    now_s = time.monotonic()
    longest = SILENCE_S if now_s - _began < _FIRST_MINUTES_S else LATER_SILENCE_S
    return now_s - _last_said > share * longest


@contextmanager
def going_on(what: str | Callable[[], str]) -> Iterator[None]:
    """Make `what` the current activity within the block. A function is called whenever the activity is printed."""
    _activities.append(what)
    try:
        yield
    finally:
        _activities.remove(what)


def duration(seconds: float) -> str:
    """Format a time, such as `0.4 s`, `48 s`, `12 min 5 s` or `3 h 20 min`."""
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@dataclass(eq=False)
class _Counter:
    """An activity with equal parts, of which several may be in work at once."""

    what: str
    total: int
    many: str
    began_s: float = field(init=False)
    done: int = 0
    worked: float = 0.0  # number of finished parts and shares of parts in work, where shares are known

    def __post_init__(self) -> None:
        self.began_s = time.monotonic()

    def count(self, *_: object) -> None:
        self.done += 1

    def __call__(self) -> str:
        worked = self.worked or float(self.done)
        left_s = (time.monotonic() - self.began_s) / worked * (self.total - worked) if worked else 0.0
        about = "at most about" if self.worked else "about"  # a part may end before its largest size
        if worked and _rounds:
            left_s, about = _rounds[-1].left(left_s)
        left = f", {about} {duration(left_s)} left" if left_s > _WORTH_SAYING_S else ""
        return f"{self.what}, {self.done:,} of {self.total:,} {self.many}{left}"


@contextmanager
def counting(what: str, total: int, many: str = "rows") -> Iterator[Callable[..., None]]:
    """Make `what` the current activity within the block, and yield a function to call after each of `total` parts.

    The activity contains the number of finished parts and the time that the others will take.
    """
    counter = _Counter(what, total, many)
    with going_on(counter):
        yield counter.count


class _Rounds:
    """Rounds of the same work. See `in_rounds`."""

    def __init__(self, costs: Sequence[float]) -> None:
        self._costs = costs
        self._began: list[float] = []  # when each round began

    def begin(self) -> None:
        self._began.append(time.monotonic())

    def left(self, of_activity_s: float) -> tuple[float, str]:
        """Return the time until the last round ends, and how exact it is."""
        now_s, (first, *others) = time.monotonic(), self._began
        if not others:  # the activities of the first round that are still to come are not known
            share = sum(self._costs[1:]) / self._costs[0]
            return of_activity_s + share * (now_s - first + of_activity_s), "at least" if share else "about"
        of_rounds_s = sum(self._costs[len(others) :]) / self._costs[0] * (others[0] - first)
        return max(of_activity_s, of_rounds_s - (now_s - others[-1])), "about"


_rounds: list[_Rounds] = []


@contextmanager
def in_rounds(subjects: Sequence[T], costs: Sequence[float] = ()) -> Iterator[Iterator[T]]:
    """Yield an iterator over the subjects of rounds of the same work, such as the measurements of two models.

    Activities that count then contain the time until the last round ends, not only the activity itself.

    Args:
        costs: the expected time of each round, relative to the others; equal times if it is empty.
    """
    rounds = _Rounds(costs or [1.0] * len(subjects))

    def one_by_one() -> Iterator[T]:
        for one in subjects:
            rounds.begin()
            yield one

    _rounds.append(rounds)
    try:
        yield one_by_one()
    finally:
        _rounds.remove(rounds)


def advanced(parts: float) -> None:
    """Add to the work that the innermost activity has done, if it counts: whole parts and shares of parts."""
    if _activities and isinstance(counter := _activities[-1], _Counter):
        counter.worked += parts


_WORTH_SAYING_S = 2.0


def now() -> str:
    """Return the innermost current activity, or "" if there is none or its function raises."""
    try:
        innermost = _activities[-1]
        return innermost if isinstance(innermost, str) else innermost()
    except Exception:  # noqa: BLE001 - another thread may change its data meanwhile
        return ""


@contextmanager
def may_be_silent() -> Iterator[None]:
    """Print no activity within the block: it waits for a person, moves a bar, or another process prints."""
    global _may_be_silent  # noqa: PLW0603 - as above
    _may_be_silent += 1
    try:
        yield
    finally:
        _may_be_silent -= 1
        said()


@contextmanager
def never_silent(command: str) -> Iterator[None]:
    """Within the block, print the current activity to standard error after each of the longest silences.

    A block within another one adds `command` to the activities of the outer one.
    """
    global _began, _never_silent  # noqa: PLW0603 - as above
    if _never_silent:
        with going_on(command):
            yield
        return
    _never_silent = True
    ended = threading.Event()
    _began = time.monotonic()

    def look() -> None:
        while not ended.wait(SILENCE_S if _may_be_silent else _LOOK_S):
            if _may_be_silent or not line_due(1 - 2 * _LOOK_S / SILENCE_S):
                continue
            with suppress(OSError, ValueError):  # standard error is closed
                say(f"still at work after {duration(time.monotonic() - _began)}: {now() or command}")
            said()

    said()
    with going_on(command):
        thread = threading.Thread(target=look, name="never silent", daemon=True)
        thread.start()
        try:
            yield
        finally:
            _never_silent = False
            ended.set()
            thread.join(timeout=1.0)
