"""Incremental forward of the decoder engine: new tokens with a KV cache, for rows of different lengths.

    K ← [K_seen; K_new],  V ← [V_seen; V_new],   o_i = softmax(c q_i K_{j ≤ i}ᵀ) V_{j ≤ i}      [arXiv:1911.02150, §2.4]

In a causal decoder, the keys and values of a token depend only on the tokens before it, so they are computed once.
There are two entry points. `extend` adds several new tokens per row (prompts, packed without padding; further turns of
a conversation). `step` adds one token to each row. Both use the ops of the block, with the adapter unmerged, and save
nothing for a backward pass.

In `extend`, new tokens attend to cached ones by blocks of queries (`ops.attention_blocks`). In `step` they use torch's
fused kernel, or plain products if scores are capped or there are sinks. The heads that share keys and values take the
kernel's query axis, so that each key is read once. Rows of different lengths are masked.

If the family allows it, `step` is one compiled call for all blocks (`nn.decoder.decode_step`), which reads keys where
they are stored. torch's kernel needs the keys of a row contiguously. They are contiguous if the row grew alone. For
several rows, or if other rows took the next pages, one layer at a time is copied.

A mixer other than attention continues from its state of each row and updates it (`nn.decoder.mixer`).

If rotary angles depend on the document's length (longrope with two lists), cached keys are rotated for the length at
that time. A row that grows beyond the limit of a list is recomputed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from backhand.errors import not_none
from backhand.kernels.builds import kernels_available
from backhand.kernels.few_rows import QUICK_ROW
from backhand.nn.batch import document_runs
from backhand.nn.decoder.attention_mixer import gated_output, layer_scores
from backhand.nn.decoder.block import MIXERS, mlp_sublayer_forward
from backhand.nn.decoder.decode_step import DecodeStep, decode_step
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.forward_backward import require_head
from backhand.nn.decoder.kv_cache import KVCache, Where
from backhand.nn.decoder.mixer import BlockContext, Rows
from backhand.nn.decoder.ple_block import ple_forward
from backhand.nn.decoder.projections import group_forward, mixer_output_forward, pre_norm_forward
from backhand.nn.decoder.weights import DecoderWeights
from backhand.nn.scratch import Scratch
from backhand.ops.attention import attention_forward
from backhand.ops.attention_blocks import Scores, attention_blocks_forward
from backhand.ops.frozen_matrix import frozen_rows
from backhand.ops.logits_rule import capped, ruled
from backhand.ops.rms_norm import rms_norm_forward

# Maximum number of new tokens per pass of `extend`. It bounds the memory and costs no speed.
CHUNK_TOKENS = 4096
# Number of likeliest tokens per row whose logits are recomputed in float32, for any compute dtype.
EXACT_CANDIDATES = 16
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v of the new tokens) → attention output, (tokens, heads, head_dim). It also caches k and v."""
Head = Callable[[Decoder, Tensor], Tensor]
"""(decoder, output of its last block, (rows, hidden)) → logits, (rows, vocab)."""


class _Piece(NamedTuple):
    """New tokens of one row: their position among the packed tokens, and the number of cached tokens before them."""

    row: int
    start: int
    new: int
    seen: int
    row_length: int  # length of the row after the whole append


class IncrementalDecoder:
    """A decoder with a KV cache for several rows.

    Args:
        decoder: base weights and the attached adapter, if any. After attach or detach, another object is needed.
        rows: maximum number of sequences.
        capacity: initial number of tokens of all rows together. The cache grows if necessary.
        head: computes logits; None for `head_logits`.

    Attributes:
        cache: keys and values. Rows are added and removed there.

    Raises:
        UsageError: the model is an encoder or has no head.
    """

    def __init__(self, decoder: Decoder, *, rows: int = 1, capacity: int = 256, head: Head | None = None) -> None:
        require_head(decoder.config)
        self.decoder = decoder
        self._head = head or head_logits
        # A single answer, whose bits are not compared with another's.
        self._quick = rows == 1 and head is None
        self.cache = KVCache(decoder.config, rows, capacity, dtype=decoder.dtype, device=decoder.device)
        decoder.refresh()
        self._adapters = decoder.block_adapters(None)
        self._limits = decoder.config.length_limits
        # The compiled call for a whole step, or None, and the weights that it was created for.
        self._decode_step: DecodeStep | None = None
        self._step_weights: DecoderWeights | None = None

    @torch.no_grad()
    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to rows of the cache.

        Args:
            rows: numbers of rows in use, each at most once.
            tokens: at least one new token per row.

        Returns:
            (len(rows), vocab) logits after each row's last token, see `head_logits`.

        Raises:
            ValueError: a row has no new token.
        """
        if any(len(new) == 0 for new in tokens):
            raise ValueError("every row needs at least one new token")
        tokens = [self._begin(row, new) for row, new in zip(rows, tokens, strict=True)]
        row_lengths = [self.cache.lengths[row] + len(new) for row, new in zip(rows, tokens, strict=True)]
        self.cache.reserve(rows, [len(new) for new in tokens])
        last = torch.empty(
            len(rows), self.decoder.config.hidden_size, dtype=self.decoder.dtype, device=self.decoder.device
        )
        for chunk in _chunks([len(new) for new in tokens]):
            pieces: list[_Piece] = []
            packed: list[int] = []
            for index, start, stop in chunk:
                row = rows[index]
                pieces.append(_Piece(row, len(packed), stop - start, self.cache.lengths[row], row_lengths[index]))
                packed.extend(tokens[index][start:stop])
            x = self._extend_chunk(pieces, packed)
            self.cache.finish_append([piece.row for piece in pieces], [piece.new for piece in pieces])
            for (index, _, _), piece in zip(chunk, pieces, strict=True):
                last[index] = x[piece.start + piece.new - 1]
        return self._head(self.decoder, last)

    def _begin(self, row: int, new: Sequence[int]) -> Sequence[int]:
        """Return the tokens to compute so that the row ends with `new`: these, or the whole row if angles change."""
        cache = self.cache
        regime = self._rope_regime(cache.lengths[row] + len(new))
        if regime != cache.rope_regimes[row] and cache.lengths[row]:
            new = [*cache.tokens[row], *new]
            cache.truncate(row, 0)
        cache.rope_regimes[row] = regime
        cache.tokens[row] += new
        return new

    def _rope_regime(self, length: int) -> int:
        """Return the number of rotary length limits that a row of this length exceeds."""
        return sum(length > limit for limit in self._limits)

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
        if any(
            self._rope_regime(length + 1) != regime
            for length, regime in zip(lengths, self.cache.rope_regimes, strict=True)
        ):
            return self.extend(range(len(lengths)), [[token] for token in token_ids])
        for row, token in zip(self.cache.tokens, token_ids, strict=True):
            row.append(token)
        self.cache.reserve(range(len(lengths)), [1] * len(lengths))
        device = self.decoder.device
        ids, positions = torch.tensor(token_ids, device=device), torch.tensor(lengths, device=device)
        before = QUICK_ROW.set(self._quick)
        try:
            x = self._compiled_step(ids, positions)
            if x is None:
                attend = self._attend_step(lengths)
                x = self._blocks(ids, positions, positions + 1, attend, [Rows(0, len(lengths), 0, 1)])
            self.cache.finish_append(range(len(lengths)), [1] * len(lengths))
            return self._head(self.decoder, x)
        finally:
            QUICK_ROW.reset(before)

    def _attend_step(self, lengths: Sequence[int]) -> Attend:
        """Return the attention of one new token per row."""
        device, places = self.decoder.device, self.cache.places[: len(lengths)]
        new = places.gather(1, torch.tensor(lengths)[:, None]).squeeze(1).to(device)
        seen: dict[int | None, tuple[Where, Tensor | None]] = {}
        for window in {layer.window for layer in self.decoder.config.layers}:
            first, mask = _step_mask(lengths, window, device)
            seen[window] = self.cache.where(places[:, first : max(lengths) + 1]), mask

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kv_layer, scores = self._cached(layer, new, k, v)
            where, mask = seen[scores.window]
            grouped = q.reshape(len(lengths), k.shape[1], -1, q.shape[2])
            keys, values = self.cache.read(kv_layer, where)
            if scores.cap is None and scores.sinks is None:
                output = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scores.scaling)
            else:
                output = _plain_attention_step(grouped, keys, values, mask, scores)
            return output.flatten(1, 2)

        return attend

    def _cached(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> tuple[int, Scores]:
        """Cache keys and values of new tokens. Return the layer whose keys this layer uses, and its score settings."""
        config, source = self.decoder.config, self.decoder.config.layers[layer].kv_source
        if source is None:
            self.cache.write(layer, places, k, v)
        scores = layer_scores(config, config.layers[layer], self.decoder.active.blocks[layer])
        return layer if source is None else source, scores

    def _compiled_step(self, token_ids: Tensor, positions: Tensor) -> Tensor | None:
        """Return the last block's output, (rows, hidden), for one new token per row by one compiled call.

        The keys and values are then cached. Return None if the decoder has no such call.
        """
        decoder = self.decoder
        if not kernels_available():
            return None
        if self._step_weights is not decoder.active:
            self._step_weights = decoder.active
            self._decode_step = decode_step(decoder, self._adapters, self.cache)
        if self._decode_step is None:
            return None
        x, tables = decoder.embed(token_ids), decoder.rotary_tables(positions, positions + 1)
        self.cache.begin_append(range(len(token_ids)))
        return x if self._decode_step(x, positions, tables) else None

    def _extend_chunk(self, pieces: Sequence[_Piece], packed: Sequence[int]) -> Tensor:
        """Return the last block's output for the packed new tokens, (tokens, hidden). Caches their keys and values."""
        device = self.decoder.device
        positions = torch.cat([torch.arange(p.seen, p.seen + p.new, device=device) for p in pieces])
        document_lengths = torch.cat([torch.full((p.new,), p.row_length, device=device) for p in pieces])
        runs = [list(group) for _, group in groupby(enumerate(pieces), key=_batched_with)]
        places = self.cache.places
        written = torch.cat([places[p.row, p.seen : p.seen + p.new] for p in pieces]).to(device)
        read: list[Where] = []
        if any(piece.seen for piece in pieces):
            firsts = [(run[0][1], len(run)) for run in runs]
            read = [self.cache.where(places[p.row : p.row + count, : p.seen + p.new]) for p, count in firsts]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kv_layer, scores = self._cached(layer, written, k, v)
            if not read:
                documents = document_runs(tuple(piece.new for piece in pieces))
                return attention_forward(q, k, v, documents, scores)[0]
            output = torch.empty_like(q)
            for run, where in zip(runs, read, strict=True):
                (_, piece), count = run[0], len(run)
                span = slice(piece.start, piece.start + count * piece.new)
                keys, values = self.cache.read(kv_layer, where)
                by_row = q[span].unflatten(0, (count, piece.new))
                attended, _ = attention_blocks_forward(by_row, keys.transpose(1, 2), values.transpose(1, 2), scores)
                output[span] = attended.flatten(0, 1)
            return output

        neighbours = [list(group) for _, group in groupby(enumerate(pieces), key=_adjacent)]
        rows = [Rows(run[0][1].row, len(run), run[0][1].start, run[0][1].new) for run in neighbours]
        return self._blocks(torch.tensor(packed, device=device), positions, document_lengths, attend, rows)

    def _blocks(
        self, token_ids: Tensor, positions: Tensor, document_lengths: Tensor, attend: Attend, rows: Sequence[Rows]
    ) -> Tensor:
        """Return the output of embedding and all blocks, (tokens, hidden)."""
        decoder = self.decoder
        self.cache.begin_append(row for run in rows for row in range(run.first, run.first + run.rows))
        x = decoder.embed(token_ids)
        tables, scratch = decoder.rotary_tables(positions, document_lengths), Scratch()
        cross_layer, _ = decoder.cross_layer(token_ids)
        for index, layer in enumerate(decoder.config.layers):
            table, queries = tables[index]
            sized = decoder.config.at(layer)
            context = BlockContext(sized, layer, table, (), scratch, queries, number=index, cross_layer=cross_layer)
            x = self._block(index, x, context, attend, rows)
        return x

    def _block(self, index: int, x0: Tensor, context: BlockContext, attend: Attend, rows: Sequence[Rows]) -> Tensor:
        """Return x₂ of one block, (tokens, hidden), with attention computed by `attend`. See `nn.decoder.block`."""
        config, weights, adapter = context.config, self.decoder.active.blocks[index], self._adapters[index]
        n1, _ = pre_norm_forward(x0, weights.attention_norm, weights.attention_norm_bias, config, context.scratch)
        mixer = MIXERS[context.layer.mixer]
        mixer_input, _ = group_forward(n1, weights.input, weights.input_bias, adapter.input)
        outputs = []
        if mixer.qkv is not None:
            q, k, v = mixer.qkv(mixer_input, weights, context)[:3]
            outputs.append(gated_output(mixer_input, attend(index, q, k, v), config))
        if mixer.extend is not None:
            outputs.append(mixer.extend(mixer_input, weights, self.cache.states[index], rows, config))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        x1, *_ = mixer_output_forward(x0, output, weights, adapter, config)
        x2, _ = mlp_sublayer_forward(x1, weights, adapter, config, context.scratch)
        return x2 if weights.layer_scalar is None else ple_forward(x2, weights, adapter, context)[0]


def _plain_attention_step(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, of: Scores) -> Tensor:
    """Attention with capped scores or sinks, which torch's kernel does not support, for one query per head.

    Args:
        q: (rows, key/value heads, group, head_dim).
        keys, values: (rows, key/value heads, n, head_dim).
        mask: from `_step_mask`.
        of: the layer's score settings c, κ and σ.
    """
    scores, sinks = (q @ keys.mT) * of.scaling, of.sinks
    if of.cap is not None:
        scores, _ = capped(scores, of.cap)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, q.shape[1], q.shape[2], 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    return torch.softmax(scores, dim=-1)[..., : keys.shape[2]].to(q.dtype) @ values


def head_logits(decoder: Decoder, x: Tensor) -> Tensor:
    """Return final norm and output projection for sampling: (rows, hidden) to (rows, vocab), float32 or wider.

    A bfloat16 product rounds logits of 16 to 32, the range of a language model's largest logits, to multiples of 1/8.
    Of six first tokens of SmolLM2's answers, two had their likeliest tokens equal or swapped. The likeliest tokens of
    each row are therefore multiplied again in float32, with the same weights. The other logits stay rounded.
    """
    narrow, rule = decoder.projected(x), decoder.config.logits
    if narrow.dtype in (torch.float32, torch.float64):
        return ruled(narrow, rule)[0]
    candidates = narrow.topk(min(EXACT_CANDIDATES, narrow.shape[1]), sorted=False).indices
    weights, adapter = decoder.active, decoder.head_adapter()
    normed, _ = rms_norm_forward(x, not_none(weights.final_norm), decoder.config.norm_eps, decoder.config.norm_offset)
    columns = normed.float().unsqueeze(2)
    exact = (frozen_rows(weights.head, candidates).float() @ columns).squeeze(2)
    for factors in adapter.lora.factors:
        h = factors.lora_A.float() @ columns
        exact += factors.scaling * (factors.lora_B[candidates].float() @ h).squeeze(2)
        if adapter.extras is not None:
            (head,) = adapter.extras.modules
            if head.magnitude is not None:
                exact *= (head.magnitude.magnitude / head.magnitude.norm)[candidates]
            if head.lora_bias is not None:
                exact += factors.scaling * head.lora_bias[0].float()[candidates]
    return ruled(narrow.float().scatter_(1, candidates, exact), rule)[0]


def _chunks(counts: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """Split the new tokens of rows into passes of at most CHUNK_TOKENS: lists of (index, start, stop), in order."""
    chunks: list[list[tuple[int, int, int]]] = [[]]
    left = CHUNK_TOKENS
    for index, count in enumerate(counts):
        start = 0
        while start < count:
            # A row is split only if it does not fit into one pass.
            if left == 0 or (count - start > left and chunks[-1] and count - start <= CHUNK_TOKENS):
                chunks.append([])
                left = CHUNK_TOKENS
            stop = min(count, start + left)
            chunks[-1].append((index, start, stop))
            left -= stop - start
            start = stop
    return chunks


def _batched_with(numbered: tuple[int, _Piece]) -> tuple[int, int, int]:
    """Return a key that is equal for neighbouring rows of equal length, which one kernel call can compute."""
    number, piece = numbered
    return piece.row - number, piece.new, piece.seen


def _adjacent(numbered: tuple[int, _Piece]) -> tuple[int, int]:
    """Return the same key for rows with any number of cached tokens."""
    return _batched_with(numbered)[:2]


def _step_mask(lengths: Sequence[int], window: int | None, device: torch.device) -> tuple[int, Tensor | None]:
    """Return the first key that any new token attends to, and the mask of the keys from there on.

    The mask is (rows, 1, 1, keys) booleans, or None if every row attends to all of these keys.
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
