"""The results of a verification: pass or fail, the JSON object, and the lines of proofs.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from backhand.runs.directory import Proof
from backhand.verify.model_gradients import ModelProof
from backhand.verify.runner import AUTOGRAD, DIFFERENCES, Rejection, Row
from backhand.words import finite_or_none

COMMAND = "verify"


@dataclass
class VerifyReport:
    """The results of all proofs and mutants."""

    rows: list[Row] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    model: list[ModelProof] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    time_s: float = 0.0

    @property
    def failed_rows(self) -> list[Row]:
        """Proofs whose error is above the bound."""
        return [row for row in self.rows if not row.passed]

    @property
    def survivors(self) -> list[Rejection]:
        """Mutants that no case rejected."""
        return [rejection for rejection in self.rejections if not rejection.passed]

    @property
    def failed_model(self) -> list[ModelProof]:
        """Proofs about the model that failed."""
        return [proof for proof in self.model if not proof.passed]

    @property
    def passed(self) -> bool:
        """True if there was at least one proof and none failed."""
        proved = bool(self.rows or self.model)
        return proved and not (self.failed_rows or self.survivors or self.failed_model)

    def as_json(self) -> dict[str, Any]:
        """Return the report as one JSON object. Numbers that are not finite become null."""
        return {
            "passed": self.passed,
            "time_s": round(self.time_s, 3),
            "proofs": [_finite(asdict(row)) | {"passed": row.passed} for row in self.rows],
            "mutants": [_finite(asdict(one)) | {"rejected": one.passed} for one in self.rejections],
            "model": [_finite(asdict(proof)) | {"passed": proof.passed} for proof in self.model],
            "notes": list(self.notes),
        }

    def proofs(self) -> Iterator[Proof]:
        """Iterate over the lines of proofs.jsonl: the worst result of each check over all ops, and each model proof."""
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
    """Return a measured value divided by its bound, infinite if the value is not finite or the bound is 0."""
    if measured == 0:
        return 0.0
    return measured / bound if bound and math.isfinite(measured) else math.inf


def _proof(statement: str, passed: bool, value: float, bound: float) -> Proof:
    return Proof(statement, passed, value if math.isfinite(value) else str(value), bound, COMMAND, "gradients")


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {key: finite_or_none(value) for key, value in record.items()}
