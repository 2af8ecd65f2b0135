"""How long a model of any size takes for a token of training here, from its sizes alone: nothing of it is read.

    seconds = products(shapes) + r Σ_blocks (2d + 2q + 2k + 3f)

The products with the frozen matrices, forward and backward, are timed in the model's own shapes (`rates.Rates`): how
many operations a second a processor makes of them depends on the shape and on its instructions (bfloat16 with AMX or
without), while all else in a block does not: norms, rotation, attention, activation, the factors of the adapter. That
takes r seconds for each number that a token has there (d hidden, q and k widths of queries and keys or what another
mixer has in their place, f feed-forward width, of experts those that a token goes to), and a share of the step that is
larger the faster the products are. r is timed on the blocks of a small model, of which the products are taken off:

    r = (t(n + 1 blocks) - t(1 block)) / n - products of a block, over the numbers of a token in a block

The softmax of the logits and the longer attention of longer rows are left out.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property

import torch

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.weights import dense_views, empty_weights, module_shapes
from backhand.nn.lora_parameters import LoRAParameters
from backhand.training.memory.rates import Clock, Rates, blocks_of, drawn, fastest, products_of

ROWS, ROW_TOKENS = 4, 256
_FEW, _MORE = 1, 3
_SMALL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": _MORE,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": ROW_TOKENS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


class TokenSeconds:
    """Measures as it is asked.

    Args:
        dtype: the compute dtype.
        clock: seconds of all threads together.
    """

    def __init__(self, dtype: torch.dtype, clock: Clock = time.process_time) -> None:
        self._dtype = dtype
        self._clock = clock
        self._rates = Rates(dtype, clock)

    def of(self, config: DecoderConfig) -> float:
        """Seconds of a token of training, in a micro-batch of 4 × 256, all of them supervised."""
        products_s = self._rates.products_s(products_of(config), ROWS * ROW_TOKENS)
        return products_s + self._rest_s * numbers_in_blocks(config)

    @cached_property
    def _rest_s(self) -> float:
        """r: of one number that a token has in a block, besides the products."""
        whole = decoder_config(dict(_SMALL))
        few, more = (_small_decoder(whole, layers, self._dtype) for layers in (_FEW, _MORE))
        tokens = ROWS * ROW_TOKENS
        ids = torch.randint(whole.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
        batch = PackedBatch(ids, ids.roll(-1), (ROW_TOKENS,) * ROWS)
        works = [lambda model=model: model.loss_and_gradients(batch, 1.0, 0) for model in (few, more)]
        few_s, more_s = fastest(works, self._clock)
        block = blocks_of(replace(whole, layers=whole.layers[:1]))
        rest_s = (more_s - few_s) / (_MORE - _FEW) / tokens - self._rates.products_s(block, tokens)
        return max(0.0, rest_s) * _MORE / numbers_in_blocks(whole)


def numbers_in_blocks(config: DecoderConfig) -> int:
    """What a token has in all blocks, where every module's input and output is counted once; of experts, its own."""
    found = 0
    for layer in config.layers:
        own = config.at(layer)
        mixer = own.mixers[layer.mixer]
        mixture = config.mixture if layer.experts else None
        width = own.intermediate_size if mixture is None else mixture.chosen * mixture.width
        found += 2 * config.hidden_size + sum(mixer.sizes) + mixer.width + 3 * width
    return found


def _small_decoder(whole: DecoderConfig, layers: int, dtype: torch.dtype) -> Decoder:
    """Random weights, and the adapter that a run has by default."""
    config = replace(whole, layers=whole.layers[:layers])
    weights = empty_weights(config, dtype)
    for _, view in dense_views(weights, config):
        view.copy_(drawn(1, view.numel(), dtype).view(view.shape))
    decoder = Decoder(config, weights)
    lora = LoRAParameters(resolve_adapter(LoRAConfig(), module_shapes(config)).slots)
    lora.initialise(torch.Generator().manual_seed(0))
    decoder.attach(lora)
    lora.refresh_compute(dtype)
    return decoder
