"""Every op, forward and backward, on another device: the numbers of the processor, and nothing is left on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backhand.kernels.builds import torch_form
from backhand.verify.runner import PROOF_FILES, load_proofs
from backhand.verify.runner import on_device as moved
from backhand.verify.scaffold import Case, OpProof
from tests.support.some_cases import some_cases


@pytest.mark.parametrize("name", PROOF_FILES)
def test_an_op_computes_where_its_inputs_are(name: str, device: torch.device) -> None:
    for proof in load_proofs(name):
        for case in some_cases(name, proof):
            _compare(proof, case, device)


def _compare(proof: OpProof, case: Case, device: torch.device) -> None:
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no wider one
    tensors = {name: tensor.to(wide) if tensor.is_floating_point() else tensor for name, tensor in case.tensors.items()}
    with torch.no_grad(), torch_form():
        y, gradients = case.run_manual(tensors, proof.backward)
        y_there, gradients_there = case.run_manual(moved(tensors, device), proof.backward)
    largest = max((float(one.abs().max()) for one in (y, *gradients.values()) if one.numel()), default=0.0)
    allowed = (1e-3 if wide == torch.float32 else 1e-10) * max(largest, 1e-3)
    for name, here, there in [
        ("y", y, y_there),
        *((name, gradients[name], gradients_there[name]) for name in gradients),
    ]:
        assert there.device.type == device.type, f"{case.name}: {name} is on {there.device}"
        assert _distance(here, there) <= allowed, f"{case.name}: {name}"


def _distance(here: Tensor, there: Tensor) -> float:
    apart = (there.cpu() - here).abs()
    return float(apart.max()) if apart.numel() else 0.0
