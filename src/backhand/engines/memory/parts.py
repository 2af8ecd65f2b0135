"""Memory of a training run by part: what is known from headers, and what a step takes, measured or estimated.

From headers alone weights and adapter are exact, and the rest is coarse: for lists of models, and for the bounds of
what `memory.probe` measures. Of a token each block keeps, in elements of the compute dtype (d hidden, m the widths of
its mixer's input and output, f the feed-forward width of what a token passes),

    none    2d + m + 2f + ranks        mlp     2d + m + ranks        block   d

and while a block's backward runs 4d + 2m + 2f are alive, with recomputation what was not kept as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from backhand.engines.memory.shapes import StepShape
from backhand.generate.completer import CACHE_BYTES
from backhand.kernels.dense_product import amx_available
from backhand.nn.decoder.adapted_group import backward_end
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.kv_cache import PAGE, bytes_per_token, state_bytes
from backhand.nn.decoder.weights import empty_weights, named_views
from backhand.nn.lora_parameters import AdapterLayout
from backhand.ops.linear_cross_entropy import chunk_rows
from backhand.options.config import Recompute

FLOAT32_BYTES = 4
# values, gradients, two moments, and the copy that the learning guard compares the values with
_COPIES_OF_ADAPTER = 5
# a checkpoint's adapter and its state (values and moments), each as tensors' bytes and once more as a file
_CHECKPOINT_COPIES = 8
# logits with and without the adapter
_SAMPLING_COPIES = 8  # of the logits of what is sampled at once
_NEUTRAL_COPIES = 2


GAPS, WIDE_GAPS = 0.08, 0.25
_GAPS_BYTES = 32 << 20
"""Freed buffers leave gaps that no other fits, and what the kernels take for themselves is in no tensor: at most.

Masks of dropout, what DoRA makes of each module, and what is computed again come and go between what is kept: measured,
0.23, 0.16 and 0.2.
"""


@dataclass(frozen=True)
class ModelSize:
    """What is known of a model and its adapter from headers alone; what is per token only coarsely."""

    dtype_bytes: int  # of the compute dtype
    weight_bytes: int  # of all frozen weights as they are held
    adapter_elements: int  # trained elements
    kept_bytes: Mapping[Recompute, int]  # per token, by recompute mode, of all blocks together
    block_bytes: Mapping[Recompute, int]  # per token, of what is alive while a block's backward runs, by recompute mode
    stream_bytes: int  # per token, of the batch and the residual stream
    head_row_bytes: int  # per supervised token, of the head's input and its gradient
    chunk_rows: int  # of logits that are there at once in a training pass
    logits_bytes: int  # of one position's logits
    cache_bytes: int  # per token of a conversation, of keys and values
    mixer_state_bytes: int = 0  # of a conversation of any length, of what other mixers than attention go on from
    kernels: int = 0  # that a library compiles for each size of a pass, at most; those that it keeps are counted
    measured: bool = True  # whether a step's memory can be measured before the run
    gaps: float = GAPS  # that freed buffers leave, over what a step takes: or `WIDE_GAPS`


class StepBytes(NamedTuple):
    """What one forward and backward pass takes besides weights and adapter."""

    kept: int  # by the blocks, for the backward pass
    workspace: int  # at the fullest moment besides


def estimated_step(size: ModelSize, shape: StepShape, recompute: Recompute) -> StepBytes:
    """Coarsely, from headers."""
    chunk = min(shape.supervised_tokens, size.chunk_rows) * size.logits_bytes
    head = shape.supervised_tokens * size.head_row_bytes + chunk
    at_work = max(head, shape.tokens * size.block_bytes[recompute])
    return StepBytes(shape.tokens * size.kept_bytes[recompute], shape.tokens * size.stream_bytes + at_work)


def fixed_parts(size: ModelSize, gradient_copies: int, process_bytes: int) -> dict[str, int]:
    """What is there whatever a step is like; exact but for the process."""
    narrow = size.dtype_bytes if size.dtype_bytes != FLOAT32_BYTES else 0
    copies = (_COPIES_OF_ADAPTER - 2 + gradient_copies) * FLOAT32_BYTES + narrow
    return {
        "process": process_bytes,
        "base weights": size.weight_bytes,
        "adapter and gradients": size.adapter_elements * copies,
        "moments": size.adapter_elements * 2 * FLOAT32_BYTES,
    }


def parts_of(size: ModelSize, shape: StepShape, step: StepBytes, process_bytes: int) -> dict[str, int]:
    """Bytes by part at the moment of a run when most is held; they add up to the peak."""
    checkpoint = size.adapter_elements * _CHECKPOINT_COPIES * FLOAT32_BYTES
    # Keys and values that grow take an eighth more than they must, and those of a layer are there twice for a moment.
    # Of its pages a row wastes one at most, and it has another in which it parts from those that begin like it.
    tokens = shape.sampled_tokens + 2 * PAGE * shape.sampled_rows
    cached = min(tokens * size.cache_bytes, CACHE_BYTES) * 5 // 4
    sampling = cached + shape.sampled_rows * _SAMPLING_COPIES * size.logits_bytes
    between = max(checkpoint, shape.neutral_tokens * _NEUTRAL_COPIES * size.logits_bytes, sampling) - step.kept
    fullest, most = "workspace", step.workspace
    if between > most:
        fullest, most = "checkpoints and measurements", between
    # What oneDNN keeps where the environment names no other limit.
    stated = os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    most_kernels = int(stated) if stated.isdecimal() else 1024
    found = {
        **fixed_parts(size, shape.gradient_copies, process_bytes),
        "kept activations": step.kept,
        fullest: most,
        "compiled kernels": min(shape.sizes * size.kernels, most_kernels) * _KERNEL_BYTES,
    }
    return {**found, "gaps between buffers": round(size.gaps * (step.kept + most)) + _GAPS_BYTES}


_KERNEL_BYTES = 700_000
"""Of a kernel that oneDNN keeps, with what those leave behind that were compiled before in its place."""


def second_model_bytes(size: ModelSize, process_bytes: int, tokens: int) -> int:
    """A process that answers with the base model and the newest adapter while this one trains.

    Args:
        process_bytes: interpreter, libraries and tokenizer.
        tokens: of the longest conversation.
    """
    adapter = size.adapter_elements * (FLOAT32_BYTES + size.dtype_bytes)
    conversation = tokens * size.cache_bytes + size.mixer_state_bytes
    return process_bytes + size.weight_bytes + adapter + conversation


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
    adapted = layers[backward_end(layout, len(layers)).layer :]
    ranks = sum(slot.rank for slot in layout.slots if slot.name.startswith("model.layers."))
    # Elements per token of what enters and leaves a mixer; and of the gate, or of those of the experts that it goes to.
    mixers = [sum(one.sizes) + one.width for one in (config.at(layer).mixers[layer.mixer] for layer in adapted)]
    chosen = 0 if config.mixture is None else config.mixture.chosen * config.mixture.width
    widths = [chosen if layer.experts else config.at(layer).intermediate_size for layer in adapted]
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
        kernels=0 if amx_available(dtype) else _kernels(dtype.itemsize, experts=config.mixture is not None),
    )


def _gaps(layout: AdapterLayout) -> float:
    return WIDE_GAPS if any(slot.dropout or slot.use_dora for slot in layout.slots) else GAPS


def _kernels(dtype_bytes: int, *, experts: bool = False) -> int:
    """Products of a pass that oneDNN compiles for its size; those of experts have another size in every pass."""
    if dtype_bytes == FLOAT32_BYTES:
        return 0
    return 1 << 20 if experts else 16


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
