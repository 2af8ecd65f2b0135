"""Memory of a training step by part, as formulas over the sizes of a model, its adapter and its micro-batches.

Kept for backward, per token and block, in elements of the compute dtype (d hidden, q heads · head_dim, k key/value
width, f feed-forward width, H heads, K key/value heads, R the ranks of the block's adapters in all):
    none    2d + 2q + 2k + 2f + R     and in float32 2
    mlp     2d + 2q + 2k + R'         and in float32 2                R' without gate's and up's ranks
    block   d                         and one block's `none` at a time while it is computed again
families with q/k norms H + K float32 more, with sandwich norms 2d and 2 float32 more. The last block keeps x1 and what
its MLP needs of supervised tokens only.

Workspace, on top of what is kept: the largest of what is alive
    while a block's MLP is differentiated:  2d + 5f, or 3d + 2f beside three float32 copies of d for its norm;
    while its rotation is:                  3d + 2q + 2k, and in float32 3q + 3k;
    while its attention is:                 2d + 2q + 2k; for the documents at work 2q + 2k, in float32 2k, and three
                                            matrices of `attention_blocks`' queries by keys for each head; where they
                                            differ in length also 3q + 4k, their copies;
    while the head is:                      the last block's output, 3d a supervised token, and the chunk of logits with
                                            the softmax of some of its rows (`linear_cross_entropy`);
    between steps:                          a checkpoint's bytes, or the logits of a neutral text.
Each is compared with torch's own allocations in tests/train/test_memory_model.py. Between steps nothing is kept, and a
checkpoint's large buffers find their place because freed memory is given back before (`memory_keeper`).

Then there is what no tensor holds: the process with its libraries, which is measured, and the matrix kernels that
oneDNN compiles on the CPU (`kernel_count`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from backhand.nn.family import DecoderConfig
from backhand.nn.lora_parameters import AdapterLayout
from backhand.ops.linear_cross_entropy import CHUNK_ROWS, SOFTMAX_ELEMENTS
from backhand.train.config import Recompute
from backhand.train.kernel_count import KERNEL_BYTES
from backhand.train.step_shapes import StepShape

FLOAT32_BYTES = 4
HEAD = "lm_head"
_MODES: tuple[Recompute, ...] = ("none", "mlp", "block")
# values, gradients, two moments, and the copy that the learning guard compares the values with
_COPIES_OF_ADAPTER = 5
# a checkpoint's adapter and its state (values and moments), each as tensors' bytes and once more as a file
_CHECKPOINT_COPIES = 8
# logits with and without the adapter
_NEUTRAL_COPIES = 2
# Integers of the batch, and what finds the supervised ones.
_BATCH_BYTES = 32


@dataclass(frozen=True)
class ModelSize:
    """What the formulas need of a model and its adapter, per token where it says so.

    Attributes:
        dtype_bytes: of the compute dtype.
        weight_bytes: of all frozen weights in it.
        adapter_elements: trained elements.
        kept_bytes: per token, by recompute mode, of all blocks together.
        unread_bytes: of these, what the last block does not keep of a token without supervision.
        block_bytes: per token, of the buffers of the block at work while it is not attending.
        attending_bytes: per token, while it is.
        again_bytes: per token, of what is computed again for the block at work, by recompute mode.
        run_token_bytes, run_product_bytes, copied_token_bytes: of attention, see `StepShape`.
        stream_bytes: per token, of the batch itself and the residual stream outside the blocks.
        head_row_bytes: per supervised token, of the head's input rows and their gradient.
        head_chunk_bytes: per row of a chunk of logits.
        softmax_rows, softmax_row_bytes: rows of a chunk whose softmax is there at once, and the bytes of one.
        head_adapter_bytes: of the gradients of an adapter on the head.
        checkpoint_bytes: of a checkpoint while it is saved.
        neutral_token_bytes: per token of a neutral text while forgetting is measured.
        cache_bytes: per token of a conversation, of keys and values.
    """

    dtype_bytes: int
    weight_bytes: int
    adapter_elements: int
    kept_bytes: Mapping[Recompute, int]
    unread_bytes: Mapping[Recompute, int]
    block_bytes: int
    attending_bytes: int
    again_bytes: Mapping[Recompute, int]
    run_token_bytes: int
    run_product_bytes: int
    copied_token_bytes: int
    stream_bytes: int
    head_row_bytes: int
    head_chunk_bytes: int
    softmax_rows: int
    softmax_row_bytes: int
    head_adapter_bytes: int
    checkpoint_bytes: int
    neutral_token_bytes: int
    cache_bytes: int


def decoder_size(config: DecoderConfig, layout: AdapterLayout, dtype_bytes: int) -> ModelSize:
    """The decoder engine's memory by its formulas."""
    slots = layout.slots
    d, f, b = config.hidden_size, config.intermediate_size, dtype_bytes
    heads, kv_heads = config.num_heads, config.num_key_value_heads
    q, k, layers = heads * config.head_dim, kv_heads * config.head_dim, len(config.layers)
    in_blocks = [slot for slot in slots if slot.name.startswith("model.layers.")]
    ranks = sum(slot.rank for slot in in_blocks)
    gate_up_ranks = sum(slot.rank for slot in in_blocks if slot.name.endswith((".gate_proj", ".up_proj")))
    wide = 2 + (heads + kv_heads if config.qk_norm else 0) + (2 if config.sandwich_norms else 0)
    halves = 2 * d + 2 * q + 2 * k + (2 * d if config.sandwich_norms else 0)
    mlp = layers * (halves * b + wide * FLOAT32_BYTES) + (ranks - gate_up_ranks) * b
    none = mlp + (layers * 2 * f + gate_up_ranks) * b
    last = f"model.layers.{layers - 1}."
    last_ranks = {slot.name.rpartition(".")[2]: slot.rank for slot in in_blocks if slot.name.startswith(last)}
    after = sum(last_ranks.get(name, 0) for name in ("o_proj", "down_proj"))
    unread = (d + (2 * d if config.sandwich_norms else 0) + after) * b
    unread += (3 if config.sandwich_norms else 1) * FLOAT32_BYTES
    gate_up = (2 * f + sum(last_ranks.get(name, 0) for name in ("gate_proj", "up_proj"))) * b
    block_weights = d * (q + 2 * k) + d * q + 3 * d * f
    vocabulary = config.vocab_size * d * (1 if config.tied_head else 2)
    # A table with trained rows is a copy of its own; a tensor trained in full has its gradient once beside the buffer.
    beside = sum(math.prod(tensor.shape) for tensor in layout.trained if tensor.token_ids is None)
    beside += config.vocab_size * d if any(tensor.token_ids is not None for tensor in layout.trained) else 0
    adapter_elements = layout.element_count
    head_ranks = sum(slot.rank for slot in slots if slot.name == HEAD)
    return ModelSize(
        dtype_bytes=b,
        weight_bytes=(layers * block_weights + vocabulary + beside) * b,
        adapter_elements=adapter_elements,
        kept_bytes={"none": none, "mlp": mlp, "block": layers * d * b},
        unread_bytes={"none": unread + gate_up, "mlp": unread, "block": 0},
        block_bytes=_block_at_work(config, b, dropout=any(slot.dropout > 0 for slot in in_blocks)),
        attending_bytes=(2 * d + 2 * q + 2 * k) * b,
        again_bytes={"none": 0, "mlp": 2 * f * b, "block": none // max(1, layers)},
        run_token_bytes=(2 * q + 2 * k) * b + 2 * k * FLOAT32_BYTES,
        run_product_bytes=3 * heads * b,
        copied_token_bytes=(3 * q + 4 * k) * b,
        stream_bytes=d * b + _BATCH_BYTES + len(config.rotary) * config.head_dim * FLOAT32_BYTES,
        head_row_bytes=3 * d * b,
        head_chunk_bytes=config.vocab_size * b,
        softmax_rows=max(1, SOFTMAX_ELEMENTS // config.vocab_size),
        # Narrower logits are widened for the softmax: those rows are there once more.
        softmax_row_bytes=config.vocab_size * FLOAT32_BYTES * (1 if b >= FLOAT32_BYTES else 2),
        head_adapter_bytes=head_ranks * (config.vocab_size + d) * b,
        checkpoint_bytes=adapter_elements * _CHECKPOINT_COPIES * FLOAT32_BYTES,
        neutral_token_bytes=_NEUTRAL_COPIES * config.vocab_size * b,
        cache_bytes=layers * 2 * k * b,
    )


def _block_at_work(config: DecoderConfig, b: int, *, dropout: bool) -> int:
    """Bytes per token that are alive, besides what is kept, at the fullest moment of a block's backward pass."""
    d, f = config.hidden_size, config.intermediate_size
    q, k = config.num_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norm = 3 * d * FLOAT32_BYTES
    masked = max(f, d) * (b + 2) if dropout else 0
    mlp = max((2 * d + 5 * f) * b, (3 * d + 2 * f) * b + norm) + masked
    rotation = (3 * d + 2 * q + 2 * k) * b + max(norm, (3 * q + 3 * k) * FLOAT32_BYTES)
    return max(mlp, rotation)


def transformers_size(
    config: Mapping[str, object], weight_elements: int, layout: AdapterLayout, dtype_bytes: int
) -> ModelSize:
    """A rough size under autograd: per token and block about 18 hidden widths, and whole rows of logits three times."""

    def number(*names: str, default: int) -> int:
        found = (config.get(name) for name in names)
        return next((value for value in found if isinstance(value, int)), default)

    d = number("hidden_size", "n_embd", "d_model", default=1024)
    layers = number("num_hidden_layers", "n_layer", "num_layers", default=24)
    vocabulary = number("vocab_size", default=50_000)
    kept = layers * 18 * d * dtype_bytes
    adapter_elements = layout.element_count
    return ModelSize(
        dtype_bytes=dtype_bytes,
        weight_bytes=weight_elements * dtype_bytes,
        adapter_elements=adapter_elements,
        kept_bytes={"none": kept},
        unread_bytes={"none": 0},
        block_bytes=12 * d * dtype_bytes,
        attending_bytes=0,
        again_bytes={"none": 0},
        run_token_bytes=0,
        run_product_bytes=0,
        copied_token_bytes=0,
        stream_bytes=2 * d * dtype_bytes,
        head_row_bytes=vocabulary * (dtype_bytes + 3 * FLOAT32_BYTES),
        head_chunk_bytes=0,
        softmax_rows=0,
        softmax_row_bytes=0,
        head_adapter_bytes=0,
        checkpoint_bytes=adapter_elements * _CHECKPOINT_COPIES * FLOAT32_BYTES,
        neutral_token_bytes=_NEUTRAL_COPIES * vocabulary * dtype_bytes,
        cache_bytes=layers * 2 * d * dtype_bytes,
    )


def parts_of(size: ModelSize, shape: StepShape, recompute: Recompute, process_bytes: int) -> dict[str, int]:
    """Bytes by part at the moment of a run when most is held; they add up to the peak."""
    narrow = size.dtype_bytes if size.dtype_bytes != FLOAT32_BYTES else 0
    kept = kept_bytes(size, shape, recompute)
    head, block = head_bytes(size, shape), block_bytes(size, shape, recompute)
    at_work = {"head chunk": head, "workspace": block}
    fullest = max(at_work, key=lambda part: at_work[part])
    workspace = shape.tokens * size.stream_bytes + at_work[fullest]
    between = max(size.checkpoint_bytes, shape.neutral_tokens * size.neutral_token_bytes) - kept
    if between > workspace:
        fullest, workspace = "checkpoints and measurements", between
    return {
        "process": process_bytes,
        "base weights": size.weight_bytes,
        "adapter and gradients": size.adapter_elements * ((_COPIES_OF_ADAPTER - 2) * FLOAT32_BYTES + narrow),
        "moments": size.adapter_elements * 2 * FLOAT32_BYTES,
        "kept activations": kept,
        fullest: workspace,
        "compiled kernels": shape.kernels * KERNEL_BYTES,
    }


def kept_bytes(size: ModelSize, shape: StepShape, recompute: Recompute) -> int:
    """What the forward pass keeps for the backward pass."""
    unread = shape.tokens - shape.supervised_tokens
    return shape.tokens * size.kept_bytes[recompute] - unread * size.unread_bytes[recompute]


def block_bytes(size: ModelSize, shape: StepShape, recompute: Recompute) -> int:
    """What is alive while a block's backward pass runs, besides what is kept."""
    attention = shape.run_tokens * size.run_token_bytes + shape.run_products * size.run_product_bytes
    attention += shape.copied_tokens * size.copied_token_bytes
    attending = shape.tokens * size.attending_bytes + attention
    again = shape.tokens * size.again_bytes[recompute]
    # Gate and up are let go before attention's turn comes.
    return max(again + shape.tokens * size.block_bytes, attending + (again if recompute == "block" else 0))


def head_bytes(size: ModelSize, shape: StepShape) -> int:
    """What is alive while the head's loss and gradient are computed, besides what is kept."""
    rows = shape.supervised_tokens
    chunk = min(rows, CHUNK_ROWS)
    softmax = min(chunk, size.softmax_rows) * size.softmax_row_bytes
    return rows * size.head_row_bytes + chunk * size.head_chunk_bytes + softmax + size.head_adapter_bytes


def second_model_bytes(size: ModelSize, process_bytes: int, tokens: int) -> int:
    """A process that answers with the base model and the newest adapter while this one trains.

    Args:
        size: of model and adapter.
        process_bytes: interpreter, libraries and tokenizer.
        tokens: of the longest conversation.
    """
    adapter = size.adapter_elements * (FLOAT32_BYTES + size.dtype_bytes)
    return process_bytes + size.weight_bytes + adapter + tokens * size.cache_bytes
