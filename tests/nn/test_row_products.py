"""Products that give a row the same bits among few rows as among many, and such that do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backhand.nn.decoder import row_products
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.row_products import keeps_rows
from backhand.nn.decoder.weights import empty_weights
from backhand.ops.frozen_matrix import frozen_linear
from support.tiny_models import tiny_config

CONFIG = decoder_config(tiny_config("llama-biases", num_hidden_layers=1).to_dict())
SANDWICH = decoder_config(tiny_config("gemma3_text").to_dict())


def block(config=CONFIG, dtype=torch.bfloat16):
    weights = empty_weights(config, dtype).blocks[0]
    for tensor in vars(weights).values():
        if tensor is not None:
            tensor.normal_()
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [CONFIG, SANDWICH], ids=["joined", "sandwich"])
@pytest.mark.parametrize("rows", [16, 48, 64, 80, 320])
def test_here_they_do(rows, config, dtype):
    assert keeps_rows(block(config, dtype), config, rows)


@pytest.mark.parametrize("rows", [16, 48, 80, 320])
@pytest.mark.parametrize("product", [0, 1, 2, 3])
@pytest.mark.parametrize("place", ["first", "last"])
def test_one_bit_of_one_row_of_one_product_is_seen(rows, product, place, monkeypatch):
    weights = block()
    of_block = [weights.input, weights.output, weights.gate_up, weights.down]

    def other_among_many(x: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor:
        y = frozen_linear(x, weight, *rest)
        if weight is of_block[product] and x.shape[0] == rows:
            element = y[0 if place == "first" else -1, 3]
            element.copy_(torch.nextafter(element, torch.tensor(torch.inf, dtype=y.dtype)))
        return y

    monkeypatch.setattr(row_products, "frozen_linear", other_among_many)
    assert not keeps_rows(weights, CONFIG, rows)
    assert keeps_rows(weights, CONFIG, 112)
