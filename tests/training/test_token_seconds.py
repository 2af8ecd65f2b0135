"""A token's time in training, by a clock that is told how long each piece takes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.weights import empty_weights, named_views
from backhand.training.memory import token_seconds
from backhand.training.memory.token_seconds import TokenSeconds, matrices_of, numbers_in_blocks
from support.tiny_models import tiny_config


class Ticking:
    """A clock that moves by the values of each product."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        real = token_seconds.frozen_linear

        def ticking(x: Tensor, weight: Tensor) -> Tensor:
            self.now += len(x) * weight.numel()
            return real(x, weight)

        monkeypatch.setattr(token_seconds, "frozen_linear", ticking)

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("rest", [5, -5])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_a_token_takes_its_products_and_the_rest(family: str, rest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiplication takes 1; whatever else, 5 for each number in a block, and 1000 for a token once."""
    clock = Ticking(monkeypatch)

    def products(matrices: token_seconds.Matrices) -> int:
        return sum(rows * columns * count for (rows, columns), count in matrices.items())

    def loss_and_gradients(model: Decoder, batch: PackedBatch, *_: object) -> None:
        own = products(matrices_of(model.config)) + rest * numbers_in_blocks(model.config)
        clock.now += len(batch.input_ids) * (own + 1000)

    monkeypatch.setattr(Decoder, "loss_and_gradients", loss_and_gradients)
    config = decoder_config(tiny_config(family, num_hidden_layers=4).to_dict())
    wanted = products(matrices_of(config)) + config.vocab_size * config.hidden_size
    wanted += max(0, rest) * numbers_in_blocks(config)
    here = TokenSeconds(torch.float32, clock)
    assert here.of(config) * torch.get_num_threads() == pytest.approx(wanted, rel=1e-9)
    before = clock.now
    assert here.of(config) > 0 and clock.now == before, "nothing is measured twice"


def test_layers_count_by_their_own_sizes_and_experts_as_far_as_they_are_chosen() -> None:
    """Every matrix of a model of several kinds of layers, of experts the chosen part of each stack."""
    for family in ("lfm2", "qwen3_5_text", "qwen3_moe", "mixtral", "gpt_oss"):
        config = decoder_config(tiny_config(family).to_dict())
        wanted, of_experts = 0, 0
        for name, view in named_views(empty_weights(config, torch.float32, "meta"), config):
            if name.startswith("model.layers.") and len(view.shape) == 2:
                wanted += 0 if ".experts." in name else math.prod(view.shape)
                of_experts += math.prod(view.shape) if ".experts." in name else 0
        if config.mixture is not None:
            wanted += of_experts * config.mixture.chosen // config.mixture.experts
        found = sum(rows * columns * count for (rows, columns), count in matrices_of(config).items())
        assert found == wanted, family
