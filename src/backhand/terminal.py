"""Consoles that print names, paths and rows as plain text: no markup, emoji, links or control characters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from backhand.printing import going_on, may_be_silent, now, said, visible

WIDTH_WITHOUT_TERMINAL = 120


class _Console(Console):
    """Console for foreign text.

    A string is one line, also in a table's cell, and a line break in it is escaped. A rich `Text` keeps its line
    breaks, so its author has to escape its parts. A closed pipe raises BrokenPipeError; rich would exit with 1, as if
    there were a bug.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text
            plain = segment.control is not None or text.isprintable() or text == "\n"
            yield segment if plain else segment._replace(text=visible(text, "\n"))

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        said()

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError for the caller to handle."""
        raise BrokenPipeError


def console(**options: Any) -> Console:
    """Return a console for plain text; `options` are those of `rich.console.Console`."""
    return _Console(markup=False, emoji=False, highlight=False, **options)


def console_for_tables(width: int = WIDTH_WITHOUT_TERMINAL) -> Console:
    """Return a console for tables. A pipe or a file has no width, so that `width` is used."""
    own_width = console()
    return own_width if own_width.is_terminal else console(width=width)


def table_of(*columns: str, right: Collection[str] = (), **options: Any) -> Table:
    """Return a table whose columns in `right` are right-aligned; `options` are those of `rich.table.Table`."""
    table = Table(**options)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


class _Now:
    """The current activity at the time it is rendered."""

    def __rich__(self) -> Text:
        return Text(visible(now()))


@contextmanager
def working(text: str = "", *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show the current activity on standard error: at once on a terminal, else after a silence. Nothing if `quiet`.

    Yields:
        A function that changes the text.
    """
    if quiet:
        yield lambda _: None
        return
    shown = console(stderr=True)
    current = [text]
    with going_on(lambda: current[0]), shown.status(_Now()):

        def change(what: str) -> None:
            current[0] = what

        if shown.is_terminal:
            with may_be_silent():
                yield change
        else:
            yield change
