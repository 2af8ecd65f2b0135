"""Products that give a row the same bits among few rows as among many, and such that do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backhand.kernels.dense_product import dense_product
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder import lower_layers
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.lower_layers import LowerLayers, disagreeing, keeps_rows
from backhand.nn.decoder.weights import empty_weights
from backhand.ops import frozen_matrix
from backhand.ops.frozen_matrix import frozen_linear, library_product
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
    weights = block(config, dtype)
    kept = keeps_rows(weights, config, [rows], 64)
    # MKL's float32 kernels for AVX2 add up a few rows in another order: they are not kept there, and that is right.
    assert kept or (dtype == torch.float32 and another_order(weights, rows, 64))


def another_order(weights, rows, usual):
    """Whether some product of the block gives the same rows other bits, by itself."""
    few, many = sorted((rows, usual))
    for weight in (weights.input, weights.output, weights.gate_up, weights.down):
        x = torch.randn(many, weight.shape[1], dtype=weight.dtype)
        if not torch.equal(frozen_linear(x, weight)[:few], frozen_linear(x[:few].clone(), weight)):
            return True
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("outputs", "inputs", "joined"), SHAPES.values(), ids=SHAPES)
def test_what_is_not_looked_at_keeps_them(outputs, inputs, joined, dtype, monkeypatch):
    """Where products go by tiles of ours no library is looked at: there the numbers do agree."""
    weights, looked_at = block(dtype=dtype), []

    def looked(_multiply: object, tile: Tensor, *_rest: object, **_named: object) -> list[int]:
        looked_at.append(tile)
        return []

    monkeypatch.setattr(lower_layers, "disagreeing", looked)
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

    monkeypatch.setattr(lower_layers, "library_product", other_among_many)
    assert not keeps_rows(weights, CONFIG, [112, rows], 64)
    assert keeps_rows(weights, CONFIG, [112], 64)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("reference", [64, 448, 816])
def test_of_a_library_whose_bits_follow_the_number_of_rows(reference, joined, biased):
    library = ProductsByRows(bounds=(48, 480))
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(4))
    bias = torch.randn(40) if biased else None
    found = disagreeing(library, weight, NUMBERS, reference, bias=bias, joined=joined)
    assert found == [rows for rows in NUMBERS if library.kind(rows) != library.kind(reference)]
    assert 2 < len(found) < len(NUMBERS)


def packed(lengths: tuple[int, ...]) -> PackedBatch:
    ids = torch.randint(3, 90, (sum(lengths),), generator=torch.Generator().manual_seed(5))
    return PackedBatch(ids, ids.roll(-1), lengths)


def test_a_decoder_tells_for_which_batches_rows_keep_their_bits(monkeypatch):
    config = decoder_config(tiny_config("llama-biases", num_hidden_layers=3).to_dict())
    weights = empty_weights(config, torch.float32)
    for module in (*weights.blocks, weights):
        for tensor in vars(module).values():
            if isinstance(tensor, Tensor):
                tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(6))
    decoder, library = Decoder(config, weights), ProductsByRows(bounds=(48,))
    for module in (frozen_matrix, lower_layers):
        monkeypatch.setattr(module, "library_product", library)
    lower = LowerLayers(decoder)
    lower.compare_with(64)
    few, many, more = packed((20, 12)), packed((20, 12, 40)), packed((20, 12, 40, 9))
    states = [lower.entering(batch, 2)[:32] for batch in (few, many, more)]
    assert [lower.keeps_rows(len(batch.input_ids)) for batch in (few, many, more)] == [False, True, True]
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[0], states[1])
