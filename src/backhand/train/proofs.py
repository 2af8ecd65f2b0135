"""proofs.jsonl: a line for everything that was checked about a run, from any command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from backhand.train.run_directory import PROOFS, RunDirectory

ProofKind = Literal["gradients", "guards", "invariances", "resume", "merge", "export"]


@dataclass(frozen=True)
class Proof:
    """One checked statement.

    Attributes:
        proof: the statement, in words.
        passed: whether it held.
        value: the measured figure.
        bound: what the figure was held against; None where it only informs.
        command: which command checked it.
        kind: what the statement is about; the report has a table for each.
        detail: where the figure is largest, or what it compares with.
    """

    proof: str
    passed: bool
    value: float | str | None
    bound: float | str | None = None
    command: str = "train"
    kind: ProofKind = "guards"
    detail: str = ""


ProofLog = Callable[[Proof], None]


def proof_log(directory: RunDirectory) -> ProofLog:
    """A log that appends to the run's proofs.jsonl, with the time."""

    def log(proof: Proof) -> None:
        directory.append(PROOFS, {**asdict(proof), "time": datetime.now(UTC).isoformat(timespec="seconds")})

    return log
