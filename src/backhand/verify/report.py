"""What a verification found, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from backhand.train.proofs import Proof
from backhand.verify.model_gradients import ModelProof
from backhand.verify.runner import AUTOGRAD, DIFFERENCES, Rejection, Row

COMMAND = "verify"


@dataclass
class VerifyReport:
    """Everything that was proved, or not.

    Attributes:
        rows: proofs of ops, blocks and decoders on their cases.
        rejections: what became of the mutants.
        model: proofs about the user's own model.
        notes: about the model.
        time_s: how long it took.
    """

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
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
