"""Print the results of a verification as tables on the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from backhand.terminal import table_of
from backhand.verify.report import AUTOGRAD, DIFFERENCES, MODEL, MUTANTS, PROOFS, TORCH, Result, VerifyReport

# (dtype, check) of each column of errors.
_COLUMNS = {
    "float64": ("float64", AUTOGRAD),
    "differences": ("float64", DIFFERENCES),
    "float32": ("float32", AUTOGRAD),
    "bfloat16": ("bfloat16", AUTOGRAD),
}
_NUMBERS = (*_COLUMNS, "rejected", "relative error", "measured", "bound")
_SHOWN_FAILURES = 20
_WRONG_VERSIONS = "Deliberately wrong versions, which must be rejected"
_CAPTION = (
    "float64: against autograd of the reference. differences: against finite differences of the op's own forward, "
    "in float64. float32, bfloat16: against float64, at most twice autograd's own error or 4 units of rounding."
)


def print_report(console: Console, report: VerifyReport, *, every_mutant: bool) -> None:
    """Print tables of all proofs, then the failures, then the summary.

    Args:
        every_mutant: print one line per mutant instead of one line per gradient.
    """
    for note in report.notes:
        console.print(note)
    proofs, mutants, model = report.of(PROOFS), report.of(MUTANTS), report.of(MODEL)
    if proofs:
        table = _table("Gradients by hand: largest relative error", ("op", "case", *_COLUMNS, "verdict"))
        _fill_by_op(table, _grouped(proofs, lambda row: row.case), _case)
        table.caption, table.caption_justify = _CAPTION, "left"
        console.print(table)
    if mutants and every_mutant:
        console.print(_every_mutant(mutants))
    elif mutants:
        table = _table(_WRONG_VERSIONS, ("op", "gradient", "rejected", "mistakes"))
        _fill_by_op(table, _grouped(mutants, lambda one: one.tensor), _mistakes)
        console.print(table)
    if model:
        table = _table("The model on its rows", ("proof", "measured", "bound", "verdict", "detail"))
        for one in model:
            table.add_row(one.case, _number(one.error), _number(one.bound), _verdict(one.passed), one.detail)
        console.print(table)
    _print_failures(console, report)
    console.print(_summary(report))


def _table(title: str, columns: Sequence[str]) -> Table:
    return table_of(*columns, right=_NUMBERS, title=title, title_justify="left")


def _op_name(result: Result) -> str:
    """Return the op's name, with its form unless that is torch."""
    return result.op if result.form == TORCH else f"{result.op}, {result.form}"


def _grouped(results: Iterable[Result], key: Callable[[Result], str]) -> dict[tuple[str, str], list[Result]]:
    """Group results by (op and form, key)."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((_op_name(result), key(result)), []).append(result)
    return groups


def _fill_by_op(
    table: Table, groups: dict[tuple[str, str], list[Result]], cells: Callable[[list[Result]], Iterable[str | Text]]
) -> None:
    """Add one line per group and one section per op. The section's first line names the op."""
    last = ""
    for (op, key), results in groups.items():
        if last and op != last:
            table.add_section()
        table.add_row(op if op != last else "", key, *cells(results))
        last = op


def _case(rows: list[Result]) -> Iterator[Text]:
    """Return the largest relative error over a case's output and gradients in each dtype."""
    for column in _COLUMNS.values():
        in_column = [row for row in rows if (row.dtype, row.check) == column]
        worst = max(in_column, key=lambda row: (not row.passed, math.isnan(row.error), row.error), default=None)
        yield Text(_number(worst.error), style="" if worst.passed else "bold red") if worst else Text("–")
    yield _verdict(all(row.passed for row in rows))


def _mistakes(mutants: list[Result]) -> tuple[str, str]:
    """Return the number of rejected mutants of a gradient, and the names of all mutants."""
    names = (one.mutant if one.passed else f"{one.mutant} (NOT REJECTED)" for one in mutants)
    return f"{sum(one.passed for one in mutants)} of {len(mutants)}", ", ".join(names)


def _every_mutant(mutants: list[Result]) -> Table:
    columns = ("op", "gradient", "mistake", "relative error", "first case that rejects it", "verdict")
    table = _table(_WRONG_VERSIONS, columns)
    for one in mutants:
        verdict = _verdict(one.passed, "rejected", "NOT REJECTED")
        table.add_row(_op_name(one), one.tensor, one.mutant, _number(one.error), one.case, verdict)
    return table


def _print_failures(console: Console, report: VerifyReport) -> None:
    """Print every failed proof with its worst row."""
    failed = report.failed(PROOFS)
    if not failed:
        return
    table = _table("Failed", ("op", "case", "dtype", "tensor", "relative error", "bound", "worst row"))
    table.title_style = "bold red"
    for row in failed[:_SHOWN_FAILURES]:
        dtype = row.dtype if row.check == AUTOGRAD else "float64, differences"
        table.add_row(_op_name(row), row.case, dtype, row.tensor, _number(row.error), _number(row.bound), row.detail)
    console.print(table)
    if len(failed) > _SHOWN_FAILURES:
        console.print(f"and {len(failed) - _SHOWN_FAILURES} more; --json prints all of them")


def _summary(report: VerifyReport) -> Text:
    counts = [
        (len(report.of(part)), len(report.failed(part)), what)
        for part, what in ((PROOFS, "proofs hold"), (MUTANTS, "mutants rejected"), (MODEL, "statements hold"))
    ]
    parts = [f"{count - failed} of {count} {what}" for count, failed, what in counts if count]
    sentence = f"{', '.join(parts)} ({report.time_s:.1f} s)"
    return Text(sentence, style="bold green" if report.passed else "bold red")


def _verdict(passed: bool, yes: str = "right", no: str = "WRONG") -> Text:
    return Text(yes, style="green") if passed else Text(no, style="bold red")


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
