"""A model's memory from its headers alone, coarsely: for lists of models, and for the bounds of what is measured.

Weights and adapter are exact. Of a token each block keeps, in elements of the compute dtype (d hidden, m the widths of
its mixer's input and output, f the feed-forward width of what a token passes),

    none    2d + m + 2f + ranks        mlp     2d + m + ranks        block   d

and while a block's backward runs 4d + 2m + 2f are alive, with recomputation what was not kept as well. `memory.probe`
measures what these are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from backhand.kernels.dense_product import is_taken
from backhand.nn.decoder.adapted_group import lowest_trained_group
from backhand.nn.decoder.family import DecoderConfig, LayerConfig
from backhand.nn.decoder.kv_cache import bytes_per_token, state_bytes
from backhand.nn.decoder.weights import empty_weights, named_views
from backhand.nn.lora_parameters import AdapterLayout
from backhand.ops.linear_cross_entropy import chunk_rows
from backhand.training.memory.parts import FLOAT32_BYTES, GAPS, WIDE_GAPS, ModelSize


def decoder_size(
    config: DecoderConfig, layout: AdapterLayout, dtype: torch.dtype, quantized_bytes: int | None = None
) -> ModelSize:
    """The decoder engine's.

    Args:
        quantized_bytes: of the matrices in their blocks, where they stay in them.
    """
    d, b, layers = config.hidden_size, dtype.itemsize, config.layers
    views = named_views(empty_weights(config, dtype, "meta"), config)
    matrices = sum(math.prod(view.shape) for _, view in views if len(view.shape) == 2)
    # A table with trained rows is a copy of its own; a tensor trained in full has its gradient once beside the buffer.
    beside = sum(math.prod(tensor.shape) for tensor in layout.trained if tensor.token_ids is None)
    beside += config.vocab_size * d if any(tensor.token_ids is not None for tensor in layout.trained) else 0
    adapted = layers[lowest_trained_group(layout, len(layers))[0] :]
    ranks = sum(slot.rank for slot in layout.slots if slot.name.startswith("model.layers."))
    mixers = [mixer_width(config, layer) for layer in adapted]
    widths = [mlp_width(config, layer) for layer in adapted]
    mlp = sum(2 * d + mixer for mixer in mixers) + ranks
    block = max((4 * d + 2 * mixer + 2 * width for mixer, width in zip(mixers, widths, strict=True)), default=0)
    again = max((d + mixer + 2 * width for mixer, width in zip(mixers, widths, strict=True)), default=0)
    return ModelSize(
        dtype_bytes=b,
        weight_bytes=beside * b + (matrices * b if quantized_bytes is None else quantized_bytes),
        adapter_elements=layout.element_count,
        kept_bytes={"none": (mlp + 2 * sum(widths)) * b, "mlp": mlp * b, "block": len(adapted) * d * b},
        block_bytes={
            "none": block * b,
            "mlp": (block + 2 * max(widths, default=0)) * b,
            "block": (block + again) * b,
        },
        stream_bytes=d * b + 32,
        head_row_bytes=3 * d * b,
        chunk_rows=chunk_rows(d, dtype),
        logits_bytes=config.vocab_size * b,
        cache_bytes=bytes_per_token(config, dtype),
        mixer_state_bytes=state_bytes(config, dtype),
        gaps=_gaps(layout),
        kernels=0 if is_taken(dtype) else _kernels(dtype.itemsize, experts=config.mixture is not None),
    )


def _gaps(layout: AdapterLayout) -> float:
    return WIDE_GAPS if any(slot.dropout or slot.use_dora for slot in layout.slots) else GAPS


def _kernels(dtype_bytes: int, *, experts: bool = False) -> int:
    """Products of a pass that oneDNN compiles for its size; those of experts have another size in every pass."""
    if dtype_bytes == FLOAT32_BYTES:
        return 0
    return 1 << 20 if experts else 16


def mixer_width(config: DecoderConfig, layer: LayerConfig) -> int:
    """Elements per token of what enters and what leaves a mixer."""
    mixer = config.at(layer).mixers[layer.mixer]
    return sum(mixer.sizes) + mixer.width


def mlp_width(config: DecoderConfig, layer: LayerConfig) -> int:
    """Elements per token of the MLP's gate, or of those of all the experts that a token goes to."""
    mixture = config.mixture
    return mixture.chosen * mixture.width if layer.experts and mixture else config.at(layer).intermediate_size


def transformers_size(
    config: Mapping[str, object], weight_elements: int, layout: AdapterLayout, dtype_bytes: int
) -> ModelSize:
    """Under autograd: per token and block about 18 hidden widths, and whole rows of logits three times.

    Rows of unequal length stand in one pass, padded to the longest by a quarter of their tokens at most
    (`nn.right_padding`); padding has no label, and so no logits.
    """

    def number(*names: str, default: int) -> int:
        found = (config.get(name) for name in names)
        return next((value for value in found if isinstance(value, int)), default)

    d = number("hidden_size", "n_embd", "d_model", default=1024)
    layers = number("num_hidden_layers", "n_layer", "num_layers", default=24)
    vocabulary = number("vocab_size", default=50_000)
    return ModelSize(
        dtype_bytes=dtype_bytes,
        weight_bytes=weight_elements * dtype_bytes,
        adapter_elements=layout.element_count,
        kept_bytes={"none": layers * 18 * d * dtype_bytes * 5 // 4},
        block_bytes={"none": 15 * d * dtype_bytes},
        stream_bytes=2 * d * dtype_bytes,
        head_row_bytes=vocabulary * (dtype_bytes + 3 * FLOAT32_BYTES),
        chunk_rows=0,
        logits_bytes=vocabulary * dtype_bytes,
        cache_bytes=layers * 2 * d * dtype_bytes,
        gaps=_gaps(layout),
        kernels=_kernels(dtype_bytes),
        measured=False,
    )
