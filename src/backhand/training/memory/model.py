"""Memory of a training step by part, from the sizes of a model, its adapter and its micro-batches.

What a model's sizes are says `memory.decoder_size` for the decoder engine, and `transformers_size` for autograd.

Then there is what no tensor holds: the process with its libraries, which is measured, and the matrix kernels that
oneDNN compiles on the CPU (`memory.shapes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from backhand.nn.lora_parameters import AdapterLayout
from backhand.ops.delta_chunks import HeadSizes, bytes_of_a_head, heads_at_once
from backhand.ops.gated_delta_rule import bytes_in_loops
from backhand.ops.linear_cross_entropy import CHUNK_ROWS
from backhand.ops.low_rank import parts_of_rows
from backhand.training.config import Recompute
from backhand.training.memory.shapes import StepShape, expert_kernel_bytes, kept_kernels, kernel_bytes

FLOAT32_BYTES = 4
STATES = "hidden states of frozen layers"
# values, gradients, two moments, and the copy that the learning guard compares the values with
_COPIES_OF_ADAPTER = 5
# a checkpoint's adapter and its state (values and moments), each as tensors' bytes and once more as a file
CHECKPOINT_COPIES = 8
# logits with and without the adapter
NEUTRAL_COPIES = 2


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
        attending_bytes: per token, while it is, by recompute mode: of the layer for which most is held then, since the
            layers above it have let go what they kept.
        delta_bytes: per token, while the gated delta rule is differentiated, by recompute mode; likewise.
        delta_heads: of that rule, which heads there are; None without it.
        last_attending_bytes, last_unread_bytes: with recompute `block` the last layer's, which the others' are without;
            and what of it is not computed again of a token without supervision.
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
        mixer_state_bytes: of a conversation of any length, of what other mixers than attention go on from.
        unpacked_bytes: of the piece of a quantized matrix that is unpacked at a time.
        expert_products: of an expert, which are compiled, where any are, for every number of tokens that choose it.
        expert_choices: how many such numbers a micro-batch brings: layers by experts.
        expert_share: of a micro-batch's tokens, up to which most of these numbers lie: twice their mean.
        more_kernels: that one of each of `StepShape.kernel_sizes` brings beside those of a usual block.
        part_sums_bytes: of a part of a micro-batch's rows (`ops.low_rank`), what gradients of factors are added up in.
        states_bytes: of the hidden states of all rows that are kept in memory (`memory.states`).
        head_chunk_rows: of a chunk of logits, at most.
    """

    dtype_bytes: int
    weight_bytes: int
    adapter_elements: int
    kept_bytes: Mapping[Recompute, int]
    unread_bytes: Mapping[Recompute, int]
    block_bytes: int
    attending_bytes: Mapping[Recompute, int]
    delta_bytes: Mapping[Recompute, int]
    delta_heads: HeadSizes | None
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
    unpacked_bytes: int = 0
    expert_products: int = 0
    expert_choices: int = 0
    expert_share: float = 1.0
    part_sums_bytes: int = 0
    states_bytes: int = 0
    last_attending_bytes: int = 0
    last_unread_bytes: int = 0
    head_chunk_rows: int = CHUNK_ROWS
    mixer_state_bytes: int = 0
    more_kernels: tuple[int, int, int, int] = (0, 0, 0, 0)


def transformers_size(
    config: Mapping[str, object], weight_elements: int, layout: AdapterLayout, dtype_bytes: int
) -> ModelSize:
    """A rough size under autograd: per token and block about 18 hidden widths, and whole rows of logits three times.

    Rows of unequal length stand in one pass, padded to the longest by a quarter of their tokens at most
    (`nn.right_padding`); padding has no label, and so no logits.
    """

    def number(*names: str, default: int) -> int:
        found = (config.get(name) for name in names)
        return next((value for value in found if isinstance(value, int)), default)

    d = number("hidden_size", "n_embd", "d_model", default=1024)
    layers = number("num_hidden_layers", "n_layer", "num_layers", default=24)
    vocabulary = number("vocab_size", default=50_000)
    kept = layers * 18 * d * dtype_bytes * 5 // 4
    adapter_elements = layout.element_count
    return ModelSize(
        dtype_bytes=dtype_bytes,
        weight_bytes=weight_elements * dtype_bytes,
        adapter_elements=adapter_elements,
        kept_bytes={"none": kept},
        unread_bytes={"none": 0},
        block_bytes=15 * d * dtype_bytes,
        attending_bytes={"none": 0},
        delta_bytes={"none": 0},
        delta_heads=None,
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
        checkpoint_bytes=adapter_elements * CHECKPOINT_COPIES * FLOAT32_BYTES,
        neutral_token_bytes=NEUTRAL_COPIES * vocabulary * dtype_bytes,
        cache_bytes=layers * 2 * d * dtype_bytes,
    )


def parts_of(size: ModelSize, shape: StepShape, recompute: Recompute, process_bytes: int) -> dict[str, int]:
    """Bytes by part at the moment of a run when most is held; they add up to the peak."""
    narrow = size.dtype_bytes if size.dtype_bytes != FLOAT32_BYTES else 0
    kept = kept_bytes(size, shape, recompute)
    head, block = head_bytes(size, shape), block_bytes(size, shape, recompute)
    sums = parts_of_rows(shape.tokens) * size.part_sums_bytes
    at_work = {"head chunk": head, "workspace": block + sums}
    fullest = max(at_work, key=lambda part: at_work[part])
    workspace = shape.tokens * size.stream_bytes + at_work[fullest]
    between = max(size.checkpoint_bytes, shape.neutral_tokens * size.neutral_token_bytes) - kept
    if between > workspace:
        fullest, workspace = "checkpoints and measurements", between
    return {
        "process": process_bytes,
        "base weights": size.weight_bytes,
        **({"unpacked piece": size.unpacked_bytes} if size.unpacked_bytes else {}),
        "adapter and gradients": size.adapter_elements
        * ((_COPIES_OF_ADAPTER - 2 + shape.gradient_copies) * FLOAT32_BYTES + narrow),
        "moments": size.adapter_elements * 2 * FLOAT32_BYTES,
        **({STATES: size.states_bytes} if size.states_bytes else {}),
        "kept activations": kept,
        fullest: workspace,
        "compiled kernels": _bytes_of_kernels(size, shape),
    }


def _bytes_of_kernels(size: ModelSize, shape: StepShape) -> int:
    """Of compiled kernels that are there in the end; none where none are compiled."""
    if not shape.kernels and not any(shape.kernel_sizes):
        return 0
    more = sum(count * each for count, each in zip(shape.kernel_sizes, size.more_kernels, strict=True))
    all_tokens = min(kept_kernels(), shape.kernels + more)
    likely = max(1.0, size.expert_share * shape.tokens)
    # Of as many draws among these, so many differ.
    numbers = likely * -math.expm1(-size.expert_choices * shape.micro_batches / likely)
    experts = round(size.expert_products * numbers)
    return all_tokens * kernel_bytes() + expert_kernel_bytes(experts, kept_kernels() - all_tokens)


def kept_bytes(size: ModelSize, shape: StepShape, recompute: Recompute) -> int:
    """What the forward pass keeps for the backward pass."""
    unread = shape.tokens - shape.supervised_tokens
    return shape.tokens * size.kept_bytes[recompute] - unread * size.unread_bytes[recompute]


def block_bytes(size: ModelSize, shape: StepShape, recompute: Recompute) -> int:
    """What is alive while a block's backward pass runs, besides what is kept."""
    attention = shape.run_tokens * size.run_token_bytes + shape.run_products * size.run_product_bytes
    attention += shape.copied_tokens * size.copied_token_bytes
    attending = shape.tokens * size.attending_bytes[recompute] + attention
    if recompute == "block":
        unread = shape.tokens - shape.supervised_tokens
        last = shape.tokens * size.last_attending_bytes - unread * size.last_unread_bytes
        attending = max(attending, last + attention)
    attending = max(attending, shape.tokens * size.delta_bytes[recompute] + delta_rule_bytes(size, shape))
    again = shape.tokens * size.again_bytes[recompute]
    # Gate and up are let go before attention's turn comes.
    return max(again + shape.tokens * size.block_bytes, attending + (again if recompute == "block" else 0))


def delta_rule_bytes(size: ModelSize, shape: StepShape) -> int:
    """What the gated delta rule's backward holds: of a document for each thread, or of the heads it takes at once."""
    if size.delta_heads is None:
        return 0
    dtype = torch.float64 if size.dtype_bytes > FLOAT32_BYTES else torch.float32
    in_loops = bytes_in_loops(size.delta_heads, shape.longest_tokens, dtype, shared=shape.shared_tokens)
    if in_loops is not None:
        return in_loops
    heads, group, *widths = size.delta_heads
    kept, at_work = bytes_of_a_head(size.delta_heads, dtype)
    at_once = heads_at_once(heads, shape.tokens, shape.step_tokens, group * max(widths), kept)
    return at_once * (shape.tokens * kept + shape.step_tokens * at_work)


def head_bytes(size: ModelSize, shape: StepShape) -> int:
    """What is alive while the head's loss and gradient are computed, besides what is kept."""
    rows = shape.supervised_tokens
    chunk = min(rows, size.head_chunk_rows)
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
    conversation = tokens * size.cache_bytes + size.mixer_state_bytes
    return process_bytes + size.weight_bytes + size.unpacked_bytes + adapter + conversation
