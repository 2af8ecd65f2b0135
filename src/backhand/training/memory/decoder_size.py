"""Memory of the decoder engine's training step, as formulas over the sizes of a family and its adapter.

Kept for backward, per token and block, in elements of the compute dtype (d hidden, q heads · head_dim, k key/value
width, f feed-forward width, H heads, K key/value heads, R the ranks of the block's adapters in all):
    none    2d + 2q + 2k + 2f + R     and in float32 2
    mlp     2d + 2q + 2k + R'         and in float32 2                R' without gate's and up's ranks
    block   d                         and the largest block's `none` while it is computed again
less one q where attention's loop gives its output again (float32, no gates, no cap);
with another mixer the widths of its input and its output in the place of 2q + 2k; with the gated delta rule or a gate
behind attention that of its output once more, with the former as many float32 as it has value heads; with experts, c of
them chosen, 2cf' in the place of 2f, c times their ranks, and what the router decided;
families with q/k norms H + K float32 more (2 where they go over all heads), with norms behind the halves 2d and 2
float32 more, without norms before them 2 float32 less. The last block keeps x1 and what its MLP needs of supervised
tokens only; blocks below the lowest adapted layer keep nothing.

Where layers have sizes of their own (`DecoderConfig.at`), theirs count; where they have inputs of their own, each keeps
2d and the input's width more. What a pass carries beside the stream is counted with the stream.

Workspace, on top of what is kept: the largest of what is alive, in torch's form (see `_looped_block` for loops),
    while a block's MLP is differentiated:  d + 4f, or 2d + f beside three float32 copies of d for its norm;
    while a block's experts are:            d + 2cd + 2cf', or d + cd + 4cf' before, one c f' less in loops;
    while its rotation is:                  3d + 2q + 2k, and in float32 3q + 3k;
    while factors' gradients are:           2d + 2f, and in loops without tiles R / 2 bytes for each output of the group
                                            (16 numbers of float32 for 128 outputs, where a rank is 16);
    while its attention is:                 2d + 2q + 2k; for the documents at work 2q + 2k, in float32 2k, and three
                                            matrices of `attention_blocks`' queries by keys for each head, five where
                                            scores are capped; where they differ in length also 3q + 4k, their copies;
    while the gated delta rule is: its input and output, their gradients, q and k in float32 twice, and in loops
                                            what each thread keeps of a document, else for the key heads at work what
                                            `ops.delta_chunks` keeps of every token;
    while the head is:                      2d a supervised token, 3d where something is trained in it, and the chunk of
                                            logits with the softmax of some of its rows (`linear_cross_entropy`);
    between steps:                          a checkpoint's bytes, or the logits of a neutral text.
Each is compared with torch's own allocations in tests/training/test_memory_model.py. Between steps nothing is kept, and
a checkpoint's large buffers find their place because freed memory is given back before (`memory.process`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from backhand.kernels.library import loops_are_there
from backhand.nn.decoder.adapted_group import (
    DOWN,
    GATE_UP,
    INPUT,
    OUTPUT,
    PER_LAYER_GATE,
    PER_LAYER_PROJECTION,
    group_of,
    lowest_trained_group,
)
from backhand.nn.decoder.family import (
    ATTENTION,
    GATED_DELTA,
    KEYS_AS_VALUES,
    SHARED_KEYS,
    VALUE_NORMED,
    DecoderConfig,
    LayerConfig,
)
from backhand.nn.decoder.kv_cache import bytes_per_row
from backhand.nn.lora_parameters import AdapterLayout
from backhand.ops.delta_chunks import HeadSizes
from backhand.ops.frozen_matrix import column_tiles, row_tiles, sums_over_rows
from backhand.ops.linear_cross_entropy import CHUNK_ROWS, SOFTMAX_ELEMENTS, chunk_rows
from backhand.ops.low_rank import by_parts_of_rows
from backhand.training.config import Recompute
from backhand.training.memory.decoder_kernels import expert_products, more_kernels
from backhand.training.memory.model import CHECKPOINT_COPIES, FLOAT32_BYTES, NEUTRAL_COPIES, ModelSize

INTEGER_BYTES = 8
HEAD = "lm_head"
_MODES: tuple[Recompute, ...] = ("none", "mlp", "block")
_FLOATING = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
"""A compute dtype of each size."""
# Of `low_rank_backward`: columns of a task, and numbers of a register, up to which a rank is filled.
_TASK_COLUMNS, _LANES = 128, 16
# Integers of the batch, and what finds the supervised ones.
_BATCH_BYTES = 32


def decoder_size(
    config: DecoderConfig,
    layout: AdapterLayout,
    dtype_bytes: int,
    quantized_bytes: int | None = None,
    *,
    unpacked_within: bool = False,
) -> ModelSize:
    """The decoder engine's memory by its formulas.

    Args:
        config: the family.
        layout: the adapter.
        dtype_bytes: of the compute dtype.
        quantized_bytes: of the matrices in their blocks, where they stay in them.
        unpacked_within: whether products unpack these themselves; what looks at every number still takes tiles of rows.
    """
    slots = layout.slots
    d, b, heads, layers = config.hidden_size, dtype_bytes, config.num_heads, len(config.layers)
    sized = [config.at(layer) for layer in config.layers]
    widest = max(sized, key=lambda one: (one.head_dim, one.num_key_value_heads), default=config)
    q, k = heads * widest.head_dim, widest.num_key_value_heads * widest.head_dim
    lowest, _ = lowest_trained_group(layout, layers)
    above = layers - lowest
    in_blocks = [slot for slot in slots if slot.name.startswith("model.layers.")]
    chosen = config.mixture.chosen if config.mixture else 1
    of_slot = {slot.name: slot.rank * (chosen if slot.experts else 1) for slot in in_blocks}
    ranks = sum(of_slot.values())
    gate_up_ranks = sum(rank for name, rank in of_slot.items() if _group(name) == GATE_UP)
    norms_after = sum(name is not None for name in (config.norms.after_attention, config.norms.after_mlp))
    halves = [_halves(config.at(layer), layer, b) for layer in config.layers[lowest:]]
    mlp = sum(halves) + (ranks - gate_up_ranks) * b
    gate_ups = [2 * _width(config, layer) for layer in config.layers[lowest:]]
    none = mlp + (sum(gate_ups) + gate_up_ranks) * b
    blocks = [half + gate_up * b for half, gate_up in zip(halves, gate_ups, strict=True)]
    again = max(blocks) + ranks // above * b if above else 0
    scratch = (d if config.norms.before_attention else 0) + max(gate_ups, default=0) // 2
    last = f"model.layers.{layers - 1}."
    last_ranks = dict.fromkeys((INPUT, OUTPUT, GATE_UP, DOWN, PER_LAYER_GATE, PER_LAYER_PROJECTION), 0)
    for slot in in_blocks:
        last_ranks[_group(slot.name)] += of_slot[slot.name] if slot.name.startswith(last) else 0
    unread = (d + norms_after * d + last_ranks[OUTPUT] + last_ranks[DOWN]) * b
    unread += (norms_after + (config.norms.before_mlp is not None)) * FLOAT32_BYTES
    unread += _decided(config, config.layers[-1], b) + _end(config, b)
    unread += (last_ranks[PER_LAYER_GATE] + last_ranks[PER_LAYER_PROJECTION]) * b
    gate_up = (2 * _width(config, config.layers[-1]) + last_ranks[GATE_UP]) * b
    mixers = [one.mixers[layer.mixer] for one, layer in zip(sized, config.layers, strict=True)]
    block_weights = sum(d * (sum(mixer.sizes) + mixer.width) for mixer in mixers)
    block_weights += sum(d * _mlp_rows(config, layer) for layer in config.layers)
    vocabulary = config.vocab_size * d * (1 if config.tied_head else 2)
    if (own := config.per_layer) is not None:
        block_weights += layers * 2 * d * own.width + own.layers * own.width * d
        vocabulary += own.vocab_size * own.layers * own.width
    # A table with trained rows is a copy of its own; a tensor trained in full has its gradient once beside the buffer.
    beside = sum(math.prod(tensor.shape) for tensor in layout.trained if tensor.token_ids is None)
    beside += config.vocab_size * d if any(tensor.token_ids is not None for tensor in layout.trained) else 0
    matrices = block_weights + vocabulary
    widths = [_width(config, layer) // (chosen if layer.experts else 1) for layer in config.layers]
    largest = max(2 * d * max(widths), *(d * sum(mixer.sizes) for mixer in mixers), config.vocab_size * d)
    shapes = {(config.vocab_size, d), *((2 * width, d) for width in widths), *((d, width) for width in widths)}
    shapes |= {shape for mixer in mixers for shape in ((sum(mixer.sizes), d), (d, mixer.width))}
    piece = max(_largest_tile(shape, _FLOATING[b], gradients=not unpacked_within) for shape in shapes)
    adapter_elements = layout.element_count
    head_slots = [slot for slot in slots if slot.name == HEAD]
    head_ranks = sum(slot.rank for slot in head_slots)
    # More than plain factors, which `trained_ends` computes.
    some_tokens = any(tensor.token_ids is not None for tensor in layout.trained)
    more_of_head = any(slot.use_dora or slot.lora_bias for slot in head_slots) or (some_tokens and config.tied_head)
    more_of_head = more_of_head or any(tensor.base_name.startswith(HEAD) for tensor in layout.trained)
    head_is_trained = more_of_head or some_tokens or head_ranks > 0
    dropout = any(slot.dropout > 0 for slot in in_blocks)
    # Compiled loops hold next to nothing besides what goes in and comes out; capped scores take torch's form.
    looped = loops_are_there() and config.attention_cap is None
    sums = _sums_of_factors(layout, b)
    more_in_blocks = bool(layout.trained) or any(slot.use_dora or slot.lora_bias for slot in in_blocks)
    at_work = config, b, dropout, more_in_blocks, sums
    block, mixing = _looped_block(*at_work) if looped else _block_at_work(config, b, dropout)
    kept: dict[Recompute, int] = {"none": none, "mlp": mlp, "block": above * d * b}
    no_reading: dict[Recompute, int] = {"none": unread + gate_up, "mlp": unread, "block": 0}
    beside_halves = {mode: (kept[mode] - sum(halves)) // max(1, above) for mode in ("none", "mlp")}
    of_each: dict[Recompute, list[int]] = {
        "none": [half + beside_halves["none"] for half in halves],
        "mlp": [half + beside_halves["mlp"] for half in halves],
        "block": [d * b] * above,
    }
    delta = [
        here + _delta_rule(config, b) if layer.mixer == GATED_DELTA else 0
        for here, layer in zip(_looped_block(*at_work)[1], config.layers, strict=True)
    ]
    # What is computed again beside the rule is of its own layer, not of the largest.
    less = [max(blocks) - own for own in blocks]
    delta_again = [max(0, here - saved) for here, saved in zip(delta[lowest:], less, strict=True)]
    of_rule = {"none": delta[lowest:], "mlp": delta[lowest:], "block": delta_again}
    # The last layer computes its MLP again for supervised tokens alone.
    of_mixer = {"none": mixing[lowest:], "mlp": mixing[lowest:], "block": [*mixing[lowest:-1], 0][:above]}
    softmax_in_place = loops_are_there() and config.logits.cap is None
    return ModelSize(
        dtype_bytes=b,
        weight_bytes=beside * b + (matrices * b if quantized_bytes is None else quantized_bytes),
        adapter_elements=adapter_elements,
        kept_bytes=kept,
        unread_bytes=no_reading if above else dict.fromkeys(_MODES, 0),
        block_bytes=block,
        attending_bytes={mode: _fullest(of_mixer[mode], of_each[mode], no_reading[mode]) for mode in _MODES},
        delta_bytes={mode: _fullest(of_rule[mode], of_each[mode], no_reading[mode]) for mode in _MODES},
        delta_heads=_delta_heads(config) if any(delta[lowest:]) else None,
        again_bytes={
            "none": 0,
            "mlp": max(gate_ups, default=0) * b,
            "block": again + (scratch * b if above else 0),
        },
        run_token_bytes=0 if looped else (2 * q + 2 * k) * b + 2 * k * FLOAT32_BYTES,
        run_product_bytes=0 if looped else (3 if config.attention_cap is None else 5) * heads * b,
        copied_token_bytes=0 if looped else (3 * q + 4 * k) * b,
        stream_bytes=d * b + _BATCH_BYTES + sum(config.rotary_dims) * FLOAT32_BYTES + _carried(config, layout, b),
        head_row_bytes=(3 if head_is_trained else 2) * d * b,
        head_chunk_bytes=config.vocab_size * b,
        softmax_rows=0 if softmax_in_place else max(1, SOFTMAX_ELEMENTS // config.vocab_size),
        softmax_row_bytes=config.vocab_size * FLOAT32_BYTES * _softmax_copies(config, b),
        head_adapter_bytes=head_ranks * (config.vocab_size + d) * b,
        checkpoint_bytes=adapter_elements * CHECKPOINT_COPIES * FLOAT32_BYTES,
        neutral_token_bytes=NEUTRAL_COPIES * config.vocab_size * b,
        cache_bytes=bytes_per_row(config, _FLOATING[b], 1) - bytes_per_row(config, _FLOATING[b], 0),
        mixer_state_bytes=bytes_per_row(config, _FLOATING[b], 0),
        unpacked_bytes=0 if quantized_bytes is None else min(piece, largest * b),
        expert_products=expert_products(config, layout, _FLOATING[b]),
        expert_choices=config.mixture.experts * sum(layer.experts for layer in config.layers) if config.mixture else 0,
        expert_share=min(1.0, 2 * chosen / config.mixture.experts) if config.mixture else 1.0,
        last_attending_bytes=mixing[-1] if above else 0,
        # And p, in whose buffer only the rows that are wanted stand where nothing has been computed again before.
        last_unread_bytes=unread
        + gate_up
        + (0 if config.layers[-1].experts else gate_ups[-1] // 2 * b if above else 0),
        head_chunk_rows=CHUNK_ROWS if more_of_head else chunk_rows(d, _FLOATING[b]),
        part_sums_bytes=_sums_of_a_part(layout, b),
        more_kernels=more_kernels(config, layout, _FLOATING[b]),
    )


def _softmax_copies(config: DecoderConfig, b: int) -> int:
    """How often a row of logits is there in float32: its softmax, what it is made from, and what a cap makes of it."""
    if config.logits.cap is not None:
        return 5  # also the capped logits of the rows before, which are let go one step later
    return 1 if b >= FLOAT32_BYTES else 2


def _halves(config: DecoderConfig, layer: LayerConfig, b: int) -> int:
    """Bytes per token that a block keeps without gate and up, and without what adapters keep."""
    mixer, qk_norm = config.mixers[layer.mixer], config.qk_norm if layer.mixer == ATTENTION else None
    norms_after = sum(name is not None for name in (config.norms.after_attention, config.norms.after_mlp))
    wide = sum(name is not None for name in config.norms)
    wide += {None: 0, "head": config.num_heads + config.num_key_value_heads, "width": 2}[qk_norm]
    ungated = 0
    if layer.mixer == GATED_DELTA and config.delta is not None:
        ungated, wide = mixer.width, wide + config.delta.value_heads
    elif layer.mixer == ATTENTION and config.attention_gate:
        ungated = mixer.width
    elif layer.mixer in (VALUE_NORMED, KEYS_AS_VALUES, SHARED_KEYS):
        wide += config.num_heads + (0 if layer.mixer == SHARED_KEYS else 2 * config.num_key_value_heads)
    output = 0 if _comes_again(config, layer, b) else mixer.width
    elements = (2 + norms_after) * config.hidden_size + sum(mixer.sizes) + output + ungated
    return elements * b + wide * FLOAT32_BYTES + _decided(config, layer, b) + _end(config, b)


def _comes_again(config: DecoderConfig, layer: LayerConfig, b: int) -> bool:
    """Whether a layer's attention gives its output again in the backward (`ops.attention`), so that it is not kept."""
    plain = layer.mixer == ATTENTION and not config.attention_gate and config.attention_cap is None
    return plain and loops_are_there() and b == FLOAT32_BYTES


def _end(config: DecoderConfig, b: int) -> int:
    """Bytes per token that the end of a block keeps, where a layer has an input of its own: x₂, gate, norm's input."""
    return 0 if config.per_layer is None else (2 * config.hidden_size + config.per_layer.width) * b + FLOAT32_BYTES


def _carried(config: DecoderConfig, layout: AdapterLayout, b: int) -> int:
    """Bytes per token of what a pass carries beside the stream until it is over.

    Keys and values that layers share and their gradients; the layers' inputs, the norm's input that they are made from
    and the embedded tokens, and the inputs' gradients where what makes them is trained.
    """
    lent = [config.at(config.layers[number]) for number in config.lenders]
    found = sum(2 * one.num_key_value_heads * one.head_dim * (b + max(b, FLOAT32_BYTES)) for one in lent)
    if (own := config.per_layer) is not None:
        copies = 3 if lowest_trained_group(layout, len(config.layers)) == (0, -1) else 2
        found += (copies * own.layers * own.width + config.hidden_size) * b + own.layers * FLOAT32_BYTES
    return found


def _delta_rule(config: DecoderConfig, b: int) -> int:
    """Bytes per token beside the gradients of what enters and leaves it: convolved, normed, and their gradients."""
    sizes = config.delta
    assert sizes is not None
    keys = 2 * sizes.key_heads * sizes.key_width
    values = sizes.value_heads * sizes.value_width
    return (2 * values + sizes.channels) * b + (2 * keys + 4 * sizes.value_heads) * max(b, FLOAT32_BYTES)


def _delta_heads(config: DecoderConfig) -> HeadSizes:
    sizes = config.delta
    assert sizes is not None
    return HeadSizes(sizes.key_heads, sizes.value_heads // sizes.key_heads, sizes.key_width, sizes.value_width)


def _largest_tile(shape: tuple[int, int], dtype: torch.dtype, *, gradients: bool) -> int:
    """Bytes of what a library's products unpack at once of a matrix of this shape; those of gradients too, or not."""
    matrix = torch.empty(shape, dtype=dtype, device="meta")
    elements = row_tiles(matrix)[0].stop * shape[1]
    if gradients and not sums_over_rows(matrix):
        elements = max(elements, column_tiles(matrix)[0].stop * shape[0])
    return int(elements) * dtype.itemsize


def _width(config: DecoderConfig, layer: LayerConfig) -> int:
    """Elements per token of the MLP's gate, or of those of all the experts that a token goes to."""
    mixture = config.mixture
    return mixture.chosen * mixture.width if layer.experts and mixture else config.at(layer).intermediate_size


def _mlp_rows(config: DecoderConfig, layer: LayerConfig) -> int:
    """Rows or columns of all of the MLP's matrices, or of the router's and of all experts' together."""
    mixture = config.mixture
    if not layer.experts or mixture is None:
        return 3 * config.at(layer).intermediate_size
    return mixture.experts * (3 * mixture.width + 1)


def _decided(config: DecoderConfig, layer: LayerConfig, b: int) -> int:
    """Bytes per token of a layer's choices, three times as integers, and shares; nothing without experts."""
    mixture = config.mixture
    if not layer.experts or mixture is None:
        return 0
    wide = mixture.experts if mixture.of_all else mixture.chosen
    same = not mixture.of_all and b >= FLOAT32_BYTES  # then the shares are kept once
    return 3 * mixture.chosen * INTEGER_BYTES + wide * max(b, FLOAT32_BYTES) + (0 if same else mixture.chosen * b)


def _group(name: str) -> int:
    """Which of its block's groups a module belongs to."""
    return group_of(name.split(".", 3)[3])


def _fullest(at_work: Sequence[int], kept: Sequence[int], unread: int) -> int:
    """The most of what is alive while a layer is differentiated less what the layers above it have let go.

    Args:
        at_work, kept: bytes per token of each layer, the last one last.
        unread: what the last one does not keep of some tokens.
    """
    most = gone = 0
    for bytes_here, kept_here in zip(reversed(at_work), reversed(kept), strict=True):
        most = max(most, bytes_here - max(0, gone - unread))
        gone += kept_here
    return most


def _sums_of_factors(layout: AdapterLayout, b: int) -> dict[int, int]:
    """Bytes per token that `ops.low_rank.low_rank_backward` adds ∂L/∂h up in, by group: those of the layer with most.

    Columns of what comes in are its tasks, and each has sums of its own. Those of parts of the rows do not grow with
    the tokens (`_sums_of_a_part`); what the few rows of an expert take is left out as small.
    """
    found: Counter[tuple[str, int]] = Counter()
    for slot in layout.slots:
        if slot.name.startswith("model.layers.") and not slot.experts:
            wide = -(-slot.rank // _LANES) * _LANES * max(b, FLOAT32_BYTES)
            found[slot.name.split(".")[2], _group(slot.name)] += -(-slot.out_features // _TASK_COLUMNS) * wide
    if not loops_are_there() or by_parts_of_rows(_FLOATING[b]):
        found.clear()
    groups = INPUT, OUTPUT, GATE_UP, DOWN
    return {group: max((size for (_, own), size in found.items() if own == group), default=0) for group in groups}


def _sums_of_a_part(layout: AdapterLayout, b: int) -> int:
    """Bytes that gradients of factors are added up in for each part of the rows: of the pass and the layer with most.

    A pass makes those of a group's lora_A or of its lora_B; that of a gated unit gate's and up's, and down's lora_A.
    """
    if not loops_are_there() or not by_parts_of_rows(_FLOATING[b]):
        return 0
    found: Counter[tuple[str, int, bool]] = Counter()
    for slot in layout.slots:
        if slot.name.startswith("model.layers.") and not slot.experts:
            rank, layer, group = -(-slot.rank // _LANES) * _LANES, slot.name.split(".")[2], _group(slot.name)
            found[layer, group, True] += rank * slot.in_features
            found[layer, group, False] += rank * slot.out_features
            if group == DOWN:
                found[layer, GATE_UP, False] += rank * slot.in_features
    return max(found.values(), default=0) * max(b, FLOAT32_BYTES)


def _looped_block(
    config: DecoderConfig, b: int, dropout: bool, more: bool, sums: Mapping[int, int]
) -> tuple[int, list[int]]:
    """Bytes per token that are alive under compiled loops, besides what is kept: in MLPs, and in each layer's mixing.

    In the MLP's half d_p, in whose place p is later, and the stream's gradients are, and p beside d_p where more than
    factors is trained: d_gate_up takes the place of what is kept. Of experts the rows that enter are and their
    gradient, or those that leave and p, p̂ and theirs; in attention's d_x₁, d_n₁, in whose place the norm's gradient is
    later, d_o and d_qkv, with another mixer the gradients of its output and its input. n₁ is there where more than
    factors is trained, unless the stream enters the halves as it is. In both is attention's output where it is made
    again, in a buffer that stays for the block below.
    """
    d, f = config.hidden_size, max(config.at(layer).intermediate_size for layer in config.layers)
    masked = max(f, d) * (b + 2) if dropout else 0
    n1 = d if more and config.norms.before_attention else 0
    sized = [(config.at(layer), layer) for layer in config.layers]
    output = max((one.mixers[layer.mixer].width for one, layer in sized if _comes_again(one, layer, b)), default=0)
    mixing = [(n1 + 2 * d + output + _mixing(one, layer)) * b + masked for one, layer in sized]
    # While there are sums of a group, nothing is written yet of the gradient of what enters it; those of the output are
    # there before anything else.
    mixing = [max(here, here - d * b + sums[INPUT], (2 * d + output) * b + sums[OUTPUT]) for here in mixing]
    factors = (2 * d + (2 if more else 1) * f) * b + max(sums[GATE_UP], sums[DOWN])
    mlp = max((d + _experts_at_work(config, 3)) * b, factors)
    return output * b + mlp + masked, mixing


def _experts_at_work(config: DecoderConfig, narrow: int) -> int:
    """Elements per token while experts are differentiated, with so many of the narrow rows; 0 without experts."""
    if config.mixture is None:
        return 0
    chosen, width = config.mixture.chosen, config.mixture.width
    return chosen * max(config.hidden_size + narrow * width, 2 * config.hidden_size + 2 * width)


def _mixing(config: DecoderConfig, layer: LayerConfig) -> int:
    """Elements per token of the gradients of what enters and what leaves a mixer, and of what it makes again."""
    mixer = config.mixers[layer.mixer]
    found = sum(mixer.sizes) + mixer.width
    if layer.mixer in (VALUE_NORMED, KEYS_AS_VALUES, SHARED_KEYS):
        # Everything normed once more, and all gradients before they find their places.
        keys = 2 * config.num_key_value_heads * config.head_dim
        # And of the stream, from above: the gradient behind the norm after, and what the norms work in.
        return found + 2 * config.hidden_size + 2 * mixer.width + (1 if layer.mixer == SHARED_KEYS else 2) * keys
    if layer.mixer != ATTENTION:
        return found
    q, k = mixer.width, config.num_key_value_heads * config.head_dim
    found += q + k if config.qk_norm else 0  # normed and turned once more
    # Of gates: their gradient and that of attention's output, and [q k v]'s before it finds its place.
    return found + 3 * q + 2 * k if config.attention_gate else found


def _block_at_work(config: DecoderConfig, b: int, dropout: bool) -> tuple[int, list[int]]:
    """The same in torch's form: outside attention, and while it attends, for which `StepShape` counts more."""
    d, sized = config.hidden_size, [config.at(layer) for layer in config.layers]
    f = max(one.intermediate_size for one in sized)
    q, k = (max(heads * one.head_dim for one in sized) for heads in (config.num_heads, config.num_key_value_heads))
    norm = 3 * d * FLOAT32_BYTES
    masked = max(f, d) * (b + 2) if dropout else 0
    mlp = max((d + 4 * f) * b, (2 * d + f) * b + norm) + masked
    if config.mixture is not None:
        mlp = max(mlp, (d + _experts_at_work(config, 4)) * b)
    rotation = (3 * d + 2 * q + 2 * k) * b + max(norm, (3 * q + 3 * k) * FLOAT32_BYTES)
    others = [
        one.mixers[layer.mixer] for one, layer in zip(sized, config.layers, strict=True) if layer.mixer != ATTENTION
    ]
    mixing = max(((3 * d + sum(mixer.sizes) + mixer.width) * b + norm for mixer in others), default=0)
    return max(mlp, rotation, mixing), [(2 * d + 2 * q + 2 * k) * b for _ in config.layers]
