"""A quantized matrix gives the bits of the dense one, whatever the tiles, the path and the dtype."""

from __future__ import annotations

import mmap

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as StorageType

from backhand.kernels import large_pages
from backhand.kernels.builds import load, usable, using
from backhand.kernels.dense_product import LowRankUpdate, amx_available
from backhand.kernels.library import proving_kernels
from backhand.kernels.quantized_matrix import QuantizedMatrix, StoredRows
from backhand.ops import weight_tiles
from backhand.ops.frozen_matrix import frozen_input_gradient, frozen_linear, frozen_rows
from backhand.ops.weight_tiles import (
    column_tiles,
    frozen_dense,
    frozen_split,
    frozen_tiles,
    row_tiles,
    sums_over_rows,
    tiles_of,
)
from backhand.verify.cases.frozen_matrix import CASES, random_blocks
from backhand.verify.scaffold import Draw
from tests.support.for_each import for_each
from tests.support.products_by_rows import by_library

DTYPES = (torch.float32, torch.bfloat16)


def pair(parts, columns, dtype, *, ordered=False):
    """The same matrix quantized and dense."""
    draw = Draw(f"{parts} {columns}")
    made, dense = [], []
    for name, rows in parts:
        blocks = random_blocks(draw, name, rows, columns)
        order = torch.randperm(rows, generator=draw.generator) if ordered else None
        made.append(StoredRows(blocks, int(StorageType[name]), order))
        numbers = torch.from_numpy(np.array(gguf.dequantize(blocks, StorageType[name]), np.float32))
        dense.append(numbers if order is None else numbers[order])
    return QuantizedMatrix(made, dtype), torch.cat(dense).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_bytes", [1, 100_000, 400_000, 1 << 40])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_products_have_the_bits_of_the_dense_matrix(dtype, tile_bytes, rows):
    quantized, dense = pair([("Q4_K", 130), ("Q6_K", 65), ("Q5_0", 133)], 768, dtype, ordered=True)
    x, d_y = torch.randn(rows, 768).to(dtype), torch.randn(rows, 328).to(dtype)
    bias, residual = torch.randn(328).to(dtype), torch.randn(rows, 328).to(dtype)
    with tiles_of(tile_bytes):
        assert (len(row_tiles(dense)) > 1) == (tile_bytes < 1 << 40)
        for options in ({}, {"bias": bias}, {"residual": residual}, {"bias": bias, "residual": residual}):
            expected = frozen_linear(x, dense, **options)
            assert torch.equal(frozen_linear(x, quantized, **options), expected)
            out = torch.empty_like(expected)
            assert frozen_linear(x, quantized, **options, out=out) is out
            assert torch.equal(out, expected)
        expected = frozen_input_gradient(d_y, dense)
        assert torch.equal(frozen_input_gradient(d_y, quantized), expected)
        out = torch.empty_like(expected)
        assert frozen_input_gradient(d_y, quantized, out=out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", [*usable(), None])
@pytest.mark.parametrize("rows", [2, 9])
def test_products_have_the_same_bits_on_every_path(dtype, path, rows):
    quantized, dense = pair([("Q4_1", 70), ("IQ2_XS", 9), ("Q3_K", 57)], 512, dtype, ordered=rows == 2)
    x, d_y = torch.randn(rows, 512).to(dtype), torch.randn(rows, 136).to(dtype)
    with using(None if path is None else load(path)), tiles_of(1):
        assert torch.equal(frozen_linear(x, quantized), frozen_linear(x, dense))
        assert torch.equal(frozen_input_gradient(d_y, quantized), frozen_input_gradient(d_y, dense))


def updates_of(rows, sizes, inputs, dtype, *, shrink):
    """Leave out every second member of a group, with h computed from x or given."""
    updates, column = [], 0
    for place, size in enumerate(sizes):
        if place % 2 == 0:
            rank = 3 + 5 * place
            h, factor = torch.randn(rows, rank).to(dtype), torch.randn(size, rank).to(dtype)
            updates.append(
                LowRankUpdate(column, h, factor, 0.6 + place, torch.randn(rank, inputs).to(dtype) if shrink else None)
            )
        column += size
    return updates


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("path", [*usable(), None])
@for_each("tile_bytes", [1, 400_000, 1 << 40])
@for_each("shrink", [False, True])
@for_each("rows", [5, 40])
def test_products_with_terms_have_the_bits_of_the_dense_matrix(dtype, path, tile_bytes, shrink, rows):
    quantized, dense = pair([("Q4_K", 70), ("Q6_K", 59)], 512, dtype)
    x, d_y = torch.randn(rows, 512).to(dtype), torch.randn(rows, 129).to(dtype)
    updates = updates_of(rows, (50, 9, 70), 512, dtype, shrink=shrink and rows > 8)
    back = [LowRankUpdate(0, torch.randn(rows, 7).to(dtype), torch.randn(7, 512).to(dtype), transposed=True)]
    with using(None if path is None else load(path)), proving_kernels(), tiles_of(tile_bytes):
        expected, made = frozen_linear(x, dense, updates=updates), [update.h.clone() for update in updates]
        for update, h in zip(updates, made, strict=True):
            if update.lora_A is not None:
                assert (h.double() - x.double() @ update.lora_A.double().T).norm() < 1e-2 * h.double().norm()
                update.h.fill_(torch.nan)
        assert torch.equal(frozen_linear(x, quantized, updates=updates), expected)
        assert all(torch.equal(update.h, h) for update, h in zip(updates, made, strict=True))
        gradient = frozen_input_gradient(d_y, dense, updates=back)
        assert torch.equal(frozen_input_gradient(d_y, quantized, updates=back), gradient)
        if not amx_available(dtype):
            return
        separate = frozen_linear(x, dense)
    for update in updates:
        place = slice(update.column, update.column + len(update.factor))
        separate[:, place] += update.scaling * (update.h.double() @ update.factor.double().T).to(dtype)
    assert (expected.double() - separate.double()).norm() < 2e-2 * separate.double().norm()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_one_tile_is_the_plain_product(dtype, monkeypatch):
    by_library(monkeypatch)
    weight, x = torch.randn(11, 37).to(dtype), torch.randn(9, 37).to(dtype)
    d_y, bias, residual = torch.randn(9, 11).to(dtype), torch.randn(11).to(dtype), torch.randn(9, 11).to(dtype)
    assert torch.equal(frozen_linear(x, weight), x @ weight.T)
    assert torch.equal(frozen_linear(x, weight, bias), torch.addmm(bias, x, weight.T))
    assert torch.equal(frozen_linear(x, weight, None, residual), torch.addmm(residual, x, weight.T))
    assert torch.equal(frozen_linear(x, weight, bias, residual), torch.addmm(residual, x, weight.T) + bias)
    assert torch.equal(frozen_input_gradient(d_y, weight), d_y @ weight)


def test_rows_split_dense_and_tiles():
    quantized, dense = pair([("Q4_0", 130), ("Q8_0", 70)], 96, torch.bfloat16)
    ids = torch.tensor([[199, 0], [130, 129]])
    assert torch.equal(frozen_rows(quantized, ids), frozen_rows(dense, ids))
    for one, other in zip(frozen_split(quantized, (100, 100)), frozen_split(dense, (100, 100)), strict=True):
        assert torch.equal(frozen_dense(one), other)
    assert frozen_dense(dense) is dense
    with tiles_of(1):
        for weight in (quantized, dense):
            tiles = [(rows, tile.clone()) for rows, tile in frozen_tiles(weight)]
            assert [rows for rows, _ in tiles] == [slice(0, 64), slice(64, 128), slice(128, 192), slice(192, 200)]
            assert torch.equal(torch.cat([tile for _, tile in tiles]), dense)


@pytest.mark.parametrize("shape", [(1, 256), (64, 256), (65, 512), (1000, 4096), (4096, 1000), (0, 256), (3, 0)])
@pytest.mark.parametrize("tile_bytes", [1, 50_000, 1_000_000, 1 << 40])
def test_tiles_cover_the_matrix_once_at_whole_edges(shape, tile_bytes):
    weight = torch.empty(shape, dtype=torch.bfloat16)
    with tiles_of(tile_bytes):
        for tiles, count, edge, across in (
            (row_tiles(weight), shape[0], 64, shape[1]),
            (column_tiles(weight), shape[1], 256, shape[0]),
        ):
            assert [tile.start for tile in tiles] == [0, *(tile.stop for tile in tiles[:-1])]
            assert tiles[-1].stop == count
            assert all(tile.start % edge == 0 for tile in tiles)
            widths = [tile.stop - tile.start for tile in tiles]
            assert max(widths) * across * 2 <= max(tile_bytes, edge * across * 2)
            assert len(tiles) == 1 or min(widths) > 0


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((17_920, 1536), 4480), ((4096, 14_336), 2048), ((2048, 8192), 2048), ((1000, 65_536), 512), ((9, 256), 9)],
)
def test_rows_are_taken_in_parts(shape, rows):
    """16 MB, or 2,048 rows where these are more, and never more than 64 MB."""
    assert row_tiles(torch.empty(shape, dtype=torch.bfloat16, device="meta"))[0] == slice(0, rows)


@pytest.mark.parametrize(
    ("shape", "dtype", "by_rows"),
    [
        ((49_152, 576), torch.float32, True),  # columns 256 at a time, 48 MB
        ((49_152, 576), torch.bfloat16, False),  # rounded once a tile
        ((49_152, 256), torch.float32, False),  # one tile
        ((9728, 896), torch.float32, False),  # likewise, with all columns
        ((17_920, 1536), torch.float32, False),  # two of 768 columns
        ((576, 100_000), torch.float32, False),  # more columns than rows
        ((34_000, 34_000), torch.float64, False),
    ],
)
def test_gradients_are_sums_over_rows_where_column_tiles_are_narrow(shape, dtype, by_rows):
    assert sums_over_rows(torch.empty(shape, dtype=dtype, device="meta")) is by_rows


@pytest.mark.parametrize("name", ["more rows than columns, in several tiles", "more dense rows than columns, in tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cases_for_sums_over_rows_go_by_rows(name, dtype):
    (case,) = (case for case in CASES if case.name == name)
    shape = case.tensors["d_y"].shape[-1], case.tensors["x"].shape[-1]
    weight = torch.empty(shape, dtype=dtype, device="meta")
    with tiles_of(1):
        assert sums_over_rows(weight)
        assert len(row_tiles(weight)) > 2


def test_a_tile_is_in_large_pages(monkeypatch):
    by_library(monkeypatch)
    monkeypatch.setattr(weight_tiles, "_SCRATCH", weight_tiles._Scratch())
    quantized, dense = pair([("Q8_0", 2048)], 1024, torch.bfloat16)
    x = torch.randn(9, 1024).bfloat16()
    assert torch.equal(frozen_linear(x, quantized), frozen_linear(x, dense))
    (buffer,) = weight_tiles._SCRATCH.buffers.values()
    assert buffer.shape == (2048 * 1024,)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert buffer.data_ptr() % (2 << 20) == 0
    weight_tiles.drop_scratch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_pages.mmap, "mmap", _no_room)
        assert torch.equal(frozen_linear(x, quantized), frozen_linear(x, dense))


def _no_room(*_arguments, **_options):
    raise OSError(12, "Cannot allocate memory")


def test_a_quantized_matrix_is_never_unpacked_in_full(monkeypatch):
    by_library(monkeypatch)
    monkeypatch.setattr(weight_tiles, "_SCRATCH", weight_tiles._Scratch())
    quantized, _ = pair([("Q4_0", 512)], 2048, torch.bfloat16)
    with tiles_of(300_000):
        frozen_linear(torch.randn(3, 2048).bfloat16(), quantized)
        frozen_input_gradient(torch.randn(3, 512).bfloat16(), quantized)
    (buffer,) = weight_tiles._SCRATCH.buffers.values()
    assert buffer.numel() * 2 <= 300_000
