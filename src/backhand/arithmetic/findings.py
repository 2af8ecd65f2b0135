"""Output of results: a table or JSON on the terminal, JSON and a picture in a directory."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.text import Text

from backhand.arithmetic.options import CompressOptions, DiffOptions, InspectOptions
from backhand.files import made_directory, write_atomically
from backhand.printing import say
from backhand.terminal import table_of
from backhand.words import show_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def leave_findings(
    name: str,
    options: InspectOptions | DiffOptions | CompressOptions,
    summary: Mapping[str, object],
    print_tables: Callable[[], None],
    picture: Callable[[], bytes],
    *,
    notes: Iterable[str] = (),
) -> None:
    """Print the result, and write `<name>.json` and `<name>.png` as the options say.

    An adapter that is already in `output` is not changed.

    Args:
        picture: draws the picture; called only if it is requested.

    Raises:
        UsageError: if `output` is a file.
        ResourceError: if `output` cannot be written.
    """
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    written, output = [], options.output
    if output is not None and not isinstance(options, CompressOptions):
        with made_directory(output):
            write_atomically(output / f"{name}.json", text.encode())
        written.append(output / f"{name}.json")
    if options.plot:
        path = (output or Path()) / f"{name}.png"
        write_atomically(path, picture())
        written.append(path)
    show_notes(notes)
    if options.json:
        sys.stdout.write(text)
        return
    print_tables()
    for path in written:
        say(f"written: {shlex.quote(str(path))}", file=sys.stdout)


_DPI = 110


def label_axes(axes: Axes, title: str, x: str = "", y: str = "", /, *, grid: bool = True, **legend: Any) -> None:
    """Set the title, axis labels, grid and legend; `legend` are matplotlib's options."""
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=x, ylabel=y)
    if grid:
        axes.grid(visible=True, linewidth=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", **legend)


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of this size in inches with constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def png_bytes(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def kind_of(module: str) -> str:
    """Return the kind of a module, the last component of its path, such as `q_proj`."""
    return module.rsplit(".", 1)[-1]


def layer_of(module: str) -> int | None:
    """Return the first number in the path, or None."""
    match = _LAYER.search(module)
    return int(match[1]) if match else None


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, left: int = 1
) -> None:
    """Print a table with the first `left` columns left-aligned and the others right-aligned; titles are not wrapped.

    A title that begins with a line break is preceded by an empty line.
    """
    table = table_of(*columns, right=columns[left:])
    for row in rows:
        table.add_row(*row)
    if title.startswith("\n"):
        console.print()
    console.print(title.removeprefix("\n"), style="bold", soft_wrap=True)
    console.print(table)


def by_kind(modules: Iterable[str]) -> Mapping[str, list[str]]:
    """Group dotted paths by kind of module, in order of first occurrence."""
    kinds: dict[str, list[str]] = {}
    for module in modules:
        kinds.setdefault(kind_of(module), []).append(module)
    return kinds


T = TypeVar("T")
Figures = Callable[[T], float | tuple[float, ...] | None]
"""Returns one figure of a module, or several for one table cell."""


def print_kinds(
    console: Console, title: str, modules: Mapping[str, T], figures: Mapping[str, Figures[T]], **formats: str
) -> None:
    """Print a table with a row per kind of module: the number of modules, and the range of every figure.

    Args:
        modules: by dotted path.
        figures: by column heading.
        formats: format strings by the last word of the heading; three digits by default.
    """
    rows = [
        (
            kind,
            str(len(names)),
            *(
                spread((figure(modules[name]) for name in names), formats.get(heading.split()[-1], "{:.3g}"))
                for heading, figure in figures.items()
            ),
        )
        for kind, names in by_kind(modules).items()
    ]
    print_table(console, title, ("module", "modules", *figures), rows)


def spread(values: Iterable[float | tuple[float, ...] | None], form: str = "{:.3g}") -> str:
    """Format values of several layers for one cell: a single value, a range, or "" without values."""
    flat = [one for value in values for one in (value if isinstance(value, tuple) else (value,)) if one is not None]
    shown = list(dict.fromkeys(form.format(value) for value in (sorted(flat)[:1] + sorted(flat)[-1:])))
    return " … ".join(shown)


def draw_map(
    figure: Figure,
    axes: Axes,
    values: Mapping[str, float],
    title: str,
    label: str,
    *,
    vmin: float | None = None,
    vmax: float | None = None,
) -> None:
    """Draw a heat map of values by dotted path, white low and black high, with title and colour bar.

    Modules without a layer number are in column 0. Cells without a module stay white. Without values, nothing is drawn.
    """
    axes.set_title(title, fontsize="medium")
    if not values:
        axes.set_axis_off()
        return
    kinds = list(by_kind(values))
    layers = sorted({layer_of(module) or 0 for module in values})
    grid = [[math.nan] * len(layers) for _ in kinds]
    for module, value in values.items():
        grid[kinds.index(kind_of(module))][layers.index(layer_of(module) or 0)] = value
    image = axes.imshow(grid, cmap="gray_r", vmin=vmin, vmax=vmax, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds, fontsize="small")
    step = max(1, len(layers) // 10)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize="small")
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label=label)
