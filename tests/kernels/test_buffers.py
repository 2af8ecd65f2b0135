"""No kernel writes past the buffers that its op allocates, on several threads too."""

from __future__ import annotations

import pytest
import torch

from backhand.kernels.builds import load, usable, using
from backhand.kernels.library import proving_kernels
from backhand.nn.batch import document_runs
from backhand.ops.gated_delta_rule import gated_delta_rule_backward, gated_delta_rule_forward
from backhand.verify.runner import cast, load_proofs
from tests.support.guarded import guarded_allocations

OPS = [proof.op for proof in load_proofs() if proof.compiled]

pytestmark = pytest.mark.skipif(not usable(), reason="the compiled library is not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("op", OPS)
def test_every_case_stays_within_its_buffers(op, dtype):
    for proof in load_proofs(op):
        for case in proof.cases:
            tensors = cast(case.tensors, dtype)
            with using(load(usable()[-1])), proving_kernels(), torch.no_grad(), guarded_allocations() as overrun:
                case.run_manual(tensors, proof.backward)
                assert not overrun(), case.name


def test_every_worker_of_the_delta_rule_has_memory_of_its_own():
    """Many documents of some work each, so that every thread takes some of them."""
    lengths = (70,) * 16
    tokens, heads, width = sum(lengths), 4, 24
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q, k = normal(tokens, heads, width) / 5, normal(tokens, heads, width) / 5
    v, decay = normal(tokens, heads, width), -normal(tokens, heads).abs()
    inputs = q, k, v, decay, torch.sigmoid(normal(tokens, heads))
    runs, right = document_runs(lengths), None
    with using(load(usable()[-1])), torch.no_grad():
        for threads in (1, *(3,) * 10):
            torch.set_num_threads(threads)
            with guarded_allocations() as overrun:
                y, saved = gated_delta_rule_forward(*inputs, runs, chunk=16)
                found = [y, *gated_delta_rule_backward(y, saved)]
                assert not overrun(), threads
            right = found if right is None else right
            assert all(map(torch.equal, found, right)), threads
