"""What a verification found, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from backhand.runs.directory import Proof
from backhand.terminal import table_of
from backhand.verify.model_gradients import ModelProof
from backhand.verify.runner import AUTOGRAD, DIFFERENCES, TORCH, Rejection, Row
from backhand.words import finite_or_none

COMMAND = "verify"
One = TypeVar("One", Row, Rejection)


@dataclass
class VerifyReport:
    """Everything that was proved, or not."""

    rows: list[Row] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    model: list[ModelProof] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    time_s: float = 0.0

    @property
    def failed_rows(self) -> list[Row]:
        """Gradients that are wrong, or too inexact."""
        return [row for row in self.rows if not row.passed]

    @property
    def survivors(self) -> list[Rejection]:
        """Mutants that went unnoticed."""
        return [rejection for rejection in self.rejections if not rejection.passed]

    @property
    def failed_model(self) -> list[ModelProof]:
        """Statements about the model that do not hold."""
        return [proof for proof in self.model if not proof.passed]

    @property
    def passed(self) -> bool:
        """Whether everything held; nothing proved is not enough."""
        something = bool(self.rows or self.model)
        return something and not (self.failed_rows or self.survivors or self.failed_model)

    def as_json(self) -> dict[str, Any]:
        """The report as one JSON object; numbers that are not finite become null."""
        return {
            "passed": self.passed,
            "time_s": round(self.time_s, 3),
            "proofs": [_finite(asdict(row)) | {"passed": row.passed} for row in self.rows],
            "mutants": [_finite(asdict(one)) | {"rejected": one.passed} for one in self.rejections],
            "model": [_finite(asdict(proof)) | {"passed": proof.passed} for proof in self.model],
            "notes": list(self.notes),
        }

    def proofs(self) -> Iterator[Proof]:
        """The lines for proofs.jsonl: the worst of each check over all ops, and each proof about the model."""
        for dtype, check in dict.fromkeys((row.dtype, row.check) for row in self.rows):
            rows = [row for row in self.rows if (row.dtype, row.check) == (dtype, check)]
            worst = max(rows, key=lambda row: severity(row.error, row.bound))
            against = {AUTOGRAD: "autograd", DIFFERENCES: "finite differences"}[check]
            statement = f"{len(rows)} gradients and outputs by hand agree with {against}, {dtype}; nearest to its bound"
            yield _proof(
                f"{statement}: {worst.op}, {worst.case}, {worst.tensor}", worst.passed, worst.error, worst.bound
            )
        if self.rejections:
            rejected = len(self.rejections) - len(self.survivors)
            everything = f"{len(self.rejections)} wrong backward passes are rejected by value"
            yield _proof(everything, not self.survivors, float(rejected), float(len(self.rejections)))
        for proof in self.model:
            shown = _proof(proof.proof, proof.passed, proof.measured, proof.bound)
            yield replace(shown, kind=proof.kind, detail=proof.detail)


def severity(measured: float, bound: float) -> float:
    """How many times its bound a measured value is; infinite where it is no number or the bound is 0."""
    if measured == 0:
        return 0.0
    return measured / bound if bound and math.isfinite(measured) else math.inf


def _proof(statement: str, passed: bool, value: float, bound: float) -> Proof:
    return Proof(statement, passed, value if math.isfinite(value) else str(value), bound, COMMAND, "gradients")


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {key: finite_or_none(value) for key, value in record.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The report on the terminal.


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
    """Tables of what was proved, then what failed, then the sum.

    Args:
        every_mutant: a line for each mutant; else one for each gradient that lists them.
    """
    for note in report.notes:
        console.print(note)
    if report.rows:
        table = _table("Gradients by hand: largest relative error", ("op", "case", *_COLUMNS, "verdict"))
        _fill_by_op(table, _grouped(report.rows, lambda row: row.case), _case)
        table.caption, table.caption_justify = _CAPTION, "left"
        console.print(table)
    if report.rejections and every_mutant:
        console.print(_every_mutant(report))
    elif report.rejections:
        table = _table(_WRONG_VERSIONS, ("op", "gradient", "rejected", "mistakes"))
        _fill_by_op(table, _grouped(report.rejections, lambda one: one.gradient), _mistakes)
        console.print(table)
    if report.model:
        table = _table("The model on its rows", ("proof", "measured", "bound", "verdict", "detail"))
        for one in report.model:
            table.add_row(one.proof, _number(one.measured), _number(one.bound), _verdict(one.passed), one.detail)
        console.print(table)
    _print_failures(console, report)
    console.print(_summary(report))


def _table(title: str, columns: Sequence[str]) -> Table:
    return table_of(*columns, right=_NUMBERS, title=title, title_justify="left")


def _named(one: Row | Rejection) -> str:
    """The op, and its form where that is not torch's."""
    return one.op if one.form == TORCH else f"{one.op}, {one.form}"


def _grouped(ones: Iterable[One], what: Callable[[One], str]) -> dict[tuple[str, str], list[One]]:
    """By op and form, and something else."""
    groups: dict[tuple[str, str], list[One]] = {}
    for one in ones:
        groups.setdefault((_named(one), what(one)), []).append(one)
    return groups


def _fill_by_op(
    table: Table, groups: dict[tuple[str, str], list[One]], cells: Callable[[list[One]], Iterable[str | Text]]
) -> None:
    """A line a group, and a section an op, which the first line names."""
    last = ""
    for (op, what), ones in groups.items():
        if last and op != last:
            table.add_section()
        table.add_row(op if op != last else "", what, *cells(ones))
        last = op


def _case(rows: list[Row]) -> Iterator[Text]:
    """The largest relative error over a case's output and gradients in each dtype."""
    for where in _COLUMNS.values():
        found = [row for row in rows if (row.dtype, row.check) == where]
        worst = max(found, key=lambda row: (not row.passed, math.isnan(row.error), row.error), default=None)
        yield Text(_number(worst.error), style="" if worst.passed else "bold red") if worst else Text("–")
    yield _verdict(all(row.passed for row in rows))


def _mistakes(mutants: list[Rejection]) -> tuple[str, str]:
    """How many wrong versions of a gradient were rejected, and their names."""
    names = (one.mutant if one.passed else f"{one.mutant} (NOT REJECTED)" for one in mutants)
    return f"{sum(one.passed for one in mutants)} of {len(mutants)}", ", ".join(names)


def _every_mutant(report: VerifyReport) -> Table:
    columns = ("op", "gradient", "mistake", "relative error", "first case that rejects it", "verdict")
    table = _table(_WRONG_VERSIONS, columns)
    for one in report.rejections:
        verdict = _verdict(one.passed, "rejected", "NOT REJECTED")
        table.add_row(_named(one), one.gradient, one.mutant, _number(one.error), one.case, verdict)
    return table


def _print_failures(console: Console, report: VerifyReport) -> None:
    """Every failed proof in full, the worst row named."""
    if not report.failed_rows:
        return
    table = _table("Failed", ("op", "case", "dtype", "tensor", "relative error", "bound", "worst row"))
    table.title_style = "bold red"
    for row in report.failed_rows[:_SHOWN_FAILURES]:
        dtype = row.dtype if row.check == AUTOGRAD else "float64, differences"
        table.add_row(_named(row), row.case, dtype, row.tensor, _number(row.error), _number(row.bound), row.worst)
    console.print(table)
    if len(report.failed_rows) > _SHOWN_FAILURES:
        console.print(f"and {len(report.failed_rows) - _SHOWN_FAILURES} more; --json has them all")


def _summary(report: VerifyReport) -> Text:
    counted = (
        ("proofs hold", report.rows, report.failed_rows),
        ("mutants rejected", report.rejections, report.survivors),
        ("statements hold", report.model, report.failed_model),
    )
    parts = [f"{len(ones) - len(failed)} of {len(ones)} {what}" for what, ones, failed in counted if ones]
    sentence = f"{', '.join(parts)} ({report.time_s:.1f} s)"
    return Text(sentence, style="bold green" if report.passed else "bold red")


def _verdict(passed: bool, yes: str = "right", no: str = "WRONG") -> Text:
    return Text(yes, style="green") if passed else Text(no, style="bold red")


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
