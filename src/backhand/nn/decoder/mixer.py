"""Interfaces of a block's sublayers: the context that they receive, their saved tensors, and the functions of a mixer.

    n₁ = norm(x₀),   z = n₁ W_inputᵀ (+ LoRA),   y = mixer(z),   x₁ = x₀ + y W_outputᵀ (+ LoRA)

A mixer combines the tokens of a document. The norm, both groups of projections and the sum are in `nn.decoder.block`
and the same for all mixers. Each mixer has its own file: `attention_mixer`, `shared_attention`, `short_conv`,
`delta_mixer`, `ssm_mixer` and `parallel_mixer`. Each has a forward, a backward by hand, and a function that continues a
text during generation.

During generation, attention stores the keys and values of every token (`kv_cache`). The other mixers keep a state of
fixed size that summarizes all tokens of a row. The state after fewer tokens cannot be computed from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.cross_layer import CrossLayer
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import DecoderConfig, LayerConfig
from backhand.nn.scratch import Scratch
from backhand.ops.document_groups import SegmentRun
from backhand.ops.layer_norm import NormSaved
from backhand.ops.rotary import RotaryTable


class BlockContext(NamedTuple):
    """Inputs of a block in addition to x₀, weights and adapter."""

    config: DecoderConfig  # with the sizes of this layer
    layer: LayerConfig  # the layer's mixer, and the window of attention
    rotary: RotaryTable | None  # angles of the tokens' positions; None in layers without rotary embedding
    segment_runs: tuple[SegmentRun, ...]  # neighbouring segments of equal length, which attention computes in one call
    scratch: Scratch  # buffers for temporaries, shared by all blocks of a pass
    query_rotary: RotaryTable | None = None  # angles of queries if the family scales queries by their position
    # (P,) int64, the positions that the last block computes after its mixer; None in all other blocks: all positions
    loss_positions: Tensor | None = None
    number: int = 0  # number of the layer
    cross_layer: CrossLayer | None = None  # tensors read in addition to the stream, in families that have any


class MixerSaved(NamedTuple):
    """Tensors saved by the mixer sublayer for its backward. T and P are defined in `nn.decoder.block`."""

    # of the norm before the sublayer: (T, 1) inverse RMS, or (T, 2) of a layer norm; None without that norm
    statistics: Tensor | None
    # (T, Σ sizes): output of the input projections, which the mixer reads: [q k v] for attention, which rotates it in
    # place unless a q/k norm comes first
    projected: Tensor
    mixed: Tensor | None  # (T, width): o, the output of the mixer; None if the mixer's backward recomputes it
    inner: Any  # saved by the mixer's own forward
    h_input: Tensor  # (T, Σ rank)
    h_output: Tensor  # (P, rank)
    post_norm: NormSaved | None  # saved by the norm after the sublayer; None without that norm
    h_second: Tensor | None = None  # (P, rank) of a second output projection, if there is one


class MLPSaved(NamedTuple):
    """Tensors saved by the MLP sublayer. P is defined in `nn.decoder.block`; f is the width of the MLP."""

    # of the norm before the sublayer: (P, 1) inverse RMS, or (P, 2) of a layer norm; None without that norm
    statistics: Tensor | None
    gate_up: Tensor | None  # (P, 2f), or (P, f) without a gate; None if it is recomputed
    h_gate_up: Tensor | None  # (P, Σ rank); None if it is recomputed
    h_down: Tensor  # (P, rank)
    post_norm: NormSaved | None  # saved by the norm after the sublayer; None without that norm


class Rows(NamedTuple):
    """New tokens of neighbouring cache rows: `rows` rows starting at `first`, with `new` tokens each."""

    first: int
    rows: int
    start: int  # position of their first token among the packed tokens
    new: int


def _never_recomputed(_output: Tensor, _context: BlockContext) -> bool:
    return False


class Mixer(NamedTuple):
    """Functions of a mixer."""

    # (input (T, Σ sizes), weights, context) to output (T, width) and the tensors saved for backward
    forward: Callable[[Tensor, BlockWeights, BlockContext], tuple[Tensor, Any]]
    # (∂L/∂output, tensors saved by the sublayer, weights, context, adapter, output) to ∂L/∂input, (T, Σ sizes). If the
    # output is not saved, the last argument is None or a buffer that receives the recomputed output
    backward: Callable[[Tensor, MixerSaved, BlockWeights, BlockContext, BlockAdapter, Tensor | None], Tensor]
    # (config, rows, dtype, device) to the states for generation, tensors of (rows, …), zero for rows without a token.
    # None for attention, whose keys and values are in the KV cache
    states: Callable[[DecoderConfig, int, torch.dtype, torch.device | str], tuple[Tensor, ...]] | None = None
    # (input (new tokens, Σ sizes), weights, states, rows, config) to output (new tokens, width). Updates the states of
    # the rows in place. None for attention
    extend: Callable[[Tensor, BlockWeights, tuple[Tensor, ...], Sequence[Rows], DecoderConfig], Tensor] | None = None
    # (input (T, Σ sizes), weights, context) to q, k and v, (T, heads, head_dim), and optionally more. None for mixers
    # other than attention
    qkv: Callable[[Tensor, BlockWeights, BlockContext], tuple[Any, ...]] | None = None
    # (output, context) to True if the backward recomputes the output, so that it is not saved
    recomputes_output: Callable[[Tensor, BlockContext], bool] = _never_recomputed
    # (tensors saved by the sublayer, weights, context) to the recomputed output. None if the output is always saved
    output: Callable[[MixerSaved, BlockWeights, BlockContext], Tensor] | None = None
