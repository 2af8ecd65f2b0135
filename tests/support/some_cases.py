"""Some of an op's cases, for tests that repeat what `verify` proves of every case."""

from __future__ import annotations

from collections.abc import Sequence

from backhand.verify.scaffold import Case, OpProof

_EVERY = {"block": 2, "decoder": 7, "decoder_kinds": 7}  # odd: recompute modes alternate


def some_cases(file: str, proof: OpProof) -> Sequence[Case]:
    """All of a proof's cases, or every so many where its file has blocks or whole decoders."""
    return proof.cases[:: _EVERY.get(file, 1)]
