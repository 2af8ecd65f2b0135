"""Memory of a training run by part: sizes from file headers, and the memory of a step, measured or estimated.

From headers, the sizes of weights and adapter are exact. The memory of a step is a coarse estimate, for lists of models
and as a bound of the measurements of `memory.probe`. Per token, the saved tensors of a block have the following number
of elements of the compute dtype, by recompute mode:

    none    2d + m + 2f + ranks        mlp     2d + m + ranks        block   d

Here d is the hidden size, m the sum of the widths of the mixer's input and output, and f the intermediate size of the
MLP or of the experts that a token passes. During a block's backward, 4d + 2m + 2f elements per token are alive, in
addition to recomputed tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from backhand.engines.memory.shapes import StepShape
from backhand.generation.completer import CACHE_BYTES
from backhand.kernels.dense_product import amx_available
from backhand.nn.compute import most_kernels
from backhand.nn.decoder.adapted_group import backward_end
from backhand.nn.decoder.kv_cache import PAGE, bytes_per_token, state_bytes
from backhand.nn.decoder.weights import empty_weights, named_views
from backhand.nn.families.family import DecoderConfig, split_layer
from backhand.nn.lora_parameters import AdapterLayout
from backhand.ops.linear_cross_entropy import chunk_rows
from backhand.options.config import Recompute

FLOAT32_BYTES = 4
_COPIES_OF_ADAPTER = 5  # values, gradients, two moments, and the learning guard's copy of the initial values
_CHECKPOINT_COPIES = 8  # a checkpoint's adapter and state (values and two moments), each as tensors and as a file
_SAMPLING_COPIES = 8  # of the logits of all answers that are sampled together
_NEUTRAL_COPIES = 2  # logits with and without the adapter


KERNEL_BYTES, EXPERT_KERNEL_BYTES = 700_000, 250_000
"""Bytes of a cached oneDNN kernel, including the gaps that evicted kernels leave. Those for the few rows of an expert
are smaller."""

GAPS, WIDE_GAPS, BLOCK_GAPS = 0.08, 0.25, 0.4
_GAPS_BYTES = 32 << 20
"""Upper bounds of the gaps between freed buffers and of the kernels' own memory, which is in no tensor.

The gaps are a share of a step's memory. With dropout masks, DoRA's tensors or recomputed tensors, which are freed
between saved tensors, the measured shares are 0.23, 0.16 and 0.2. `WIDE_GAPS` is for these cases. If whole blocks are
recomputed, little is saved between many freed tensors: 0.37 to 0.4 with one row of 8,192 and of 32,768 tokens.
"""

_FEW_TASKS, _MOST_PIECES, _ATTENTION_BYTES = 8, 8, 1 << 28
"""`FEW_TASKS`, `MOST_PIECES` and `SPLIT_BYTES` of kernels/native/attention.cpp."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model and its adapter from file headers. Sizes per token are coarse estimates."""

    dtype_bytes: int  # bytes per element of the compute dtype
    weight_bytes: int  # bytes of all frozen weights in the form in which the run uses them
    adapter_elements: int  # number of trained elements
    saved_bytes: Mapping[Recompute, int]  # bytes per token of the saved tensors of all blocks, by recompute mode
    block_bytes: Mapping[Recompute, int]  # bytes per token that are alive in a block's backward, by recompute mode
    stream_bytes: int  # bytes per token of the batch and the residual stream
    head_row_bytes: int  # bytes per supervised token of the head's input and its gradient
    chunk_rows: int  # number of rows of logits that exist at the same time in a training pass
    logits_bytes: int  # bytes of one position's logits
    cache_bytes: int  # bytes per token of keys and values in a conversation
    mixer_state_bytes: int = 0  # bytes per conversation of the states of mixers other than attention
    kernels: int = 0  # largest number of kernels that a library compiles for each size of a pass
    kernel_bytes: int = KERNEL_BYTES  # bytes of one of them
    measured: bool = True  # True if a step's memory can be measured before the run
    gaps: float = GAPS  # gaps between freed buffers as a share of a step's memory, without recomputation
    head_bytes: int = 0  # bytes per token of one head's gradients of keys and values in attention's kernel
    # heads, kv_heads: number of query heads and of key/value heads
    heads: int = 1
    kv_heads: int = 1


class StepBytes(NamedTuple):
    """Memory of one forward and backward pass, without weights and adapter."""

    saved: int  # bytes of the blocks' saved tensors
    workspace: int  # peak of all other bytes


def estimated_step(size: ModelSize, shape: StepShape, recompute: Recompute) -> StepBytes:
    """Estimate the memory of a pass from the model's sizes."""
    chunk = min(shape.supervised_tokens, size.chunk_rows) * size.logits_bytes
    head = shape.supervised_tokens * size.head_row_bytes + chunk
    at_work = max(head, shape.tokens * size.block_bytes[recompute])
    return StepBytes(shape.tokens * size.saved_bytes[recompute], shape.tokens * size.stream_bytes + at_work)


def fixed_parts(size: ModelSize, adapter_copies: int, process_bytes: int) -> dict[str, int]:
    """Return the bytes that do not depend on the step, by part. They are exact except for the process."""
    narrow = size.dtype_bytes if size.dtype_bytes != FLOAT32_BYTES else 0
    copies = (_COPIES_OF_ADAPTER - 2 + adapter_copies) * FLOAT32_BYTES + narrow
    return {
        "process": process_bytes,
        "base weights": size.weight_bytes,
        "adapter and gradients": size.adapter_elements * copies,
        "moments": size.adapter_elements * 2 * FLOAT32_BYTES,
    }


def parts_of(size: ModelSize, shape: StepShape, step: StepBytes, process_bytes: int) -> dict[str, int]:
    """Return the bytes by part at the moment of the peak. Their sum is the peak."""
    checkpoint = size.adapter_elements * _CHECKPOINT_COPIES * FLOAT32_BYTES
    # A growing cache of keys and values is an eighth larger than necessary, and one layer's part exists twice while it
    # is copied. A row wastes at most one page at its end, and one page where it diverges from a shared prefix.
    tokens = shape.sampled_tokens + 2 * PAGE * shape.sampled_rows
    cached = min(tokens * size.cache_bytes, CACHE_BYTES) * 5 // 4
    sampling = cached + shape.sampled_rows * _SAMPLING_COPIES * size.logits_bytes
    teacher = shape.teacher_tokens * (size.stream_bytes + max(size.block_bytes.values()))
    neutral = shape.neutral_tokens * _NEUTRAL_COPIES * size.logits_bytes
    between = max(checkpoint, neutral, sampling, teacher) - step.saved
    fullest, most = "workspace", step.workspace
    if between > most:
        fullest, most = "checkpoints and measurements", between
    parts = {
        **fixed_parts(size, shape.adapter_copies, process_bytes),
        "kept activations": step.saved,
        fullest: most,
        "compiled kernels": min(shape.sizes * size.kernels, most_kernels()) * size.kernel_bytes,
    }
    gaps = round(size.gaps * (step.saved + most)) + _GAPS_BYTES + _attention_buffers(size, shape)
    return {**parts, "gaps between buffers": gaps}


def _attention_buffers(size: ModelSize, shape: StepShape) -> int:
    """Return the bytes of the gradients of keys and values that attention's kernel adds up, which are in no tensor.

    With few documents, the kernel computes each head separately. If documents share segments, several tasks compute the
    segments of a tree, and each has a buffer for those that others continue.
    """
    parents, token_bytes = shape.parents, size.kv_heads * size.head_bytes
    tree_ends = [*(i for i, parent in enumerate(parents) if parent < 0), len(parents)]
    buffers: list[tuple[int, int]] = []  # for each tree with shared segments, their tokens and the tree's segments
    for first, last in pairwise(tree_ends):
        if continued := set(parents[first:last]) - {-1}:
            buffers.append((sum(shape.lengths[i] for i in continued), last - first))
    if buffers:
        most = max(1, _MOST_PIECES // len(buffers))
        return sum(tokens * min(segments, most) for tokens, segments in buffers) * token_bytes
    if max(len(shape.lengths), 1) * size.kv_heads >= _FEW_TASKS:
        return 0
    return min(shape.tokens * size.heads * size.head_bytes, _ATTENTION_BYTES)


def second_model_bytes(size: ModelSize, process_bytes: int, tokens: int) -> int:
    """Return the memory of a process that answers prompts with the base model and the newest adapter during training.

    Args:
        size: the sizes of the model.
        process_bytes: bytes of interpreter, libraries and tokenizer.
        tokens: number of tokens of the longest conversation.
    """
    adapter = size.adapter_elements * (FLOAT32_BYTES + size.dtype_bytes)
    conversation = tokens * size.cache_bytes + size.mixer_state_bytes
    return process_bytes + size.weight_bytes + adapter + conversation


def decoder_size(
    config: DecoderConfig, layout: AdapterLayout, dtype: torch.dtype, quantized_bytes: int | None = None
) -> ModelSize:
    """Return the sizes of a model in the decoder engine.

    Args:
        config: the configuration of the model.
        layout: the adapter.
        dtype: the compute dtype.
        quantized_bytes: bytes of the quantized matrices; None for a dense base.
    """
    d, b, layers = config.hidden_size, dtype.itemsize, config.layers
    views = named_views(empty_weights(config, dtype, "meta"), config)
    matrices = sum(math.prod(view.shape) for _, view in views if len(view.shape) == 2)
    # A fully trained tensor needs a second gradient outside the buffer. An embedding with trained rows is copied.
    copied = sum(math.prod(tensor.shape) for tensor in layout.full_tensors if tensor.token_ids is None)
    copied += config.vocab_size * d if any(tensor.token_ids is not None for tensor in layout.full_tensors) else 0
    adapted = layers[backward_end(layout, config).layer :]
    ranks = sum(slot.rank for slot in layout.slots if split_layer(slot.name) is not None)
    # `mixers` has the width of each mixer's input and output together. `widths` has the intermediate size of each MLP
    # or of the experts that a token passes.
    mixers = [sum(one.sizes) + one.width for one in (config.at(layer).mixers[layer.mixer] for layer in adapted)]
    chosen = 0 if config.mixture is None else config.mixture.chosen * config.mixture.width
    dense = [config.at(layer).intermediate_size if config.has_mlp else 0 for layer in adapted]
    widths = [
        layer.experts * chosen + config.has_mlp_in(layer) * width for layer, width in zip(adapted, dense, strict=True)
    ]
    mlp = sum(2 * d + mixer for mixer in mixers) + ranks
    block = max((4 * d + 2 * mixer + 2 * width for mixer, width in zip(mixers, widths, strict=True)), default=0)
    recomputed = max((d + mixer + 2 * width for mixer, width in zip(mixers, widths, strict=True)), default=0)
    return ModelSize(
        dtype_bytes=b,
        weight_bytes=copied * b + (matrices * b if quantized_bytes is None else quantized_bytes),
        adapter_elements=layout.element_count,
        saved_bytes={"none": (mlp + 2 * sum(widths)) * b, "mlp": mlp * b, "block": len(adapted) * d * b},
        block_bytes={
            "none": block * b,
            "mlp": (block + 2 * max(widths, default=0)) * b,
            "block": (block + recomputed) * b,
        },
        stream_bytes=d * b + 32,
        head_row_bytes=3 * d * b,
        chunk_rows=chunk_rows(d, dtype),
        logits_bytes=config.vocab_size * b,
        cache_bytes=bytes_per_token(config, dtype),
        mixer_state_bytes=state_bytes(config, dtype),
        gaps=_gaps(layout),
        head_bytes=2 * FLOAT32_BYTES * config.head_dim,
        heads=config.num_heads,
        kv_heads=config.num_key_value_heads,
        kernels=0 if amx_available(dtype) else _kernels(dtype.itemsize, experts=config.mixture is not None),
        kernel_bytes=KERNEL_BYTES if config.mixture is None else EXPERT_KERNEL_BYTES,
    )


def _gaps(layout: AdapterLayout) -> float:
    return WIDE_GAPS if any(slot.dropout or slot.use_dora for slot in layout.slots) else GAPS


def _kernels(dtype_bytes: int, *, experts: bool = False) -> int:
    """Return the number of products of a pass that oneDNN compiles for its size. Experts differ in size per pass."""
    if dtype_bytes == FLOAT32_BYTES and torch.get_float32_matmul_precision() != "medium":
        return 0
    return 1 << 20 if experts else 16


def transformers_size(
    config: Mapping[str, object], weight_elements: int, layout: AdapterLayout, dtype_bytes: int
) -> ModelSize:
    """Estimate the sizes of a model in the transformers engine.

    Autograd saves about 18 hidden widths per token and block, and three copies of the logits. Rows of different lengths
    are padded to the longest in one pass, by a quarter of their tokens at most (`nn.right_padding`). Padding has no
    labels and therefore no logits.

    Args:
        config: the fields of config.json.
        weight_elements: number of elements of all weights.
        layout: the adapter.
        dtype_bytes: bytes per element of the compute dtype.
    """

    def number(*names: str, default: int) -> int:
        values = (config.get(name) for name in names)
        return next((value for value in values if isinstance(value, int)), default)

    d = number("hidden_size", "n_embd", "d_model", default=1024)
    layers = number("num_hidden_layers", "n_layer", "num_layers", default=24)
    vocabulary = number("vocab_size", default=50_000)
    return ModelSize(
        dtype_bytes=dtype_bytes,
        weight_bytes=weight_elements * dtype_bytes,
        adapter_elements=layout.element_count,
        saved_bytes={"none": layers * 18 * d * dtype_bytes * 5 // 4},
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
