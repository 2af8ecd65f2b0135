"""A product that unpacks its stored operand itself: the bits of unpacking first, for every type and however it is cut.

In float64 on every build; in bfloat16 where the processor has AMX's tiles.
"""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as StorageType

from backhand.kernels.builds import usable
from backhand.kernels.dense_product import MOST_PARTS, LowRankUpdate, dense_product
from backhand.kernels.dequantize import block_shape
from backhand.kernels.quantized_matrix import QuantizedMatrix, StoredRows
from backhand.ops import weight_tiles
from backhand.ops.frozen_matrix import frozen_input_gradient, frozen_linear
from tests.support.for_each import for_each
from tests.support.gapped import gapped, marks_intact

KINDS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
    *("F32", "F16", "BF16"),
)
LONGEST_PART, WAITING_ROWS = 1536, 4096  # as in native/dense_product.h, of blocks

pytestmark = pytest.mark.skipif(not usable(), reason="the compiled library is not built")


def rows_of(kind, rows, columns, *, ordered=False, seed=0):
    """Random blocks whose numbers are finite, with one stored row more than are taken if they are in another order."""
    values, size = block_shape(int(StorageType[kind]))
    random = np.random.default_rng([seed, rows, columns])
    there = rows + 1 if ordered else rows
    if kind in ("F32", "BF16", "F16"):
        numbers = torch.from_numpy(random.standard_normal((there, columns), np.float32))
        narrow = numbers.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
        blocks = narrow.view(torch.uint8).reshape(there, columns * size).numpy()
    else:
        blocks = random.integers(0, 256, (there, columns // values * size), dtype=np.uint8) & 0x3B
    order = torch.from_numpy(random.permutation(there)[:rows].astype(np.int64)) if ordered else None
    return StoredRows(blocks, int(StorageType[kind]), order)


def matrix_of(parts, columns, dtype, *, ordered=False):
    made = [rows_of(kind, rows, columns, ordered=ordered, seed=place) for place, (kind, rows) in enumerate(parts)]
    return QuantizedMatrix(made, dtype)


def updates_of(rows, inputs, outputs, dtype):
    """One whose h is there, and one whose h is made."""
    half = outputs // 2
    return (
        LowRankUpdate(0, torch.randn(rows, 3).to(dtype), torch.randn(half, 3).to(dtype), 0.6),
        LowRankUpdate(half, torch.zeros(rows, 5, dtype=dtype), torch.randn(outputs - half, 5).to(dtype), 1.7,
             torch.randn(5, inputs).to(dtype)),
    )  # fmt: skip


def assert_same_bits(matrix, rows, *, transposed):
    """With all that can be added, and alone: as of the dense W."""
    dense, dtype = matrix.dense(), matrix.dtype
    weight = dense.T if transposed else dense
    (inputs, outputs), size = weight.shape, float(dense.double().abs().max())
    assert size > 0
    x = gapped((rows, inputs), dtype, 1)
    bias, residual = gapped((outputs,), dtype, 2), gapped((rows, outputs), dtype, 3)
    updates = updates_of(rows, inputs, outputs, dtype)
    expected = dense_product(x, weight, bias, residual, None, updates)
    made = updates[1].h.clone()
    updates[1].h.fill_(torch.nan)
    out = gapped((rows, outputs), dtype, 4)
    assert dense_product(x, matrix, bias, residual, out, updates, transposed=transposed) is out
    assert torch.equal(out, expected) and torch.equal(updates[1].h, made) and marks_intact(out)
    alone = dense_product(x, matrix, transposed=transposed)
    assert torch.equal(alone, dense_product(x, weight))
    return x, alone


@pytest.mark.parametrize("kind", KINDS)
@for_each("transposed", [True, False])
@for_each("ordered", [False, True])
def test_every_type(dtype, kind, ordered, transposed):
    values, _ = block_shape(int(StorageType[kind]))
    columns = {1: 67, 32: 544, 256: 768}[values]
    matrix = matrix_of([(kind, 37)], columns, dtype, ordered=ordered)
    if not ordered:
        (part,) = matrix.parts
        right = torch.from_numpy(np.array(gguf.dequantize(part.blocks, StorageType[kind]), np.float32)).to(dtype)
        assert torch.equal(matrix.dense(), right)
    assert_same_bits(matrix, 41, transposed=transposed)


MIXED = [("Q4_K", 5), ("Q8_0", 33), ("Q6_K", 1), ("Q5_K", 66), ("MXFP4", 0), ("Q4_1", 31)]


@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", ""])
@pytest.mark.parametrize("columns", [256, 1280, LONGEST_PART, LONGEST_PART + 256, 3328])
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_parts_of_any_number_of_rows(dtype, rows, columns, transposed):
    """Pairs of rows straddle parts, parts of K end at whole blocks, and panels hold more than one."""
    assert_same_bits(matrix_of(MIXED, columns, dtype), rows, transposed=transposed)
    assert_same_bits(matrix_of(MIXED, columns, dtype, ordered=True), rows, transposed=transposed)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
def test_sums_in_parts_along_stored_rows(dtype, kind):
    assert_same_bits(matrix_of([(kind, 7), (kind, 2 * LONGEST_PART + 2)], 512, dtype), 40, transposed=False)


@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", ""])
def test_more_rows_than_wait_at_a_time(dtype, transposed):
    parts = [("Q4_0", 33)] if transposed else [("Q4_0", LONGEST_PART + 3)]
    x, y = assert_same_bits(
        matrix_of(parts, LONGEST_PART + 32 if transposed else 32, dtype), WAITING_ROWS + 37, transposed=transposed
    )
    matrix = matrix_of(parts, LONGEST_PART + 32 if transposed else 32, dtype)
    for count in (1, 31, 33):
        assert torch.equal(dense_product(x[-count:], matrix, transposed=transposed), y[-count:])


@pytest.mark.parametrize(
    ("rows", "outputs", "columns"), [(64, 600, 768), (64, 600, 1792), (1100, 160, 256), (40, 1539, 1280)], ids=str
)
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", ""])
@pytest.mark.parametrize("kind", ["Q6_K", "Q5_1"])
def test_any_number_of_threads_gives_the_same_bits(dtype, kind, rows, outputs, columns, transposed):
    """Threads begin within blocks."""
    matrix = matrix_of([(kind, outputs)], columns, dtype)
    x, alone = assert_same_bits(matrix, rows, transposed=transposed)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(dense_product(x, matrix, transposed=transposed), alone)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "Q4_K"])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", ""])
def test_scales_that_are_no_numbers(dtype, kind, transposed):
    matrix = matrix_of([(kind, 35)], 512, dtype)
    (part,) = matrix.parts
    _, size = block_shape(part.type_id)
    blocks = part.blocks.copy().reshape(-1, size)
    place = 208 if kind == "Q6_K" else 0
    blocks[3, place : place + 2] = 0, 0x7E  # NaN
    blocks[60, place : place + 2] = 0, 0x7C  # infinite
    matrix = QuantizedMatrix([replace(part, blocks=blocks.reshape(part.blocks.shape))], dtype)
    dense = matrix.dense()
    assert dense.isnan().any()
    x = torch.randn(9, 512 if transposed else 35).to(dtype)
    y, expected = dense_product(x, matrix, transposed=transposed), dense_product(x, dense.T if transposed else dense)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())


def both_ways(matrix, x, d_y):
    """As ops ask for it."""
    return frozen_linear(x, matrix), frozen_input_gradient(d_y, matrix)


def problem(matrix):
    rows, columns = matrix.shape
    return torch.randn(40, columns).to(matrix.dtype), torch.randn(40, rows).to(matrix.dtype)


def test_nothing_is_unpacked_to_memory(dtype, monkeypatch):
    monkeypatch.setattr(weight_tiles, "_SCRATCH", weight_tiles._Scratch())
    matrix = matrix_of(MIXED, 512, dtype)
    x, d_y = problem(matrix)
    found, expected = both_ways(matrix, x, d_y), both_ways(matrix.dense(), x, d_y)
    assert all(map(torch.equal, found, expected))
    assert not weight_tiles._SCRATCH.buffers
    for start, stop in ((0, 5), (3, 40), (38, 136)):
        part = matrix.part(start, stop)
        assert torch.equal(frozen_linear(x, part), expected[0][:, start:stop])


def in_another_order_of_columns(dtype):
    order = torch.from_numpy(np.random.default_rng(1).permutation(512))
    return QuantizedMatrix([replace(rows_of("Q4_K", 70, 512), column_order=order)], dtype)


@pytest.mark.parametrize(
    "made",
    [
        in_another_order_of_columns,
        lambda dtype: matrix_of([("IQ2_XS", 70)], 512, dtype),
        lambda dtype: matrix_of([("Q4_K", 3)] * (MOST_PARTS + 1), 512, dtype),
    ],
    ids=["columns in another order", "by the gguf package", "many parts"],
)
def test_what_it_does_not_know_is_unpacked_first(dtype, made):
    matrix = made(dtype)
    x, d_y = problem(matrix)
    assert dense_product(x, matrix, transposed=True) is None
    assert all(map(torch.equal, both_ways(matrix, x, d_y), both_ways(matrix.dense(), x, d_y)))


def test_another_dtype_is_none_of_its(dtype):
    matrix = matrix_of([("Q4_K", 70)], 512, torch.float32)
    assert dense_product(torch.randn(9, 512).to(dtype), matrix, transposed=True) is None


@pytest.mark.parametrize("wrong", [-1, 36])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", ""])
def test_rows_that_are_not_there(dtype, wrong, transposed):
    part = rows_of("Q4_K", 35, 512, ordered=True)
    part.order[7] = wrong
    matrix = QuantizedMatrix([part], dtype)
    with pytest.raises(ValueError, match="rows outside"):
        dense_product(torch.zeros(9, 512 if transposed else 35, dtype=dtype), matrix, transposed=transposed)
