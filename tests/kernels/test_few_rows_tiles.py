"""Few rows by AMX's tiles: the bits of the same rows in a dense product, and nothing written outside the result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as StorageType

from backhand.kernels.builds import load, usable, using
from backhand.kernels.dense_product import LowRankUpdate, dense_product
from backhand.kernels.dequantize import block_shape
from backhand.kernels.few_rows import QUICK_ROW, few_rows_product
from backhand.kernels.quantized_matrix import QuantizedMatrix, StoredRows
from backhand.ops.frozen_matrix import frozen_linear
from tests.support.gapped import gapped, marks_intact

pytestmark = pytest.mark.skipif("amx" not in usable(), reason="this processor has no AMX")

ROWS, INPUTS, OUTPUTS = (1, 2, 7, 8, 9, 16, 17, 33, 64), (1, 33, 80, 257, 2049), (1, 17, 40)
NARROW = torch.bfloat16


@pytest.fixture(autouse=True)
def tiles():
    with using(load("amx")):
        yield


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_few_rows_have_the_bits_of_a_dense_product(inputs, outputs, added):
    weight = gapped((outputs, inputs), NARROW, 1, inputs**-0.5)
    for rows in ROWS:
        x, y = gapped((rows, inputs), NARROW, 0), gapped((rows, outputs), NARROW, 2)
        bias = gapped((outputs,), NARROW, 3) if added else None
        residual = gapped((rows, outputs), NARROW, 4) if added else None
        assert few_rows_product(x, weight, bias, residual, y) is y
        assert marks_intact(y)
        assert torch.equal(y, dense_product(x, weight, bias, residual, transposed=True)), rows
        # The comparison sees one weight, the last of a row that shares its tile with others, in the last output alone.
        weight[-1, -1] += 2
        changed = few_rows_product(x, weight, bias, residual, None)
        weight[-1, -1] -= 2
        assert torch.equal(changed[:, :-1], y[:, :-1])
        assert not torch.equal(changed[:, -1], y[:, -1])


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("outputs", [17, 40])
def test_few_rows_with_an_adapter_have_the_bits_that_they_have_among_many(inputs, outputs, made):
    """Down to one row, and right in float64."""
    weight, factor = gapped((outputs, inputs), NARROW, 1, inputs**-0.5), gapped((outputs - 2, 5), NARROW, 2)
    x, lora_A = gapped((100, inputs), NARROW, 0), gapped((5, inputs), NARROW, 3, inputs**-0.5)
    h = (x @ lora_A.T).contiguous()

    def product(rows):
        update = LowRankUpdate(1, torch.zeros_like(h[rows]) if made else h[rows], factor, 1.7, lora_A if made else None)
        return frozen_linear(x[rows], weight, updates=[update]), update.h

    every, every_h = product(slice(None))
    right = x.double() @ weight.double().T
    right[:, 1:-1] += 1.7 * (every_h.double() @ factor.double().T)
    assert ((every.double() - right).abs() <= 2**-7 * right.abs() + 2**-9).all()
    for count in ROWS:
        for start in (0, 100 - count):
            found, found_h = product(slice(start, start + count))
            assert torch.equal(found, every[start : start + count]), (count, start)
            assert torch.equal(found_h, every_h[start : start + count]), (count, start)


def test_a_quick_row_of_a_quantized_matrix_is_right_and_leaves_others_their_bits():
    """One row goes by dot products then; two keep the bits that they have among many."""
    values, size = block_shape(int(StorageType.Q4_1))
    blocks = np.random.default_rng(0).integers(0, 128, (40, 256 // values * size), dtype=np.uint8) & 0x3B
    weight = QuantizedMatrix([StoredRows(blocks, int(StorageType.Q4_1))], NARROW)
    x = gapped((16, 256), NARROW, 0)
    every = frozen_linear(x, weight)
    before = QUICK_ROW.set(True)
    try:
        assert torch.equal(frozen_linear(x[:2], weight), every[:2])
        quick = frozen_linear(x[:1], weight)
    finally:
        QUICK_ROW.reset(before)
    assert torch.equal(frozen_linear(x[:1], weight), every[:1])
    right = x[:1].double() @ weight.dense().double().T
    assert (quick.double() - right).abs().max() <= 2**-7 * right.abs().max()
    with using(load("avx512bf16")):
        assert torch.equal(quick, frozen_linear(x[:1], weight))
