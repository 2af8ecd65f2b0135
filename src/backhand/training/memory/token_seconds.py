"""How long a model of any size takes for a token of training here, coarsely, from its sizes alone.

    seconds = multiplications · s,   multiplications = vocabulary · d + Σ_blocks out · in of every matrix

s is that of a step of a small model with random weights, in whose matrices a token is multiplied as often as in those
of a block of a real one. How fast a processor is depends on the shapes as well, and the longer attention of longer rows
is left out: within a factor of 1.5 or so. `backhand plan` measures the model itself.
"""

from __future__ import annotations

import time
from dataclasses import fields
from functools import cached_property

import torch
from torch import Tensor

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.weights import dense_views, empty_weights, module_shapes
from backhand.nn.lora_parameters import LoRAParameters
from backhand.training.memory.calibration import fastest

ROWS, ROW_TOKENS = 4, 256
_SMALL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": ROW_TOKENS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
_MEASURED_S = 1.0


class TokenSeconds:
    """Measures once, when it is first asked."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def of(self, config: DecoderConfig) -> float:
        """Seconds of a token of training, in a micro-batch of 4 × 256, all of them supervised."""
        return multiplications(config) * self._multiplication_s

    @cached_property
    def _multiplication_s(self) -> float:
        config, tokens = decoder_config(dict(_SMALL)), ROWS * ROW_TOKENS
        weights, generator = empty_weights(config, self._dtype), torch.Generator().manual_seed(0)
        for _, view in dense_views(weights, config):
            view.normal_(std=0.02, generator=generator)
        decoder = Decoder(config, weights)
        lora = LoRAParameters(resolve_adapter(LoRAConfig(), module_shapes(config)).slots)
        lora.initialise(generator)
        decoder.attach(lora)
        lora.refresh_compute(self._dtype)
        ids = torch.randint(config.vocab_size, (tokens,), generator=generator)
        batch = PackedBatch(ids, ids.roll(-1), (ROW_TOKENS,) * ROWS)
        (taken_s,) = fastest([decoder], batch, time.perf_counter() + _MEASURED_S)
        return taken_s / tokens / multiplications(config)


def multiplications(config: DecoderConfig) -> int:
    """Of a token with all matrices, the head among them; of a layer's experts those that it goes to."""
    found = config.vocab_size * config.hidden_size
    for layer, block in zip(config.layers, empty_weights(config, torch.float32, "meta").blocks, strict=True):
        for field in fields(block):
            matrix = getattr(block, field.name)
            if isinstance(matrix, Tensor) and matrix.dim() == 2:
                of_experts = layer.experts and field.name in ("gate_up", "down") and config.mixture is not None
                share = config.mixture.chosen / config.mixture.experts if of_experts and config.mixture else 1
                found += round(matrix.numel() * share)
    return found
