"""A training step of a decoder language model with no autograd graph at all: forward and backward over its blocks.

    x = embedding(ids);  x = block(x) for each block;  L = Σ cross-entropy(head(norm(x))) over supervised positions

The forward pass keeps per block what `nn.decoder.block` lists. The backward pass walks the blocks from the top and adds
every adapter gradient to one flat buffer (`nn.lora_parameters`). It stops at the lowest trained module: nothing below
is kept for it. A batch may bring the cached output of the blocks below (`Decoder.layer_input`); then the forward pass
begins there. `ForwardBackward.loss_and_gradients` is both passes. An embedding or head that is trained, and a loss
that is no sum of nats, are in `trained_ends`. Loading and attaching are in `nn.decoder.decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.batch import PackedBatch, Scratch, TokenLoss
from backhand.nn.decoder.adapted_group import BlockAdapter, GroupAdapter, block_adapter
from backhand.nn.decoder.block import RECOMPUTE_MODES, BlockSaved, block_backward, block_forward
from backhand.nn.decoder.cross_layer import CrossLayer
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.mixer import BlockContext
from backhand.nn.decoder.per_layer_input import PLEInputsSaved, embedding_output_gradient, ple_inputs_forward
from backhand.nn.decoder.projections import norm_backward
from backhand.nn.decoder.rotary import frequencies_of
from backhand.nn.decoder.trained_ends import (
    Head,
    Trained,
    adapted_rows,
    embedding_gradients,
    head_of,
    other_head_gradient,
    trained_by,
)
from backhand.nn.decoder.weights import DecoderWeights, TrainedWeights, linear_parts
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.frozen_matrix import frozen_rows
from backhand.ops.linear_cross_entropy import chunk_shape, linear_cross_entropy_backward
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_forward
from backhand.ops.rotary import RotaryTable, angles, scaled_for_queries


class ForwardBackward:
    """The passes of a frozen decoder, and of at most one adapter that it trains.

    Attributes:
        config: the model as data, sizes and what is particular to its family (Llama, Qwen3, Gemma 3, …).
        weights: the frozen weights in the compute dtype.
        active: the weights that are computed with: the frozen ones, but for tensors that the adapter trains itself,
            without factors (whole modules, rows of the embedding); these stand in the place of the base's.
        lora: the attached adapter, or None.
        dtype: the compute dtype.
        device: where the weights live.
        recompute: `none`, `mlp` or `block`: what the backward pass computes again instead of keeping it.
        shares_prefixes: whether documents of a batch may share any; not where angles depend on a document's length.
    """

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, *, recompute: str = "none") -> None:
        if recompute not in RECOMPUTE_MODES:
            raise ValueError(f"recompute is one of {', '.join(RECOMPUTE_MODES)}, not {recompute!r}")
        self.config = config
        self.weights = weights
        self.active = weights
        self.recompute = recompute
        self.shares_prefixes = not config.length_limits
        self.dtype, self.device = weights.embedding.dtype, weights.embedding.device
        self._attach(None)
        self._sized = [config.at(layer) for layer in config.layers]
        self._frequencies = [
            frequencies_of(rotary, head_dim, self.device)
            for rotary, head_dim in zip(config.rotary, config.rotary_dims, strict=True)
        ]

    def _attach(self, lora: LoRAParameters | None) -> None:
        """Take this adapter, or none."""
        self.lora = lora
        self.active = self.weights
        self._trained: Trained = trained_by(lora, self.config)
        self._whole = TrainedWeights(self.weights, self.config, lora) if lora is not None and lora.trained else None
        self._adapters: tuple[Tensor | None, list[BlockAdapter]] | None = None
        self._head: GroupAdapter | None = None

    def refresh(self) -> None:
        """Take over the adapter as it is now, with the tensors that it trains itself; each pass calls this first."""
        self._head = None
        if self.lora is not None and self.lora.compute_values.dtype != self.dtype:
            self.lora.refresh_compute(self.dtype)  # it was attached to a decoder of another dtype meanwhile
        if self._whole is not None:
            self.active = self._whole.current()

    def embed(self, input_ids: Tensor) -> Tensor:
        """x₀ of the first block, (tokens, hidden): c · table[ids], with c = √hidden in Gemma and 1 elsewhere."""
        table = self.active.embedding
        if self.lora is None or not self._trained.embedding_factors:
            return self._embedding_scaled(frozen_rows(table, input_ids))
        return self._embedding_scaled(adapted_rows(input_ids, table, self.config, self.lora))

    def _embedding_scaled(self, x: Tensor) -> Tensor:
        """c x; c is rounded to the compute dtype, as transformers does it."""
        if self.config.embedding_scaling == 1.0:
            return x
        return x * torch.tensor(self.config.embedding_scaling, dtype=x.dtype, device=x.device)

    def rotary_tables(
        self, positions: Tensor, reach: Tensor, dtype: torch.dtype | None = None
    ) -> list[tuple[RotaryTable | None, RotaryTable | None]]:
        """The angles of these positions in every layer, and those of queries where they are others; None without any.

        One table for each rotary configuration.

        Args:
            positions: (tokens,) int64.
            reach: (tokens,) int64, how long each token's document is.
            dtype: of what is rotated, None for the compute dtype; the angles are in float32 or wider.
        """
        wide, scaling = torch.promote_types(dtype or self.dtype, torch.float32), self.config.query_scaling
        tables: dict[int | None, tuple[RotaryTable | None, RotaryTable | None]] = {None: (None, None)}
        for number, frequencies in enumerate(self._frequencies):
            table = angles(frequencies, positions, wide, reach)
            queries = None if scaling is None else scaled_for_queries(table, positions, scaling.beta, scaling.length)
            tables[number] = table, queries
        return [tables[layer.rotary] for layer in self.config.layers]

    def contexts(
        self,
        batch: PackedBatch,
        rows: Tensor | None = None,
        cross_layer: CrossLayer | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[BlockContext]:
        """Context of each block; `rows`, (loss positions,) int64, are the positions of the last block to compute.

        What the pass carries is made here where it is not given and the family has anything.
        """
        if batch.parents and not self.shares_prefixes:
            raise ValueError("what documents share would be rotated by the length of one document alone")
        tables, scratch = self.rotary_tables(batch.positions, batch.reach, dtype), Scratch()
        cross_layer = cross_layer or self.cross_layer(batch.input_ids)[0]
        contexts = [
            BlockContext(sized, layer, table, batch.runs, scratch, queries, None, number, cross_layer)
            for number, (sized, layer, (table, queries)) in enumerate(
                zip(self._sized, self.config.layers, tables, strict=True)
            )
        ]
        contexts[-1] = contexts[-1]._replace(loss_positions=rows)
        return contexts

    def cross_layer(
        self, token_ids: Tensor, dropout_seed: int | None = None
    ) -> tuple[CrossLayer | None, PLEInputsSaved | None]:
        """What a pass over these tokens carries beside the stream, None for nothing; and what its begin kept."""
        if not self.config.value_norm and self.config.per_layer is None:
            return None, None
        if self.active.per_layer is None:
            return CrossLayer(self.config.kv_sources), None
        h = self.embed(token_ids)
        inputs, kept = ple_inputs_forward(h, token_ids, self.active.per_layer, self.config, self.lora, dropout_seed)
        return CrossLayer(self.config.kv_sources, inputs), kept

    def block_adapters(self, dropout_seed: int | None) -> list[BlockAdapter]:
        """The adapter of every block in the compute dtype; no dropout without a seed.

        Without a seed they name the same views in each pass, but for DoRA, whose norms are taken here.
        """
        lora, dora = self.lora, self._trained.dora
        buffer = None if lora is None else lora.compute_values
        fixed = not dora and (dropout_seed is None or not self._trained.drops)
        if fixed and self._adapters is not None and self._adapters[0] is buffer:
            return self._adapters[1]
        weights = [linear_parts(block, self.config, layer) for layer, block in enumerate(self.active.blocks) if dora]
        adapters = [
            block_adapter(lora, self.config, layer, dropout_seed, weights[layer] if dora else None)
            for layer in range(len(self.config.layers))
        ]
        if fixed:
            self._adapters = buffer, adapters
        return adapters

    @torch.no_grad()
    def loss_and_gradients(
        self,
        batch: PackedBatch,
        loss_scaling: float,
        dropout_seed: int | None = None,
        token_loss: TokenLoss | None = None,
    ) -> Tensor:
        """One forward and backward pass: adds ∂(loss_scaling · loss)/∂(what is trained) to `lora.gradients`.

        Args:
            loss_scaling: e.g. 1 / supervised tokens of the whole step.
            dropout_seed: draws this micro-batch's dropout masks; None for no dropout.
            token_loss: the loss as a function of the supervised tokens' log-probabilities; None for Σ nats, whose
                gradient the head computes along with it.

        Returns:
            The loss, 0-d float64: Σ nats over supervised tokens, or what `token_loss` says.

        Raises:
            ValueError: without an attached adapter, or for a batch that enters above something trained.
        """
        lora, trained = self.lora, self._trained
        if lora is None:
            raise ValueError("there is no adapter to train: attach one first")
        self.refresh()
        cross_layer, begin = self.cross_layer(batch.input_ids, dropout_seed)
        if trained.below_blocks and cross_layer is not None and cross_layer.ple is not None:
            cross_layer.d_ple = torch.zeros_like(cross_layer.ple)
        contexts = self.contexts(batch, batch.supervised_positions, cross_layer)
        adapters, scratch = self.block_adapters(dropout_seed), contexts[-1].scratch
        if self.recompute == "none" and trained.plain_head:
            # Not under recomputation: blocks then allocate more that is not kept, and the logits take its place later.
            rows = len(batch.supervised_positions)
            scratch.reserve(chunk_shape(rows, self.active.head, self.dtype), self.active.final_norm)

        lowest_layer, lowest_group = trained.lowest
        x, kept = self._forward(batch, adapters, contexts, lowest_layer)
        d_x: Tensor | None
        d_x, loss = self._head_loss_and_gradient(x, batch, loss_scaling, dropout_seed, scratch, token_loss)
        del x
        for layer in reversed(range(lowest_layer, len(contexts))):
            saved = kept.pop()
            assert saved is not None and d_x is not None
            lowest = lowest_group if layer == lowest_layer else -1
            d_x = block_backward(d_x, saved, self.active.blocks[layer], adapters[layer], contexts[layer], lowest)
        if trained.below_blocks and d_x is not None:
            if begin is not None and cross_layer is not None:
                weights = not_none(self.active.per_layer)
                d_x = embedding_output_gradient(d_x, cross_layer, begin, weights, self.config, lora, dropout_seed)
            if trained.embedding:
                d_x = self._embedding_scaled(d_x)
                embedding_gradients(d_x, batch.input_ids, self.active.embedding, self.config, lora)
        return loss

    def _forward(
        self, batch: PackedBatch, adapters: Sequence[BlockAdapter], contexts: Sequence[BlockContext], lowest_layer: int
    ) -> tuple[Tensor, list[BlockSaved | None]]:
        """The output of the last block that has a context, and what each keeps: None below `lowest_layer`."""
        first, x = (0, self.embed(batch.input_ids)) if batch.start is None else batch.start
        if first > lowest_layer:
            raise ValueError(f"the batch enters at layer {first}, and layer {lowest_layer} is trained")
        if first and first > self.config.start_layer(first):
            raise ValueError(f"the batch enters at layer {first}, above one whose keys are used there")
        kept: list[BlockSaved | None] = []
        for layer in range(first, len(contexts)):
            below = layer < lowest_layer  # nothing here is trained, nor further down: keep as little as can be
            recompute = "block" if below else self.recompute
            x, saved = block_forward(x, self.active.blocks[layer], adapters[layer], contexts[layer], recompute)
            kept.append(None if below else saved)
        return x, kept

    def _head_loss_and_gradient(
        self,
        x: Tensor,
        batch: PackedBatch,
        loss_scaling: float,
        dropout_seed: int | None,
        scratch: Scratch,
        token_loss: TokenLoss | None,
    ) -> tuple[Tensor, Tensor]:
        """∂L/∂x and the loss, from the last block's output at the supervised positions, (supervised, hidden) both."""
        trained, rule = self._trained, self.config.logits
        scratch.let_go()  # most is held while the head is at work
        (normed, norm), targets = self._final_norm(x), batch.labels[batch.supervised_positions]
        logits = None
        if trained.plain_head:
            logits = scratch.take("logits", chunk_shape(len(x), self.active.head, x.dtype), x)
        if trained.head or token_loss is not None:
            head, lora = self._head_of(dropout_seed), self.lora if trained.head else None
            d_normed, loss = other_head_gradient(normed, batch, head, lora, loss_scaling, token_loss, logits)
        else:
            # Forward and backward at once: the loss comes last in the model, so its gradient can follow immediately.
            multiplier = batch.loss_multiplier(loss_scaling, normed.dtype)
            losses, (d_normed, *_) = linear_cross_entropy_backward(
                *(normed, self.active.head, targets, None, multiplier, rule), out=normed, logits=logits
            )
            loss = batch.of_documents(losses).sum(dtype=torch.float64)
        scratch.let_go(reserved=True)
        return norm_backward(d_normed, norm, trained.d_final_norm), loss

    def _head_of(self, dropout_seed: int | None) -> Head:
        return head_of(self.active.head, self.config, self.lora, self._trained, dropout_seed)

    def _final_norm(self, x: Tensor) -> tuple[Tensor, RMSNormSaved]:
        return rms_norm_forward(x, self.active.final_norm, self.config.norm_eps, self.config.norm_offset)
