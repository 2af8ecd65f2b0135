"""Products that give a row the same bits among few rows as among many, such that do not, and pieces that make them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backhand.kernels.dense_product import dense_product
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder import row_products
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.lower_layers import LowerLayers
from backhand.nn.decoder.row_products import RowProducts, disagreeing, keeps_rows, ways
from backhand.nn.decoder.weights import empty_weights
from backhand.ops import frozen_matrix
from backhand.ops.frozen_matrix import frozen_linear, library_product, products_by, tiles_of
from support.products_by_rows import ProductsByRows, by_library
from support.tiny_models import tiny_config

CONFIG = decoder_config(tiny_config("llama-biases", num_hidden_layers=1).to_dict())
SANDWICH = decoder_config(tiny_config("gemma3_text").to_dict())
NUMBERS = (9, 16, 48, 100, 112, 208, 304, 400, 448, 512, 624, 720, 816, 1024, 1300)
SHAPES = {
    "qkv": (960, 576, False),
    "output": (576, 576, True),
    "gate-up": (3072, 576, False),
    "down": (576, 1536, True),
}


def block(config=CONFIG, dtype=torch.bfloat16):
    weights = empty_weights(config, dtype).blocks[0]
    for tensor in vars(weights).values():
        if tensor is not None:
            tensor.normal_()
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [CONFIG, SANDWICH], ids=["joined", "sandwich"])
@pytest.mark.parametrize("rows", [16, 48, 64, 80, 320])
@pytest.mark.parametrize("library", [False, True], ids=["", "library"])
def test_here_they_do(rows, config, dtype, library, monkeypatch):
    if library:
        by_library(monkeypatch)
    assert keeps_rows(block(config, dtype), config, [rows], 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("outputs", "inputs", "joined"), SHAPES.values(), ids=SHAPES)
def test_what_is_not_looked_at_keeps_them(outputs, inputs, joined, dtype, monkeypatch):
    """Where products go by tiles of ours no library is looked at: there the numbers do agree."""
    weights, looked_at = block(dtype=dtype), []

    def looked(_multiply: object, tile: Tensor, *_rest: object, **_named: object) -> list[int]:
        looked_at.append(tile)
        return []

    monkeypatch.setattr(row_products, "disagreeing", looked)
    assert keeps_rows(weights, CONFIG, NUMBERS, 64)
    if not looked_at:
        weight = torch.randn(outputs, inputs).to(dtype)
        y = dense_product(torch.randn(16, inputs).to(dtype), weight.T)
        assert y is not None, "they do go by tiles"
        assert not disagreeing(frozen_linear, weight, NUMBERS, 64, bias=torch.randn(outputs).to(dtype), joined=joined)


@pytest.mark.parametrize("rows", [16, 48, 80, 320])
@pytest.mark.parametrize("product", [0, 1, 2, 3])
@pytest.mark.parametrize("place", ["first", "last"])
def test_one_bit_of_one_row_of_one_product_is_seen(rows, product, place, monkeypatch):
    by_library(monkeypatch)
    weights = block()
    changed = [weights.input, weights.output, weights.gate_up, weights.down][product]

    def other_among_many(x: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor:
        y = library_product(x, weight, *rest)
        if weight.data_ptr() == changed.data_ptr() and x.shape[0] == rows:
            element = y[0 if place == "first" else -1, 3]
            element.copy_(torch.nextafter(element, torch.tensor(torch.inf, dtype=y.dtype)))
        return y

    monkeypatch.setattr(row_products, "library_product", other_among_many)
    assert not keeps_rows(weights, CONFIG, [112, rows], 64)
    assert keeps_rows(weights, CONFIG, [112], 64)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of sizes that agree.


@pytest.mark.parametrize("rows", [1, 9, 16, 63, 64, 65, 100, 255, 256, 257, 816, 1000, 4096, 5000])
@pytest.mark.parametrize("reference", [1, 16, 64, 448, 1024])
def test_ways_hold_all_rows_and_end_in_one_that_is_always_there(rows, reference):
    found = ways(rows, reference)
    assert len(set(found)) == len(found)
    assert found[-1] == (reference,) * -(-rows // reference)
    for way in found:
        assert sum(way[:-1]) < rows <= sum(way) and min(way) > 0
    assert found[0] == (rows,) or len(found) == 1, "all at once, unless that costs more"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reference", [64, 448, 816])
@pytest.mark.parametrize(("outputs", "inputs", "joined"), SHAPES.values(), ids=SHAPES)
def test_of_this_machines_library(outputs, inputs, joined, reference, dtype):
    """With AMX, without pieces, some of these numbers end in other bits."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(max(NUMBERS), inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    residual = torch.randn(len(x), outputs, generator=generator).to(dtype) if joined else None
    pieces = RowProducts(reference)

    def product(rows: int) -> Tensor:
        return pieces(library_product, x[:rows], weight, None, None if residual is None else residual[:rows], None)

    whole = product(len(x))
    assert torch.equal(
        product(reference), library_product(x[:reference], weight, None, _first(residual, reference), None)
    )
    for rows in NUMBERS:
        assert torch.equal(product(rows), whole[:rows]), rows


def _first(x: Tensor | None, rows: int) -> Tensor | None:
    return None if x is None else x[:rows]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("reference", [64, 448, 816])
def test_of_a_library_whose_bits_follow_the_number_of_rows(reference, joined, biased):
    library = ProductsByRows(bounds=(48, 480))
    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(max(NUMBERS), 24, generator=generator), torch.randn(40, 24, generator=generator)
    residual = torch.randn(len(x), 40, generator=generator) if joined else None
    bias = torch.randn(40, generator=generator) if biased else None
    wanted = torch.cat(
        [library(x[row : row + reference], weight, bias, _part(residual, row, reference), None) for row in (0, 1)]
    )[:1]
    pieces = RowProducts(reference)
    everywhere = pieces(library, x, weight, bias, residual, None)
    assert torch.equal(everywhere[:1], wanted)
    differ = 0
    for rows in NUMBERS:
        y = pieces(library, x[:rows], weight, bias, _first(residual, rows), None)
        assert y.shape == (rows, 40) and torch.equal(y, everywhere[:rows])
        differ += not torch.equal(library(x[:rows], weight, bias, _first(residual, rows), None), y)
        library.sizes.clear()
        out = torch.full((rows, 60), torch.nan)
        assert torch.equal(pieces(library, x[:rows], weight, bias, _first(residual, rows), out[:, 10:50]), y)
        assert out[:, :10].isnan().all() and out[:, 50:].isnan().all()
        assert {library.kind(size) for size in library.sizes} == {library.kind(reference)}
        assert torch.equal(pieces(library, x[:rows], weight, bias, _first(residual, rows), out[:, :40].clone()), y)
    assert differ > 2, "without pieces some differ"


def _part(x: Tensor | None, start: int, rows: int) -> Tensor | None:
    return None if x is None else x[start : start + rows]


def test_frozen_products_go_through_them_tile_by_tile(monkeypatch):
    """Of a matrix in tiles, whose results are parts of a wider one."""
    library = ProductsByRows(bounds=(48,))
    monkeypatch.setattr(frozen_matrix, "library_product", library)
    x, weight = torch.randn(100, 24), torch.randn(200, 24)
    whole = frozen_linear(x, weight)
    with products_by(RowProducts(64)), tiles_of(64 * 24 * 4):
        assert torch.equal(frozen_linear(x[:32], weight), whole[:32])
    assert not torch.equal(frozen_linear(x[:32], weight), whole[:32])


# ---------------------------------------------------------------------------------------------------------------------
# A decoder that is told to.


def packed(lengths: tuple[int, ...]) -> PackedBatch:
    ids = torch.randint(3, 90, (sum(lengths),), generator=torch.Generator().manual_seed(5))
    return PackedBatch(ids, ids.roll(-1), lengths)


@pytest.mark.parametrize("classes", [True, False])
def test_rows_have_the_same_bits_below_the_layer_and_as_ever_above(classes, monkeypatch):
    config = decoder_config(tiny_config("llama-biases", num_hidden_layers=3).to_dict())
    weights = empty_weights(config, torch.float32)
    for module in (*weights.blocks, weights):
        for tensor in vars(module).values():
            if isinstance(tensor, Tensor):
                tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(6))
    decoder = Decoder(config, weights)
    library = ProductsByRows(bounds=(48,) if classes else ())
    for module in (frozen_matrix, row_products):
        monkeypatch.setattr(module, "library_product", library)
    few, many = packed((20, 12)), packed((20, 12, 40))
    before = decoder.logits(few.input_ids, few.document_lengths)
    alike = torch.equal(decoder.entering(few, 2), decoder.entering(many, 2)[:32])
    assert alike is not classes
    lower = LowerLayers(decoder)
    lower.settle_rows(2, 64)
    assert lower.keeps_rows(32)
    assert torch.equal(decoder.entering(few, 2), decoder.entering(many, 2)[:32])
    library.sizes.clear()
    decoder.token_losses(few)
    assert library.sizes.count(32) == (4 if classes else 12) + 1, "the head's, and the last layer's or each layer's"
    assert torch.equal(decoder.logits(few.input_ids, few.document_lengths), before)
