"""Forward and backward pass of a decoder language model, without autograd.

    x = embedding(ids);  x = block(x) for each block;  L = Σ cross-entropy(head(norm(x))) over supervised positions

The forward pass saves the tensors that `nn.decoder.block` lists, for each block. The backward pass visits the blocks
from the top and adds every adapter gradient to one flat buffer (`nn.lora_parameters`). It ends at the lowest trained
module, and nothing is saved below that. A batch may contain cached hidden states (`PackedBatch.start`). The forward
pass then starts at a higher layer.

`ForwardBackward.loss_and_gradients` is a whole forward and backward pass. A trained embedding is in
`nn.decoder.adapted_embedding`, a trained head and losses other than cross-entropy in `nn.decoder.adapted_head`.
Loading, attaching an adapter and passes without gradients are in `nn.decoder.decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.batch import PackedBatch, TokenLoss
from backhand.nn.decoder.adapted_embedding import adapted_embedding, embedding_gradients
from backhand.nn.decoder.adapted_group import ALL_GROUPS, BlockAdapter, GroupAdapter, block_adapter
from backhand.nn.decoder.adapted_head import Head, general_head_backward, head_of
from backhand.nn.decoder.block import RECOMPUTE_MODES, BlockSaved, block_backward, block_forward
from backhand.nn.decoder.cross_layer import CrossLayer
from backhand.nn.decoder.mixer import BlockContext
from backhand.nn.decoder.ple_inputs import PLEInputsSaved, embedding_output_gradient, ple_inputs_forward
from backhand.nn.decoder.projections import norm_backward
from backhand.nn.decoder.trained_parts import TrainedParts, trained_parts
from backhand.nn.decoder.trained_weights import TrainedWeights
from backhand.nn.decoder.weights import DecoderWeights, linear_parts
from backhand.nn.families.family import DecoderConfig
from backhand.nn.families.rotary_frequencies import frequencies_of
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.scratch import Scratch
from backhand.ops.frozen_matrix import frozen_rows
from backhand.ops.linear_cross_entropy import chunk_shape, linear_cross_entropy_backward
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_forward
from backhand.ops.rotary import RotaryTable, angles, scaled_for_queries


class ForwardBackward:
    """Forward and backward pass of a frozen decoder and at most one adapter that it trains.

    Attributes:
        config: sizes and family traits (Llama, Qwen3, Gemma 3, …).
        weights: the frozen weights in the compute dtype.
        active: the weights used in the computation. They are the frozen weights, except for tensors that the adapter
            trains without factors (whole modules, rows of the embedding), which replace those of the base.
        lora: the attached adapter, or None.
        dtype: the compute dtype.
        device: device of the weights.
        recompute: `none`, `mlp` or `block`: the activations that the backward pass recomputes instead of saving them.
        shares_prefixes: True if documents of a batch may share a prefix. False if rotary angles depend on the length
            of a document.
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
        self.lora = lora
        self.active = self.weights
        self._trained: TrainedParts = trained_parts(lora, self.config)
        self._trained_weights: TrainedWeights | None = None
        if lora is not None and lora.trained:
            self._trained_weights = TrainedWeights(self.weights, self.config, lora)
        self._adapters: tuple[Tensor | None, list[BlockAdapter]] | None = None
        self._head: GroupAdapter | None = None

    def refresh(self) -> None:
        """Read the current values of the adapter. Each pass calls this first."""
        self._head = None
        if self.lora is not None and self.lora.compute_values.dtype != self.dtype:
            self.lora.refresh_compute(self.dtype)  # a decoder of another dtype has used the adapter in between
        if self._trained_weights is not None:
            self.active = self._trained_weights.current()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return x₀ of the first block, (tokens, hidden): c · table[ids], with c = √hidden in Gemma and 1 elsewhere."""
        table = self.active.embedding
        if self.lora is None or not self._trained.embedding_factors:
            return self._scale_embedding(frozen_rows(table, input_ids))
        return self._scale_embedding(adapted_embedding(input_ids, table, self.config, self.lora))

    def _scale_embedding(self, x: Tensor) -> Tensor:
        """Return c x, with c rounded to the compute dtype as in transformers."""
        if self.config.embedding_scaling == 1.0:
            return x
        return x * torch.tensor(self.config.embedding_scaling, dtype=x.dtype, device=x.device)

    def rotary_tables(
        self, positions: Tensor, reach: Tensor, dtype: torch.dtype | None = None
    ) -> list[tuple[RotaryTable | None, RotaryTable | None]]:
        """Return, for each layer, the rotary angles of these positions and the angles of scaled queries.

        The first is None in layers without rotary embedding, the second in families that do not scale queries. Layers
        with the same rotary configuration share one table.

        Args:
            positions: (tokens,) int64.
            reach: (tokens,) int64, the length of each token's document.
            dtype: dtype of the rotated tensors, or None for the compute dtype. Angles are float32 or wider.
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
        """Return the context of each block.

        Args:
            rows: (loss positions,) int64, the positions that the last block computes; None for all.
            cross_layer: cross-layer tensors, or None to compute them here if the family has any.
            dtype: as in `rotary_tables`.
        """
        if batch.parents and not self.shares_prefixes:
            raise ValueError("a shared prefix would be rotated by the length of one of its documents only")
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
        """Return the cross-layer tensors of a pass over these tokens and the tensors saved for their backward.

        Both are None in families in which layers read nothing but the residual stream.
        """
        if not self.config.value_norm and self.config.per_layer is None:
            return None, None
        if self.active.per_layer is None:
            return CrossLayer(self.config.kv_sources), None
        h = self.embed(token_ids)
        ple, saved = ple_inputs_forward(h, token_ids, self.active.per_layer, self.config, self.lora, dropout_seed)
        return CrossLayer(self.config.kv_sources, ple), saved

    def block_adapters(self, dropout_seed: int | None) -> list[BlockAdapter]:
        """Return the adapter of every block in the compute dtype; `dropout_seed` is None for no dropout.

        Without dropout the views are the same in every pass and are cached. DoRA's norms are recomputed each time.
        """
        lora, dora = self.lora, self._trained.dora
        buffer = None if lora is None else lora.compute_values
        cacheable = not dora and (dropout_seed is None or not self._trained.drops)
        if cacheable and self._adapters is not None and self._adapters[0] is buffer:
            return self._adapters[1]
        weights = [linear_parts(block, self.config, layer) for layer, block in enumerate(self.active.blocks) if dora]
        adapters = [
            block_adapter(lora, self.config, layer, dropout_seed, weights[layer] if dora else None)
            for layer in range(len(self.config.layers))
        ]
        if cacheable:
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
        """Run one forward and backward pass and add ∂(loss_scaling · loss)/∂parameters to `lora.gradients`.

        Args:
            loss_scaling: for example 1 / supervised tokens of the whole step.
            dropout_seed: seed of this micro-batch's dropout masks, or None for no dropout.
            token_loss: the loss as a function of the supervised tokens' log-probabilities. None for Σ nats, whose
                gradient the head computes in the same pass.

        Returns:
            The loss, 0-d float64: Σ nats over supervised tokens, or the value of `token_loss`.

        Raises:
            ValueError: no adapter is attached, or the batch starts above a trained layer.
        """
        lora, trained = self.lora, self._trained
        if lora is None:
            raise ValueError("there is no adapter to train: attach one first")
        self.refresh()
        cross_layer, ple_saved = self.cross_layer(batch.input_ids, dropout_seed)
        if trained.below_blocks and cross_layer is not None and cross_layer.ple is not None:
            cross_layer.d_ple = torch.zeros_like(cross_layer.ple)
        contexts = self.contexts(batch, batch.supervised_positions, cross_layer)
        adapters, scratch = self.block_adapters(dropout_seed), contexts[-1].scratch
        if self.recompute == "none" and trained.plain_head:
            # With recomputation, blocks allocate temporaries whose memory the logits reuse later.
            rows = len(batch.supervised_positions)
            scratch.reserve(chunk_shape(rows, self.active.head, self.dtype), self.active.final_norm)

        x, saved = self._forward(batch, adapters, contexts, trained.end.layer)
        d_x: Tensor | None
        d_x, loss = self._head_loss_and_gradient(x, batch, loss_scaling, dropout_seed, scratch, token_loss)
        del x
        for layer in reversed(range(trained.end.layer, len(contexts))):
            block_saved = saved.pop()
            assert block_saved is not None and d_x is not None
            input_grads = trained.end.input_grads if layer == trained.end.layer else ALL_GROUPS
            weights, context = self.active.blocks[layer], contexts[layer]
            d_x = block_backward(d_x, block_saved, weights, adapters[layer], context, input_grads)
        if trained.below_blocks and d_x is not None:
            if ple_saved is not None and cross_layer is not None:
                ple_weights = not_none(self.active.per_layer)
                d_x = embedding_output_gradient(
                    d_x, cross_layer, ple_saved, ple_weights, self.config, lora, dropout_seed
                )
            if trained.embedding:
                d_x = self._scale_embedding(d_x)
                embedding_gradients(d_x, batch.input_ids, self.active.embedding, self.config, lora)
        return loss

    def _forward(
        self, batch: PackedBatch, adapters: Sequence[BlockAdapter], contexts: Sequence[BlockContext], lowest_layer: int
    ) -> tuple[Tensor, list[BlockSaved | None]]:
        """Return the output of the last block that has a context, and the saved tensors of each block.

        Nothing is saved for blocks below `lowest_layer`: their entries are None.
        """
        first, x = (0, self.embed(batch.input_ids)) if batch.start is None else batch.start
        if first > lowest_layer:
            raise ValueError(f"the batch starts at layer {first}, above the trained layer {lowest_layer}")
        if first and first > self.config.start_layer(first):
            raise ValueError(f"the batch starts at layer {first}, above a layer whose keys are used there")
        saved: list[BlockSaved | None] = []
        for layer in range(first, len(contexts)):
            frozen = layer < lowest_layer  # neither this block nor a lower one is trained: save as little as possible
            recompute = "block" if frozen else self.recompute
            x, block_saved = block_forward(x, self.active.blocks[layer], adapters[layer], contexts[layer], recompute)
            saved.append(None if frozen else block_saved)
        return x, saved

    def _head_loss_and_gradient(
        self,
        x: Tensor,
        batch: PackedBatch,
        loss_scaling: float,
        dropout_seed: int | None,
        scratch: Scratch,
        token_loss: TokenLoss | None,
    ) -> tuple[Tensor, Tensor]:
        """Return ∂L/∂x, (supervised, hidden), and the loss. x is the last block's output, of the same shape."""
        trained, rule = self._trained, self.config.logits
        scratch.release()  # memory peaks in the head
        (normed, norm), targets = self._final_norm(x), batch.labels[batch.supervised_positions]
        logits = None
        if trained.plain_head:
            logits = scratch.take("logits", chunk_shape(len(x), self.active.head, x.dtype), x)
        if trained.head or token_loss is not None:
            head, lora = self._head_of(dropout_seed), self.lora if trained.head else None
            d_normed, loss = general_head_backward(normed, batch, head, lora, loss_scaling, token_loss, logits)
        else:
            # The loss is the last node, so its gradient follows directly: forward and backward in one call.
            multiplier = batch.loss_multiplier(loss_scaling, normed.dtype)
            losses, (d_normed, *_) = linear_cross_entropy_backward(
                *(normed, self.active.head, targets, None, multiplier, rule), out=normed, logits=logits
            )
            loss = batch.per_document(losses).sum(dtype=torch.float64)
        scratch.release(reserved=True)
        return norm_backward(d_normed, norm, trained.d_final_norm), loss

    def _head_of(self, dropout_seed: int | None) -> Head:
        return head_of(self.active.head, self.config, self.lora, self._trained, dropout_seed)

    def _final_norm(self, x: Tensor) -> tuple[Tensor, RMSNormSaved]:
        return rms_norm_forward(x, self.active.final_norm, self.config.norm_eps, self.config.norm_offset)
