"""Incremental forward of the decoder engine: new tokens against a KV cache, for rows of different lengths.

    K ← [K_seen; K_new],  V ← [V_seen; V_new],   o_i = softmax(c q_i K_{j ≤ i}ᵀ) V_{j ≤ i}      [arXiv:1911.02150, §2.4]

A causal decoder's keys and values of a token depend on what stands before it only, so they are computed once. Two ways
in: `extend` takes several new tokens a row (prompts, packed without padding; further turns of a conversation), `step`
one new token for each row. Both run the block's own ops, with the adapter unmerged, and keep nothing for a backward
pass.

The attention of new tokens on seen ones is torch's fused kernel. In `step` the heads of a group, which share keys and
values, stand where the kernel expects queries, so that every key is read once, and rows of other lengths are masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from backhand.nn.adapted_group import group_forward
from backhand.nn.attention_half import BlockContext, prepare_qkv
from backhand.nn.batch import document_runs
from backhand.nn.block_adapter import BlockAdapter
from backhand.nn.decoder import Decoder
from backhand.nn.decoder_weights import BlockWeights
from backhand.nn.kv_cache import KVCache
from backhand.nn.mlp_half import mlp_half_forward
from backhand.nn.scratch import Scratch
from backhand.ops.attention import attention_forward
from backhand.ops.rms_norm import rms_norm_forward

# New tokens that one pass of `extend` computes at most: bounds its memory, costs nothing in speed.
CHUNK_TOKENS = 4096

# Likeliest tokens of each row whose logits are computed in float32 whatever the compute dtype.
EXACT_CANDIDATES = 16

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v of the new tokens) → attention output, (tokens, heads, head_dim); k and v are then in the cache."""


class _Piece(NamedTuple):
    """New tokens of one row: where they stand among the packed ones, and how much of the row is in the cache before."""

    row: int
    start: int
    new: int
    seen: int


class IncrementalDecoder:
    """A decoder with a KV cache of several rows.

    Args:
        decoder: base weights and, if one is attached, the adapter, as of now: make a new one after attach or detach.
        rows: how many sequences there can be at once.
        capacity: tokens of room a row has at first; it grows when needed.

    Attributes:
        cache: keys and values; rows are taken into use and dropped there.
    """

    def __init__(self, decoder: Decoder, *, rows: int = 1, capacity: int = 256) -> None:
        self.decoder = decoder
        self.cache = KVCache(decoder.config, rows, capacity, dtype=decoder.dtype, device=decoder.device)
        decoder.refresh()
        self._adapters = decoder.block_adapters(None)

    @torch.no_grad()
    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to rows of the cache.

        Args:
            rows: numbers of rows in use, each at most once.
            tokens: of each of these rows, at least one token.

        Returns:
            (len(rows), vocab) logits after each row's last token, see `head_logits`.

        Raises:
            ValueError: for a row without new tokens.
        """
        if any(len(new) == 0 for new in tokens):
            raise ValueError("every row needs at least one new token")
        self.cache.reserve(max(self.cache.lengths[row] + len(new) for row, new in zip(rows, tokens, strict=True)))
        last = torch.empty(
            len(rows), self.decoder.config.hidden_size, dtype=self.decoder.dtype, device=self.decoder.device
        )
        for chunk in _chunks([len(new) for new in tokens]):
            pieces: list[_Piece] = []
            packed: list[int] = []
            for index, start, stop in chunk:
                pieces.append(_Piece(rows[index], len(packed), stop - start, self.cache.lengths[rows[index]]))
                packed.extend(tokens[index][start:stop])
            x = self._extend_chunk(pieces, packed)
            for (index, _, _), piece in zip(chunk, pieces, strict=True):
                self.cache.lengths[piece.row] += piece.new
                last[index] = x[piece.start + piece.new - 1]
        return head_logits(self.decoder, last)

    @torch.no_grad()
    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Append one token to every row in use.

        Args:
            token_ids: the new token of row 0, 1, … of the cache.

        Returns:
            (rows in use, vocab) logits after the new token, see `head_logits`.
        """
        lengths = self.cache.lengths
        if len(token_ids) != len(lengths):
            raise ValueError(f"{len(token_ids)} tokens for {len(lengths)} rows in use")
        self.cache.reserve(max(lengths) + 1)
        device = self.decoder.device
        positions = torch.tensor(lengths, device=device)
        equal_length = lengths[0] if min(lengths) == max(lengths) else None
        masks = {
            window: _step_mask(lengths, window, device)
            for window in {layer.window for layer in self.decoder.config.layers}
        }

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache.write_next(layer, positions if equal_length is None else equal_length, k, v)
            first, mask = masks[self.decoder.config.layers[layer].window]
            span = (slice(len(lengths)), slice(None), slice(first, max(lengths) + 1))
            grouped = q.reshape(len(lengths), k.shape[1], -1, q.shape[2])
            output = scaled_dot_product_attention(
                grouped,
                self.cache.keys[layer][span],
                self.cache.values[layer][span],
                attn_mask=mask,
                scale=self.decoder.config.attention_scaling,
            )
            return output.flatten(1, 2)

        x = self._blocks(torch.tensor(token_ids, device=device), positions, attend)
        self.cache.lengths = [length + 1 for length in lengths]
        return head_logits(self.decoder, x)

    def _extend_chunk(self, pieces: Sequence[_Piece], packed: Sequence[int]) -> Tensor:
        """The last block's output for the packed new tokens, (tokens, hidden); keys and values are then cached."""
        config, device = self.decoder.config, self.decoder.device
        positions = torch.cat([torch.arange(p.seen, p.seen + p.new, device=device) for p in pieces])
        runs = [list(group) for _, group in groupby(enumerate(pieces), key=_batched_with)]
        masks: dict[tuple[int, int, int | None], Tensor | None] = {}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for piece in pieces:
                span = slice(piece.start, piece.start + piece.new)
                self.cache.write(layer, piece.row, piece.seen, k[span], v[span])
            window, scaling = config.layers[layer].window, config.attention_scaling
            if not any(piece.seen for piece in pieces):
                documents = document_runs(tuple(piece.new for piece in pieces))
                return attention_forward(q, k, v, documents, scaling, window)[0]
            output = torch.empty_like(q)
            for run in runs:
                (_, piece), count = run[0], len(run)
                key = (piece.seen, piece.new, window)
                if key not in masks:
                    masks[key] = _extend_mask(*key, device)
                span = slice(piece.start, piece.start + count * piece.new)
                keys, values = (
                    buffers[layer][piece.row : piece.row + count, :, : piece.seen + piece.new]
                    for buffers in (self.cache.keys, self.cache.values)
                )
                attended = scaled_dot_product_attention(
                    q[span].reshape(count, piece.new, *q.shape[1:]).transpose(1, 2),
                    keys,
                    values,
                    attn_mask=masks[key],
                    scale=scaling,
                    enable_gqa=True,
                )
                output[span] = attended.transpose(1, 2).flatten(0, 1)
            return output

        return self._blocks(torch.tensor(packed, device=device), positions, attend)

    def _blocks(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Embedding and all blocks, (tokens, hidden)."""
        decoder = self.decoder
        x = decoder.embed(token_ids)
        tables, scratch = decoder.rotary_tables(positions), Scratch()
        for index, layer in enumerate(decoder.config.layers):
            context = BlockContext(decoder.config, layer.window, tables[layer.rotary], (), scratch)
            x = _block(x, decoder.active.blocks[index], self._adapters[index], context, index, attend)
        return x


def _block(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext, index: int, attend: Attend
) -> Tensor:
    """x₂ of one block, (tokens, hidden), with its attention left to `attend`: see `nn.block`."""
    config = context.config
    q_width, k_width = config.num_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    n1, _ = rms_norm_forward(x0, weights.attention_norm, config.norm_eps, config.norm_offset)
    qkv, _ = group_forward(n1, weights.qkv, weights.qkv_bias, (q_width, k_width, k_width), adapter.qkv)
    q, k, v, _, _ = prepare_qkv(qkv, weights, context)
    output = attend(index, q, k, v)
    sandwich = weights.after_attention_norm
    residual = None if sandwich is not None else x0
    x1, _ = group_forward(
        output.flatten(1), weights.output, weights.output_bias, (config.hidden_size,), adapter.output, residual
    )
    if sandwich is not None:
        x1 = rms_norm_forward(x1, sandwich, config.norm_eps, config.norm_offset)[0].add_(x0)
    return mlp_half_forward(x1, weights, adapter, config, context.scratch, keep_gate_up=False)[0]


def head_logits(decoder: Decoder, x: Tensor) -> Tensor:
    """Final norm and output projection for choosing a token: (rows, hidden) to (rows, vocab), float32 or wider.

    A narrow product rounds logits of 16 to 32, where a language model's largest ones lie, to steps of 1/8: of six
    first tokens of SmolLM2's answers, two came out with the likeliest tokens equal or swapped. The likeliest of each
    row are therefore multiplied again in float32, from the same weights; the others stay as rounded.
    """
    narrow = decoder.head(x)
    if narrow.dtype in (torch.float32, torch.float64):
        return narrow
    candidates = narrow.topk(min(EXACT_CANDIDATES, narrow.shape[1]), sorted=False).indices
    weights, adapter = decoder.active, decoder.head_adapter()
    normed, _ = rms_norm_forward(x, weights.final_norm, decoder.config.norm_eps, decoder.config.norm_offset)
    columns = normed.float().unsqueeze(2)
    exact = (weights.head[candidates].float() @ columns).squeeze(2)
    (factors,), extras = adapter.factors, adapter.extras
    if factors is not None:
        h = factors.lora_A.float() @ columns
        exact += factors.scaling * (factors.lora_B[candidates].float() @ h).squeeze(2)
        if extras is not None and (magnitude := extras.magnitudes[0]) is not None:
            exact *= (magnitude.magnitude / magnitude.norm)[candidates]
        if extras is not None and (lora_bias := extras.lora_biases[0]) is not None:
            exact += factors.scaling * lora_bias.float()[candidates]
    return narrow.float().scatter_(1, candidates, exact)


def _chunks(counts: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """Split rows' new tokens into passes of at most CHUNK_TOKENS: lists of (index, start, stop), in order."""
    chunks: list[list[tuple[int, int, int]]] = [[]]
    room = CHUNK_TOKENS
    for index, count in enumerate(counts):
        start = 0
        while start < count:
            # A row is only cut where it does not fit into a pass of its own.
            if room == 0 or (count - start > room and chunks[-1] and count - start <= CHUNK_TOKENS):
                chunks.append([])
                room = CHUNK_TOKENS
            stop = min(count, start + room)
            chunks[-1].append((index, start, stop))
            room -= stop - start
            start = stop
    return chunks


def _batched_with(numbered: tuple[int, _Piece]) -> tuple[int, int, int]:
    """Neighbours for which this is equal lie in neighbouring rows and are equally long, so one kernel call does."""
    number, piece = numbered
    return piece.row - number, piece.new, piece.seen


def _extend_mask(seen: int, count: int, window: int | None, device: torch.device) -> Tensor:
    """(count, seen + count) booleans: which keys each new token sees."""
    queries = torch.arange(seen, seen + count, device=device)
    distance = queries[:, None] - torch.arange(seen + count, device=device)[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _step_mask(lengths: Sequence[int], window: int | None, device: torch.device) -> tuple[int, Tensor | None]:
    """The first key that any row's new token sees, and which of the keys from there on each row's sees.

    The mask is (rows, 1, 1, keys) booleans; None where every row sees all of these keys.
    """
    lowest, highest = min(lengths), max(lengths)
    first = 0 if window is None else max(0, lowest + 1 - window)
    if lowest == highest:
        return first, None
    keys = torch.arange(first, highest + 1, device=device)
    distance = torch.tensor(lengths, device=device)[:, None] - keys[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    return first, visible[:, None, None, :]
