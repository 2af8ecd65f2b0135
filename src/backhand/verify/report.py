"""The results of a verification in one table: proofs of ops, mutants, and statements about a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from backhand.runs.directory import Proof, ProofKind
from backhand.words import finite_or_none

COMMAND = "verify"
AUTOGRAD, DIFFERENCES = "autograd", "differences"
TORCH, COMPILED = "torch", "compiled"
PROOFS, MUTANTS, MODEL = "proofs", "mutants", "model"
# Part of the table → key of the JSON object → field of `Result`.
_JSON = {
    PROOFS: {key: key for key in ("op", "case", "dtype", "check", "tensor", "error", "bound")}
    | {"worst": "detail", "form": "form", "passed": "passed"},
    MUTANTS: {"op": "op", "mutant": "mutant", "gradient": "tensor"}
    | {"error": "error", "case": "case", "bound": "bound", "form": "form", "rejected": "passed"},
    MODEL: {"proof": "case", "measured": "error"}
    | {"bound": "bound", "detail": "detail", "kind": "kind", "passed": "passed"},
}


@dataclass(frozen=True)
class Result:
    """One line of the table: an error and its bound. A mutant's error must exceed the bound."""

    op: str  # empty for a statement about a model
    case: str  # the case; for a mutant the first one that rejects it, for a model the statement
    tensor: str  # `y`, or `d_` and the name of the input whose gradient it is, or empty
    error: float  # relative norm error against the truth in float64
    bound: float
    dtype: str = "float64"  # `float64`, `float32` or `bfloat16`
    check: str = AUTOGRAD  # `autograd`, or `differences` for finite differences
    detail: str = ""  # the row with the largest difference, or the value that a model is compared with
    form: str = TORCH  # `torch`, or `compiled` for the library's kernels
    mutant: str = ""  # name of the deliberate mistake, or empty for a proof
    kind: ProofKind = "gradients"

    @property
    def part(self) -> str:
        """The part of the table."""
        return MUTANTS if self.mutant else PROOFS if self.op else MODEL

    @property
    def passed(self) -> bool:
        """True if a proof's error is within the bound, or a mutant's finite error above it. NaN is neither."""
        return self.error > self.bound if self.mutant else self.error <= self.bound

    @property
    def severity(self) -> float:
        """The error divided by its bound, infinite if the error is not finite or the bound is 0."""
        if self.error == 0:
            return 0.0
        return self.error / self.bound if self.bound and math.isfinite(self.error) else math.inf


def statement(text: str, error: float, bound: float, detail: str = "", kind: ProofKind = "gradients") -> Result:
    """Return the result of one proof about a model."""
    return Result("", text, "", error, bound, detail=detail, kind=kind)


@dataclass
class VerifyReport:
    """The table of results, notes about what was proved, and the time."""

    results: list[Result] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    time_s: float = 0.0

    def of(self, part: str) -> list[Result]:
        """Return one part of the table."""
        return [one for one in self.results if one.part == part]

    def failed(self, part: str) -> list[Result]:
        """Return the failed lines of one part of the table."""
        return [one for one in self.of(part) if not one.passed]

    @property
    def passed(self) -> bool:
        """True if there was at least one proof and none failed."""
        return any(not one.mutant for one in self.results) and all(one.passed for one in self.results)

    def as_json(self) -> dict[str, Any]:
        """Return the report as one JSON object. Numbers that are not finite become null."""
        parts = {
            part: [{key: finite_or_none(getattr(one, name)) for key, name in keys.items()} for one in self.of(part)]
            for part, keys in _JSON.items()
        }
        return {"passed": self.passed, "time_s": round(self.time_s, 3), **parts, "notes": list(self.notes)}

    def proofs(self) -> Iterator[Proof]:
        """Iterate over the lines of proofs.jsonl: the worst result of each check over all ops, and each model proof."""
        by_check: dict[tuple[str, str], list[Result]] = {}
        for row in self.of(PROOFS):
            by_check.setdefault((row.dtype, row.check), []).append(row)
        for (dtype, check), rows in by_check.items():
            worst = max(rows, key=lambda row: row.severity)
            against = {AUTOGRAD: "autograd", DIFFERENCES: "finite differences"}[check]
            text = f"{len(rows)} gradients and outputs by hand agree with {against}, {dtype}; nearest to its bound"
            yield _line(worst, f"{text}: {worst.op}, {worst.case}, {worst.tensor}")
        if mutants := self.of(MUTANTS):
            survivors = len(self.failed(MUTANTS))
            text, rejected = f"{len(mutants)} wrong backward passes are rejected by value", len(mutants) - survivors
            yield Proof(text, not survivors, float(rejected), float(len(mutants)), COMMAND, "gradients")
        for one in self.of(MODEL):
            yield _line(one, one.case, one.detail)


def _line(one: Result, text: str, detail: str = "") -> Proof:
    value = one.error if math.isfinite(one.error) else str(one.error)
    return Proof(text, one.passed, value, one.bound, COMMAND, one.kind, detail)
