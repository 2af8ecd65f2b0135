"""Every case of `backhand verify` as a test of pytest, so that tools/mutants.py can judge by the proofs.

python tools/mutants.py --seed 46 --count 40 --modules backhand.ops -- tools/proof_cases.py
python tools/mutants.py --count 40 --modules backhand.ops.rms_norm -- tools/proof_cases.py -k rms_norm
"""

from __future__ import annotations

import pytest

from backhand.verify.runner import load_proofs, prove_case
from backhand.verify.scaffold import Case, OpProof

CASES = [(proof, case) for proof in load_proofs() for case in proof.cases]


NAMES = [f"{proof.op}: {case.name}" for proof, case in CASES]


@pytest.mark.parametrize(("proof", "case"), CASES, ids=NAMES)  # type: ignore[untyped-decorator]
def test_case(proof: OpProof, case: Case) -> None:
    """Prove one case in every form and dtype."""
    assert not [row for row in prove_case(proof, case) if not row.passed]
