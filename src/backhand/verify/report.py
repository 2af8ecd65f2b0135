"""What a verification found, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from backhand.runs.directory import Proof
from backhand.terminal import table_of
from backhand.verify.model_gradients import ModelProof
from backhand.verify.runner import AUTOGRAD, DIFFERENCES, TORCH, Rejection, Row
from backhand.words import finite_or_none

COMMAND = "verify"


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
            yield replace(
                _proof(proof.proof, proof.passed, proof.measured, proof.bound), kind=proof.kind, detail=proof.detail
            )


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


# (heading, dtype, check) of each column of errors.
_COLUMNS = (
    ("float64", "float64", AUTOGRAD),
    ("differences", "float64", DIFFERENCES),
    ("float32", "float32", AUTOGRAD),
    ("bfloat16", "bfloat16", AUTOGRAD),
)

_SHOWN_FAILURES = 20
_WRONG_VERSIONS = "Deliberately wrong versions, which must be rejected"


def print_report(console: Console, report: VerifyReport, *, every_mutant: bool) -> None:
    """Tables of what was proved, then what failed, then the sum.

    Args:
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


def _table(title: str, columns: Sequence[str], numbers: Sequence[str]) -> Table:
    return table_of(*columns, right=numbers, title=title, title_justify="left")


def _cases(rows: Iterable[Row]) -> Table:
    """A line a case: the largest relative error over its output and gradients in each dtype."""
    numbers = tuple(heading for heading, _, _ in _COLUMNS)
    table = _table("Gradients by hand: largest relative error", ("op", "case", *numbers, "verdict"), numbers)
    by_case: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_case.setdefault((_named(row), row.case), []).append(row)
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


def _named(one: Row | Rejection) -> str:
    """The op, and its form where that is not torch's."""
    return one.op if one.form == TORCH else f"{one.op}, {one.form}"


def _worst(rows: list[Row]) -> Text:
    if not rows:
        return Text("–")
    worst = max(rows, key=lambda row: (not row.passed, math.isnan(row.error), row.error))
    return Text(_number(worst.error), style="" if worst.passed else "bold red")


def _mutants(report: VerifyReport) -> Table:
    """A line a gradient: its wrong versions by name, and how many of them were rejected."""
    table = _table(_WRONG_VERSIONS, ("op", "gradient", "rejected", "mistakes"), ("rejected",))
    groups: dict[tuple[str, str], list[tuple[str, bool]]] = {}
    for one in report.rejections:
        groups.setdefault((_named(one), one.gradient), []).append((one.mutant, one.passed))
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
    columns = ("op", "gradient", "mistake", "relative error", "first case that rejects it", "verdict")
    table = _table(_WRONG_VERSIONS, columns, ("relative error",))
    for one in report.rejections:
        verdict = Text("rejected", style="green") if one.passed else Text("NOT REJECTED", style="bold red")
        table.add_row(_named(one), one.gradient, one.mutant, _number(one.error), one.case, verdict)
    return table


def _model(report: VerifyReport) -> Table:
    columns = ("proof", "measured", "bound", "verdict", "detail")
    table = _table("The model on its rows", columns, ("measured", "bound"))
    for proof in report.model:
        table.add_row(proof.proof, _number(proof.measured), _number(proof.bound), _verdict(proof.passed), proof.detail)
    return table


def _print_failures(console: Console, report: VerifyReport) -> None:
    """Every failed proof in full, the worst row named."""
    if not report.failed_rows:
        return
    columns = ("op", "case", "dtype", "tensor", "relative error", "bound", "worst row")
    table = _table("Failed", columns, ("relative error", "bound"))
    table.title_style = "bold red"
    for row in report.failed_rows[:_SHOWN_FAILURES]:
        dtype = row.dtype if row.check == AUTOGRAD else "float64, differences"
        table.add_row(_named(row), row.case, dtype, row.tensor, _number(row.error), _number(row.bound), row.worst)
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
