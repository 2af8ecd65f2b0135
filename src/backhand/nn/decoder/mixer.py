"""What either half of a block is given and keeps, and what mixes the tokens of a document in the first.

    n₁ = norm(x₀),   z = n₁ W_inputᵀ (+ LoRA),   y = mixer(z),   x₁ = x₀ + y W_outputᵀ (+ LoRA)

The norm, both groups of projections and the sum are `nn.decoder.block`'s and the same for all. Between them stands
attention (`attention_mixer`) or another mixer, each in a file of its own: `short_conv`. Each has a forward, a backward
by hand, and a way to go on from what it has seen when text is generated.

Attention keeps keys and values of every token then (`kv_cache`). Another mixer keeps a state of fixed size, which
stands for all tokens of a row at once: the state of fewer tokens cannot be had from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.nn.batch import Scratch
from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.cross_layer import CrossLayer
from backhand.nn.decoder.family import DecoderConfig, LayerConfig
from backhand.nn.decoder.weights import BlockWeights
from backhand.ops.document_groups import Run
from backhand.ops.rms_norm import RMSNormSaved
from backhand.ops.rotary import RotaryTable


class BlockContext(NamedTuple):
    """What a block needs to know of the model and the batch, besides x₀, weights and adapter."""

    config: DecoderConfig  # with the layer's sizes
    layer: LayerConfig  # its mixer, and attention's window
    rotary: RotaryTable | None  # of the tokens' positions; None where nothing turns
    runs: tuple[Run, ...]  # the documents' segments
    scratch: Scratch  # one for all blocks of a pass, for what none of them keeps
    query_rotary: RotaryTable | None = None  # of queries, where these are scaled by their position
    loss_positions: Tensor | None = None  # (loss positions,) int64: the positions of x₂ that are read; None for all
    number: int = 0  # of the layer
    cross_layer: CrossLayer | None = None  # what layers have beside the stream, in families where they have anything


class MixerSaved(NamedTuple):
    """What the first half keeps for backward; T tokens."""

    factor: Tensor | None  # (T, 1) of the norm before, if any
    input: Tensor  # (T, Σ sizes): what the first group gave; attention's rotated in place, where no norm is before it
    output: Tensor | None  # (T, width): what the mixer gave; None where its backward recomputes it
    own: Any  # what the mixer's forward returned for its backward
    h_input: Tensor  # (T, Σ rank)
    h_output: Tensor  # (T, rank), or (loss positions, rank)
    projected: RMSNormSaved | None  # input and factor of the norm after, if any


class MLPSaved(NamedTuple):
    """The MLP half's kept tensors; where only some of x₂ is loss_positions, T stands for that; f is the MLP's width."""

    factor: Tensor | None  # (T, 1) of the norm before, if any
    gate_up: Tensor | None  # (T, 2f); None when recomputed
    h_gate_up: Tensor | None  # (T, Σ rank); None when recomputed
    h_down: Tensor  # (T, rank)
    projected: RMSNormSaved | None  # input and factor of the norm after, if any


class Rows(NamedTuple):
    """New tokens of neighbouring rows of a cache: `rows` of them, from `first` on, have `new` each."""

    first: int
    rows: int
    start: int  # where theirs begin among the packed tokens
    new: int


def _keeps_output(_output: Tensor, _config: DecoderConfig) -> bool:
    return False


class Mixer(NamedTuple):
    """A mixer's functions."""

    # (input (T, Σ sizes), weights, context) to output (T, width) and what backward needs beside both
    forward: Callable[[Tensor, BlockWeights, BlockContext], tuple[Tensor, Any]]
    # (∂L/∂output, what the half kept, weights, context, adapter, the output) to ∂L/∂input, (T, Σ sizes). The output is
    # None, or a place that receives it, where it is not kept
    backward: Callable[[Tensor, MixerSaved, BlockWeights, BlockContext, BlockAdapter, Tensor | None], Tensor]
    # (config, rows, dtype, device) to what it keeps when text is generated, tensors of (rows, …), all zeros for rows
    # without a token; None for attention, whose keys and values grow with the text
    states: Callable[[DecoderConfig, int, torch.dtype, torch.device | str], tuple[Tensor, ...]] | None = None
    # (input (new tokens, Σ sizes), weights, states, rows, config) to output (new tokens, width); the rows' states are
    # then those behind the new tokens. None for attention
    continued: Callable[[Tensor, BlockWeights, tuple[Tensor, ...], Sequence[Rows], DecoderConfig], Tensor] | None = None
    # (input (T, Σ sizes), weights, context) to q, k and v (T, heads, head_dim) and perhaps more; None for what is not
    # attention
    attending: Callable[[Tensor, BlockWeights, BlockContext], tuple[Any, ...]] | None = None
    # (output, config) to whether the backward recomputes it, so that it need not be kept
    recomputes_output: Callable[[Tensor, DecoderConfig], bool] = _keeps_output
    # (what the half kept, weights, context) to the output, recomputed by itself; None where it is kept
    output: Callable[[MixerSaved, BlockWeights, BlockContext], Tensor] | None = None
