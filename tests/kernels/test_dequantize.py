"""Bits: on every path that this machine can take, those of the gguf package, and those rounded once by torch."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as StorageType
from hypothesis import given
from hypothesis import strategies as st

from backhand.errors import ArtifactError
from backhand.kernels.builds import load, usable, using
from backhand.kernels.dequantize import block_shape, dequantize, is_compiled, type_name

COMPILED = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
)
BY_GGUF = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0")
PATHS = (*usable(), None)
"""Builds of the library, and torch alone."""

DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def path_of(name):
    return using(None if name is None else load(name))


def random_bytes(type_id, rows, row_blocks, seed=0):
    """Every field of every block takes any value: scales that are infinite, no number, subnormal or negative too."""
    return np.random.default_rng(seed).integers(0, 256, (rows, row_blocks * block_shape(type_id)[1]), dtype=np.uint8)


def by_gguf(source, type_id):
    if source.size == 0:
        return torch.empty(len(source), 0)
    if type_id == StorageType.F32:
        return torch.from_numpy(source.view(np.float32).copy())
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.dequantize(source, StorageType(type_id)).copy())


def same_bits(found, expected):
    """Equal bits, any NaN for a NaN."""
    missing = expected.isnan()
    bits = DTYPES[expected.dtype]
    return torch.equal(found.isnan(), missing) and torch.equal(
        found.view(bits)[~missing], expected.to(found.dtype).view(bits)[~missing]
    )


def expanded(source, type_id, dtype, **options):
    values, size = block_shape(type_id)
    rows = len(options["row_ids"]) if options.get("row_ids") is not None else len(source)
    columns = options.pop("columns", source.shape[1] // size * values)
    # What lies between and around the rows of the destination stays as it is.
    around = torch.full((rows + 2, columns + 7), 77.0, dtype=dtype)
    out = around[1 : rows + 1, 3 : columns + 3]
    assert dequantize(source, type_id, out, **options) is out
    assert (around[0] == 77).all() and (around[-1] == 77).all()
    assert (around[:, :3] == 77).all() and (around[:, columns + 3 :] == 77).all()
    return out.clone()


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_blocks_have_the_bits_of_the_gguf_package_on_every_path(name, dtype):
    type_id = int(StorageType[name])
    source = random_bytes(type_id, 37, max(3, 96 // block_shape(type_id)[0]) | 1)
    expected = by_gguf(source, type_id).to(dtype)
    assert expected.isfinite().any()
    assert expected.isnan().any() or name == "MXFP4"
    found = []
    for path in PATHS:
        with path_of(path):
            assert is_compiled(type_id) == (path is not None)
            found.append(expanded(source, type_id, dtype))
        assert same_bits(found[-1], expected), path
    bits = DTYPES[dtype]
    assert all(torch.equal(one.view(bits), found[0].view(bits)) for one in found), "NaNs are the same on all paths too"


@pytest.mark.parametrize("name", COMPILED)
def test_each_byte_of_a_block_alone_takes_each_bit(name):
    """One block a row, all of it plain but for one byte."""
    type_id = int(StorageType[name])
    _, size = block_shape(type_id)
    # Scales of 1.0 in float16, where a type has some there; the rest any number.
    plain = np.resize(np.array([0x00, 0x3C], np.uint8), size)
    each = np.array([0, 255, *(1 << bit for bit in range(8)), *(255 - (1 << bit) for bit in range(8))])
    source = np.tile(plain, (size * len(each), 1))
    source[np.arange(size * len(each)), np.repeat(np.arange(size), len(each))] = np.tile(each, size)
    for dtype in DTYPES:
        expected = by_gguf(source, type_id).to(dtype)
        for path in usable():
            with path_of(path):
                assert same_bits(expanded(source, type_id, dtype), expected), (path, dtype)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("path", PATHS)
def test_rows_columns_and_order(name, path):
    type_id = int(StorageType[name])
    values, _ = block_shape(type_id)
    source = random_bytes(type_id, 11, 7, seed=1)
    ids = torch.tensor([10, 0, 3, 3, 9])
    with path_of(path):
        whole = expanded(source, type_id, torch.float32).view(torch.int32)
        part = expanded(source, type_id, torch.float32, columns=3 * values, first_value=2 * values, row_ids=ids)
        first = torch.empty(4, values)
        dequantize(source, type_id, first)
    assert torch.equal(part.view(torch.int32), whole[ids, 2 * values : 5 * values])
    assert torch.equal(first.view(torch.int32), whole[:4, :values])


@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q5_1", "Q4_K", "Q6_K"])
def test_sizes_and_threads_change_no_bit(name):
    """Rows long enough for several pieces a row, and short enough for several rows a piece; 1 and 3 threads."""
    type_id = int(StorageType[name])
    values, _ = block_shape(type_id)
    before = torch.get_num_threads()
    try:
        for rows, columns in ((1, 17_152), (3, 8_448), (129, 256), (1, 256)):
            source = random_bytes(type_id, rows, columns // values, seed=rows)
            expected = by_gguf(source, type_id)
            for path in usable():
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    with path_of(path):
                        assert same_bits(expanded(source, type_id, torch.float32), expected), (rows, path, threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_single_numbers_need_no_whole_vector(name, count):
    type_id = int(StorageType[name])
    source = random_bytes(type_id, 3, count, seed=count)
    for dtype in DTYPES:
        for path in PATHS:
            with path_of(path):
                assert same_bits(expanded(source, type_id, dtype), by_gguf(source, type_id).to(dtype)), path


@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "MXFP4"])
def test_any_number_of_small_blocks(name, blocks):
    type_id = int(StorageType[name])
    source = random_bytes(type_id, 2, blocks, seed=blocks)
    for path in usable():
        with path_of(path):
            assert same_bits(expanded(source, type_id, torch.bfloat16), by_gguf(source, type_id).bfloat16()), path


@pytest.mark.parametrize("path", PATHS)
def test_no_rows_and_no_columns(path):
    with path_of(path):
        assert expanded(random_bytes(12, 0, 3), 12, torch.bfloat16).shape == (0, 768)
        assert expanded(random_bytes(12, 3, 0), 12, torch.bfloat16).shape == (3, 0)
        none = torch.empty(0, dtype=torch.int64)
        assert expanded(random_bytes(12, 3, 1), 12, torch.float32, row_ids=none).shape == (0, 256)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_the_float32_numbers(path, dtype):
    source = random_bytes(12, 5, 3)
    with path_of(path):
        wide = expanded(source, 12, torch.float32)
        ids = torch.tensor([4, 1])
        assert torch.equal(expanded(source, 12, dtype).nan_to_num(), wide.to(dtype).nan_to_num())
        some = expanded(source, 12, dtype, row_ids=ids, columns=256, first_value=512)
        assert torch.equal(some.nan_to_num(), wide[ids, 512:].to(dtype).nan_to_num())


@pytest.mark.parametrize("name", BY_GGUF)
def test_other_types_go_through_the_gguf_package(name):
    type_id = int(StorageType[name])
    source = random_bytes(type_id, 5, 2)
    assert not is_compiled(type_id)
    for dtype in DTYPES:
        assert same_bits(expanded(source, type_id, dtype), by_gguf(source, type_id).to(dtype))


def test_a_type_without_a_dequantisation_says_so():
    with pytest.raises(ArtifactError, match="Q8_K") as caught:
        expanded(random_bytes(int(StorageType.Q8_K), 2, 1), int(StorageType.Q8_K), torch.float32)
    assert "Q4_K_M" in str(caught.value)


def test_an_unknown_type_says_so():
    with pytest.raises(ArtifactError, match="type 4711"):
        block_shape(4711)
    assert type_name(12) == "Q4_K"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ids", [[0, 5], [-1], [2**40]])
def test_a_row_that_is_not_there_is_an_error_and_nothing_is_read(path, ids):
    with path_of(path), pytest.raises(ValueError, match="outside the 5"):
        expanded(random_bytes(12, 5, 1), 12, torch.float32, row_ids=torch.tensor(ids))


def test_what_does_not_fit_is_an_error():
    source = random_bytes(12, 5, 2)
    out = torch.empty(5, 512)
    with pytest.raises(ValueError, match="not whole blocks"):
        dequantize(source, 12, out[:, :128])
    with pytest.raises(ValueError, match="not whole blocks"):
        dequantize(source, 12, out[:, :256], first_value=-256)
    with pytest.raises(ValueError, match="no such part"):
        dequantize(source, 12, out, first_value=256)
    with pytest.raises(ValueError, match="no such part"):
        dequantize(source, 12, torch.empty(6, 512))
    with pytest.raises(ValueError, match="destination"):
        dequantize(source, 12, torch.empty(512, 5).T)
    with pytest.raises(ValueError, match="contiguous"):
        dequantize(source[:, ::2], 12, out)
    with pytest.raises(ValueError, match="int64"):
        dequantize(source, 12, out, row_ids=torch.arange(5, dtype=torch.int32))
    with pytest.raises(ValueError, match="int64"):
        dequantize(source, 12, out, row_ids=torch.arange(10)[::2])
    with pytest.raises(ValueError, match="int64"):
        dequantize(source, 12, out, row_ids=torch.arange(4))


@given(name=st.sampled_from(COMPILED), data=st.data())
def test_any_bytes_in_any_shape(name, data):
    type_id = int(StorageType[name])
    values, size = block_shape(type_id)
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    source = np.frombuffer(data.draw(st.binary(min_size=rows * blocks * size, max_size=rows * blocks * size)), np.uint8)
    source = source.reshape(rows, blocks * size)
    first = data.draw(st.integers(0, blocks - 1))
    expected = by_gguf(source, type_id)[:, first * values :]
    for path in usable():
        with path_of(path):
            for dtype in DTYPES:
                found = expanded(source, type_id, dtype, columns=expected.shape[1], first_value=first * values)
                assert same_bits(found, expected.to(dtype)), (path, dtype)
