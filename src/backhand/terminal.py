"""Consoles for people. Names, paths and rows are text: nothing in them is markup, an emoji, a link or a command."""

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
    """A console for text from outside, whose reader may leave: rich would end the program with 1, as if it were a bug.

    A string is one line, also in a table's cell; a line break in it is written out. What is put together as rich's
    `Text` keeps its line breaks, and whoever does so makes its parts visible.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's."""
        for segment in super().render(renderable, options):
            text = segment.text
            plain = segment.control is not None or text.isprintable() or text == "\n"
            yield segment if plain else segment._replace(text=visible(text, "\n"))

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's."""
        super().print(*objects, **options)
        said()

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


def table_of(*columns: str, right: Collection[str] = (), **options: Any) -> Table:
    """A table with these columns, those named in `right` to the right; `options` are those of rich's."""
    made = Table(**options)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


class _Now:
    """What takes its time, as it is whenever it is shown."""

    def __rich__(self) -> Text:
        return Text(visible(now()))


@contextmanager
def working(text: str = "", *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Say on standard error what takes its time: at once on a terminal, else when it takes long; nothing if `quiet`.

    Yields:
        what changes the text.
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
