from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as StorageType

from backhand.kernels.builds import load, usable, using
from backhand.kernels.dequantize import block_shape
from backhand.kernels.quantized_matrix import QuantizedMatrix, StoredRows
from backhand.ops.frozen_matrix import frozen_linear
from tests.support.for_each import for_each

KINDS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
    *("F16", "BF16"),
)


def stored(name, rows, columns, *, order=None, seed=0):
    """Random blocks whose numbers are all finite."""
    type_id = int(StorageType[name])
    values, size = block_shape(type_id)
    blocks = np.random.default_rng(seed).integers(0, 128, (rows, columns // values * size), dtype=np.uint8) & 0x3B
    return StoredRows(blocks, type_id, order)


def numbers(part):
    found = torch.from_numpy(gguf.dequantize(part.blocks, StorageType(part.type_id)))
    return found if part.order is None else found[part.order]


PARTS = (
    stored("Q4_K", 5, 512, seed=1),
    stored("Q6_K", 3, 512, order=torch.tensor([2, 0, 1]), seed=2),
    stored("Q8_0", 4, 512, order=torch.tensor([3, 1]), seed=3),
)
EXPECTED = torch.cat([numbers(part) for part in PARTS])


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def matrix(request):
    return QuantizedMatrix(PARTS, request.param)


def test_shape_and_bytes(matrix):
    assert matrix.shape == (10, 512)
    assert matrix.stored_bytes == 2 * (5 * 144 + 3 * 210) + 2 * 16 * 34


def test_every_range_of_rows(matrix):
    expected = EXPECTED.to(matrix.dtype)
    for start in range(11):
        for stop in range(start, 11):
            out = torch.empty(stop - start, 512, dtype=matrix.dtype)
            assert torch.equal(matrix.rows_into(start, stop, out), expected[start:stop])


def test_every_range_of_columns(matrix):
    expected = EXPECTED.to(matrix.dtype)
    for start, stop in ((0, 256), (256, 512), (0, 512), (256, 256)):
        out = torch.empty(10, stop - start, dtype=matrix.dtype)
        assert torch.equal(matrix.columns_into(start, stop, out), expected[:, start:stop])


def test_rows_by_id(matrix):
    expected = EXPECTED.to(matrix.dtype)
    ids = torch.tensor([[9, 0, 5], [5, 7, 8]])
    assert torch.equal(matrix.rows(ids), expected[ids])
    assert torch.equal(matrix.rows(ids.int()), expected[ids])
    assert matrix.rows(ids[:0]).shape == (0, 3, 512)
    for single in PARTS:
        alone = QuantizedMatrix([single], matrix.dtype)
        assert torch.equal(alone.rows(torch.tensor([1, 0, 1])), numbers(single).to(matrix.dtype)[[1, 0, 1]])


@pytest.mark.parametrize("ids", [[-1], [10], [0, 2**40]])
def test_ids_that_are_not_there(matrix, ids):
    with pytest.raises(ValueError, match="a matrix with 10"):
        matrix.rows(torch.tensor(ids))


@pytest.mark.parametrize("sizes", [(5, 3, 2), (4, 4, 2), (10,), (0, 10), (1,) * 10, (7, 0, 3)])
def test_split_shares_the_blocks(matrix, sizes):
    members = matrix.split(sizes)
    assert [member.shape for member in members] == [(size, 512) for size in sizes]
    assert torch.equal(torch.cat([member.dense() for member in members]), EXPECTED.to(matrix.dtype))
    assert members[0].parts[0].blocks.base is not None
    assert np.shares_memory(members[-1].parts[-1].blocks, PARTS[-1].blocks)


def test_split_must_add_up(matrix):
    with pytest.raises(ValueError, match="10 rows"):
        matrix.split((5, 4))


def test_dense_in_any_dtype_is_rounded_once(matrix):
    assert torch.equal(matrix.dense(), EXPECTED.to(matrix.dtype))
    assert torch.equal(QuantizedMatrix(matrix.parts, torch.float64).dense(), EXPECTED.double())


def test_parts_of_different_widths_cannot_be_stacked():
    with pytest.raises(ValueError, match="256, 512"):
        QuantizedMatrix([stored("Q4_K", 2, 512), stored("Q4_K", 2, 256)], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", usable())
@for_each("kind", KINDS)
def test_a_new_tokens_product_has_the_bits_of_the_dense_one(build, kind, dtype):
    """Whether a block is unpacked in registers or through memory, for one row or for several."""
    order = torch.tensor([10, 3, 3, 0, 7, 1])
    matrix = QuantizedMatrix([stored(kind, 11, 1536), stored(kind, 11, 1536, order=order, seed=1)], dtype)
    x = torch.randn(5, 1536, generator=torch.Generator().manual_seed(0)).to(dtype)
    with using(load(build)):
        several = frozen_linear(x, matrix)
        assert torch.equal(several, frozen_linear(x, matrix.dense()))
        for row in range(5):
            assert torch.equal(frozen_linear(x[row : row + 1], matrix)[0], several[row])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "IQ4_NL"])
@pytest.mark.parametrize("build", usable())
def test_a_scale_that_is_not_finite_shows(build, kind):
    part = stored(kind, 3, 1536)
    part.blocks[1, :2] = (0x00, 0x7C)  # infinity
    with using(load(build)):
        y = frozen_linear(torch.ones(1, 1536, dtype=torch.bfloat16), QuantizedMatrix([part], torch.bfloat16))
    assert y.isfinite().tolist() == [[True, False, True]]
