"""Every op is whole: its four parts, and cases and mutants in which a mistake shows. `backhand verify` proves them."""

from __future__ import annotations

from pathlib import Path

import pytest

import backhand.ops
from backhand.ops.registry import OPS, op_module
from backhand.verify.runner import WITHOUT_BACKWARD, load_proofs
from backhand.verify.scaffold import kind

# Files of `ops` that hold no op: the list of them, and parts of others.
NO_OPS = {"__init__", "registry", "activation", "chunk_steps", "delta_chunks", "document_groups", "head_factors"}
NO_OPS |= {"logits_rule", "low_rank", "weight_tiles"}
FILES = sorted(path.stem for path in Path(backhand.ops.__file__).parent.glob("*.py") if path.stem not in NO_OPS)


@pytest.mark.parametrize("file", FILES)
def test_every_op_file_is_registered(file):
    assert file in (OPS | WITHOUT_BACKWARD).values()


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_four_parts(op):
    module = op_module(op)
    assert module.__doc__, "the derivation is the module's docstring"
    for part in ("forward", "backward", "reference"):
        assert callable(getattr(module, f"{op}_{part}"))


@pytest.mark.parametrize("op", OPS | WITHOUT_BACKWARD)
def test_an_op_has_cases_and_mutants_for_each_gradient(op):
    (proof,) = load_proofs(op)
    assert len(proof.cases) >= 6
    assert len({case.name for case in proof.cases}) == len(proof.cases)
    returned: set[str] = set()

    def backward(*args, **kwargs):
        grads = proof.backward(*args, **kwargs)
        returned.update(grads._fields)
        return grads

    names = {kind(name) for case in proof.cases for name in case.run_manual(case.tensors, backward).gradients}
    spoiled = {mutant.gradient for mutant in proof.mutants}
    assert returned == spoiled == {f"d_{name}" for name in names}
    for gradient in spoiled:
        mutants = {mutant.name for mutant in proof.mutants if mutant.gradient == gradient}
        assert "factor 1 + 1e-6" in mutants
        assert len(mutants) > 2, "a mistake of its own in addition to the standard ones"


@pytest.mark.parametrize("op", OPS | WITHOUT_BACKWARD)
def test_an_op_is_tried_without_rows_with_one_and_with_strided_inputs(op):
    (proof,) = load_proofs(op)
    sizes = {
        case.tensors["d_y"].numel() == 0 or any(x.numel() == 0 for x in case.tensors.values()) for case in proof.cases
    }
    assert sizes == {True, False}
    names = " ".join(case.name for case in proof.cases)
    assert "one row" in names and "strided" in names


@pytest.mark.parametrize("op", OPS | WITHOUT_BACKWARD)
def test_nothing_in_gives_zero_gradients(op):
    (proof,) = load_proofs(op)
    for case in proof.cases:
        if case.tensors["d_y"].numel() == 0:
            for name, gradient in case.run_manual(case.tensors, proof.backward).gradients.items():
                assert gradient.shape == case.tensors[name].shape
                assert gradient.eq(0).all(), (case.name, name)


@pytest.mark.parametrize("op", OPS | WITHOUT_BACKWARD)
def test_no_two_sizes_are_alike_in_the_first_case(op):
    (proof,) = load_proofs(op)
    case = proof.cases[0]
    for name, tensor in case.tensors.items():
        assert len(set(tensor.shape)) == tensor.ndim, (name, tuple(tensor.shape))


@pytest.mark.parametrize("op", OPS)
def test_a_reference_calls_no_forward_or_backward_of_ours(op):
    module = op_module(op)
    names = getattr(module, f"{op}_reference").__code__.co_names
    assert not [name for name in names if name.endswith(("_forward", "_backward", "_apply"))]
