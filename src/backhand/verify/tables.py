"""The report on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from backhand.verify.report import VerifyReport
from backhand.verify.runner import AUTOGRAD, DIFFERENCES, Row

# (heading, dtype, check) of each column of errors.
_COLUMNS = (
    ("float64", "float64", AUTOGRAD),
    ("differences", "float64", DIFFERENCES),
    ("float32", "float32", AUTOGRAD),
    ("bfloat16", "bfloat16", AUTOGRAD),
)
_SHOWN_FAILURES = 20


def print_report(console: Console, report: VerifyReport, *, every_mutant: bool) -> None:
    """Tables of what was proved, then what failed, then the sum.

    Args:
        console: where to.
        report: what was found.
        every_mutant: a line for each mutant; else one for each gradient that lists them.
    """
    for note in report.notes:
        console.print(note)
    if report.rows:
        console.print(_cases(report.rows))
    if report.rejections:
        console.print(_every_mutant(report) if every_mutant else _mutants(report))
    if report.model:
        console.print(_model(report))
    _print_failures(console, report)
    console.print(_summary(report))


def _cases(rows: Iterable[Row]) -> Table:
    """A line a case: the largest relative error over its output and gradients in each dtype."""
    table = Table(title="Gradients by hand: largest relative error", title_justify="left")
    table.add_column("op")
    table.add_column("case")
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    by_case: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_case.setdefault((row.op, row.case), []).append(row)
    last = ""
    for (op, case), found in by_case.items():
        if last and op != last:
            table.add_section()
        cells = [
            _worst([row for row in found if (row.dtype, row.check) == (dtype, check)]) for _, dtype, check in _COLUMNS
        ]
        table.add_row(op if op != last else "", case, *cells, _verdict(all(row.passed for row in found)))
        last = op
    table.caption = (
        "float64: against autograd of the reference. differences: against finite differences of the op's own forward, "
        "in float64. float32, bfloat16: against float64, at most twice autograd's own error or 4 units of rounding."
    )
    table.caption_justify = "left"
    return table


def _worst(rows: list[Row]) -> Text:
    if not rows:
        return Text("–")
    worst = max(rows, key=lambda row: (not row.passed, math.isnan(row.error), row.error))
    return Text(_number(worst.error), style="" if worst.passed else "bold red")


def _mutants(report: VerifyReport) -> Table:
    """A line a gradient: its wrong versions by name, and how many of them were rejected."""
    table = Table(title="Deliberately wrong versions, which must be rejected", title_justify="left")
    for heading in ("op", "gradient", "rejected", "mistakes"):
        table.add_column(heading, justify="right" if heading == "rejected" else "left")
    groups: dict[tuple[str, str], list[tuple[str, bool]]] = {}
    for one in report.rejections:
        groups.setdefault((one.op, one.gradient), []).append((one.mutant, one.passed))
    last = ""
    for (op, gradient), mutants in groups.items():
        if last and op != last:
            table.add_section()
        rejected = sum(passed for _, passed in mutants)
        names = ", ".join(name if passed else f"{name} (NOT REJECTED)" for name, passed in mutants)
        table.add_row(op if op != last else "", gradient, f"{rejected} of {len(mutants)}", names)
        last = op
    return table


def _every_mutant(report: VerifyReport) -> Table:
    table = Table(title="Deliberately wrong versions, which must be rejected", title_justify="left")
    for heading in ("op", "gradient", "mistake", "relative error", "first case that rejects it", "verdict"):
        table.add_column(heading, justify="right" if heading == "relative error" else "left")
    for one in report.rejections:
        verdict = Text("rejected", style="green") if one.passed else Text("NOT REJECTED", style="bold red")
        table.add_row(one.op, one.gradient, one.mutant, _number(one.error), one.case, verdict)
    return table


def _model(report: VerifyReport) -> Table:
    table = Table(title="The model on its rows", title_justify="left")
    for heading in ("proof", "measured", "bound", "verdict", "detail"):
        table.add_column(heading, justify="right" if heading in ("measured", "bound") else "left")
    for proof in report.model:
        table.add_row(proof.proof, _number(proof.measured), _number(proof.bound), _verdict(proof.passed), proof.detail)
    return table


def _print_failures(console: Console, report: VerifyReport) -> None:
    """Every failed proof in full, the worst row named."""
    if not report.failed_rows:
        return
    table = Table(title="Failed", title_justify="left", title_style="bold red")
    for heading in ("op", "case", "dtype", "tensor", "relative error", "bound", "worst row"):
        table.add_column(heading, justify="right" if heading in ("relative error", "bound") else "left")
    for row in report.failed_rows[:_SHOWN_FAILURES]:
        dtype = row.dtype if row.check == AUTOGRAD else "float64, differences"
        table.add_row(row.op, row.case, dtype, row.tensor, _number(row.error), _number(row.bound), row.worst)
    console.print(table)
    if len(report.failed_rows) > _SHOWN_FAILURES:
        console.print(f"and {len(report.failed_rows) - _SHOWN_FAILURES} more; --json has them all")


def _summary(report: VerifyReport) -> Text:
    parts = []
    if report.rows:
        parts.append(f"{len(report.rows) - len(report.failed_rows)} of {len(report.rows)} proofs hold")
    if report.rejections:
        rejected = len(report.rejections) - len(report.survivors)
        parts.append(f"{rejected} of {len(report.rejections)} mutants rejected")
    if report.model:
        parts.append(f"{len(report.model) - len(report.failed_model)} of {len(report.model)} statements hold")
    sentence = f"{', '.join(parts)} ({report.time_s:.1f} s)"
    return Text(sentence, style="bold green" if report.passed else "bold red")


def _verdict(passed: bool) -> Text:
    return Text("right", style="green") if passed else Text("WRONG", style="bold red")


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
