"""Consoles for people. Names, paths and rows are printed as they are: nothing in them is markup, an emoji or a link."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

WIDTH_WITHOUT_TERMINAL = 120


class _Console(Console):
    """A console whose reader may leave: rich would end the program with 1, as if it were a bug."""

    def on_broken_pipe(self) -> None:
        """Leave it to whoever prints. Raises BrokenPipeError."""
        raise BrokenPipeError


def console(**options: Any) -> Console:
    """A console that takes text for text; `options` are those of rich's."""
    return _Console(markup=False, emoji=False, highlight=False, **options)


def console_for_tables(width: int = WIDTH_WITHOUT_TERMINAL) -> Console:
    """The same for tables, which keep their columns in a pipe or a file too: these have no width of their own."""
    found = console()
    return found if found.is_terminal else console(width=width)


@contextmanager
def working(text: str = "") -> Iterator[Callable[[str], None]]:
    """Say on standard error what takes its time, if that is a terminal; yields what changes the text."""
    with console(stderr=True).status(Text(text)) as status:
        yield lambda said: status.update(Text(said))
