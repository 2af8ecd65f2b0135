"""Tables of modules on the terminal: a line for each kind of module, over its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from backhand.arithmetic.computed_adapter import ComputedAdapter
from backhand.arithmetic.module_paths import kind_of


def print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """One table: the first column to the left, numbers to the right; a title wider than the table is not broken."""
    table = Table()
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold", soft_wrap=True)
    console.print(table)


def by_kind(modules: Iterable[str]) -> Mapping[str, list[str]]:
    """Dotted paths by kind of module, in the order in which kinds first occur."""
    kinds: dict[str, list[str]] = {}
    for module in modules:
        kinds.setdefault(kind_of(module), []).append(module)
    return kinds


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Values of several layers in one cell: the only one, or the least and the greatest; "" where there are none."""
    shown = [f"{value:.{digits}g}" for value in sorted(value for value in values if value is not None)]
    if not shown:
        return ""
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} … {shown[-1]}"


def computed_rows(adapter: ComputedAdapter) -> Sequence[Sequence[str]]:
    """Kind, number of modules, rank, ‖ΔW‖ and relative error of a computed adapter."""
    rows = []
    for kind, names in by_kind(adapter.modules).items():
        modules = [adapter.modules[name] for name in names]
        rows.append(
            (
                kind,
                str(len(names)),
                spread(module.factors.rank for module in modules),
                spread(module.norm for module in modules),
                spread((module.error for module in modules), digits=2),
            )
        )
    return rows
