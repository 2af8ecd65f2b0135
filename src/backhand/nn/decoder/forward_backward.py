"""Forward and backward pass of a decoder language model, without autograd.

    x = embedding(ids);  x = block(x) for each block;  L = Σ cross-entropy(head(norm(x))) over supervised positions

The forward pass saves the tensors that `nn.decoder.block` lists, for each block. The backward pass visits the blocks
from the last to the first and adds every adapter gradient to one flat buffer (`nn.lora_parameters`). It ends at the
lowest group of projections with a trained tensor, and layers below it save nothing. If a batch contains cached hidden
states (`PackedBatch.start`), the forward pass starts at the layer that reads them.

Start reading at `ForwardBackward.loss_and_gradients`, which is one whole forward and backward pass of a language model.
`state_loss_and_gradients` is the same pass without the head, for losses that are functions of the final hidden states.
Other files:
- `nn.decoder.adapted_embedding`: gradients of a trained embedding;
- `nn.decoder.adapted_head`: gradients of a trained head, and losses other than cross-entropy;
- `nn.decoder.decoder`: loading a model, attaching an adapter, and passes without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backhand.errors import UsageError, not_none
from backhand.nn.batch import PackedBatch, StateLoss, TokenLoss
from backhand.nn.decoder.adapted_embedding import adapted_embedding, embedding_gradients
from backhand.nn.decoder.adapted_group import ALL_GROUPS, BlockAdapter, GroupAdapter, block_adapter
from backhand.nn.decoder.adapted_head import Head, distillation_backward, general_head_backward, head_of
from backhand.nn.decoder.block import RECOMPUTE_MODES, BlockSaved, block_backward, block_forward
from backhand.nn.decoder.cross_layer import CrossLayer
from backhand.nn.decoder.encoder_inputs import encoder_inputs_backward, encoder_inputs_forward
from backhand.nn.decoder.mixer import BlockContext
from backhand.nn.decoder.ple_inputs import PLEInputsSaved, embedding_output_gradient, ple_inputs_forward
from backhand.nn.decoder.projections import norm_backward, norm_forward
from backhand.nn.decoder.trained_parts import TrainedParts, trained_parts
from backhand.nn.decoder.trained_weights import TrainedWeights
from backhand.nn.decoder.weights import DecoderWeights, linear_parts
from backhand.nn.families.family import DecoderConfig
from backhand.nn.families.rotary_frequencies import frequencies_of
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.scratch import Scratch
from backhand.ops.frozen_matrix import frozen_rows
from backhand.ops.layer_norm import NormSaved
from backhand.ops.linear_cross_entropy import chunk_shape, linear_cross_entropy_backward
from backhand.ops.rotary import RotaryTable, angles, scaled_for_queries


def require_head(config: DecoderConfig) -> None:
    """Raise UsageError if the model has no language-model head, and so no probabilities of tokens."""
    if not config.has_head:
        raise UsageError(
            f"this {config.family} model has no language-model head",
            where="model",
            why="it computes hidden states of texts and no probabilities of tokens",
            next_step="train it with --objective embed, rank or classify, or choose a language model",
        )


class ForwardBackward:
    """Forward and backward pass of a frozen decoder. The gradients are those of its adapter, if one is attached.

    Attributes:
        config: sizes of the model, and the properties of its family (Llama, Qwen3, Gemma 3, …).
        weights: the frozen weights in the compute dtype.
        active: the weights that the passes use. An adapter may train some tensors in full, such as a norm or rows of
            the embedding. These come from the adapter, all others from `weights`.
        lora: the attached adapter, or None.
        dtype: the compute dtype.
        device: device of the weights.
        recompute: which activations of a block are recomputed in the backward pass instead of saved. One of `none`,
            `mlp` and `block` (`nn.decoder.block`).
        shares_prefixes: True if documents of a batch may share a prefix. False if attention is not causal, or if rotary
            angles depend on the length of a document.
    """

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, *, recompute: str = "none") -> None:
        if recompute not in RECOMPUTE_MODES:
            raise ValueError(f"recompute is one of {', '.join(RECOMPUTE_MODES)}, not {recompute!r}")
        self.config = config
        self.weights = weights
        self.active = weights
        self.recompute = recompute
        self.shares_prefixes = config.shares_prefixes
        self.dtype, self.device = weights.embedding.dtype, weights.embedding.device
        self._attach(None)
        self._layer_configs = [config.at(layer) for layer in config.layers]  # sizes may differ from layer to layer
        self._frequencies = [
            frequencies_of(rotary, head_dim, self.device)
            for rotary, head_dim in zip(config.rotary, config.rotary_dims, strict=True)
        ]

    def _attach(self, lora: LoRAParameters | None) -> None:
        self.lora = lora
        self.active = self.weights
        self._trained: TrainedParts = trained_parts(lora, self.config)
        self._trained_weights: TrainedWeights | None = None
        if lora is not None and lora.full_tensors:
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
        """Return c · table[ids] (tokens, hidden). c is √hidden in Gemma and 1 in most models."""
        table = self.active.embedding
        if self.lora is None or not self._trained.embedding_factors:
            return self._scale_embedding(frozen_rows(table, input_ids))
        return self._scale_embedding(adapted_embedding(input_ids, table, self.config, self.lora))

    def input_states(self, batch: PackedBatch) -> Tensor:
        """Return the input of block 0, (tokens, hidden): the embedded tokens, or `encoder_inputs` of them."""
        x, weights = self.embed(batch.input_ids), self.active.inputs
        return x if weights is None else encoder_inputs_forward(x, batch, weights, self.config.norm_eps)[0]

    def _scale_embedding(self, x: Tensor) -> Tensor:
        """Return c x, with c rounded to the compute dtype as in transformers."""
        if self.config.embedding_scaling == 1.0:
            return x
        return x * torch.tensor(self.config.embedding_scaling, dtype=x.dtype, device=x.device)

    def rotary_tables(
        self, positions: Tensor, document_lengths: Tensor, dtype: torch.dtype | None = None
    ) -> list[tuple[RotaryTable | None, RotaryTable | None]]:
        """Return the rotary tables of each layer: the table of keys, and the table of queries if it is another one.

        In most families the second table is None, and queries use the table of keys. Some families multiply queries by
        a factor that depends on the position. Their table of queries is the table of keys times this factor. Both
        tables are None in layers without rotary embedding.

        Args:
            positions: (tokens,) int64.
            document_lengths: (tokens,) int64, the length of each token's document.
            dtype: dtype of the rotated tensors, or None for the compute dtype. Angles are float32 or wider.
        """
        wide, scaling = torch.promote_types(dtype or self.dtype, torch.float32), self.config.query_scaling
        tables: dict[int | None, tuple[RotaryTable | None, RotaryTable | None]] = {None: (None, None)}
        for number, frequencies in enumerate(self._frequencies):
            table = angles(frequencies, positions, wide, document_lengths)
            queries = None if scaling is None else scaled_for_queries(table, positions, scaling.beta, scaling.length)
            tables[number] = table, queries
        return [tables[layer.rotary] for layer in self.config.layers]

    def contexts(
        self,
        batch: PackedBatch,
        loss_positions: Tensor | None = None,
        cross_layer: CrossLayer | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[BlockContext]:
        """Return the context of each block: everything that it reads in addition to its input, weights and adapter.

        Args:
            loss_positions: (loss positions,) int64, at which the last block computes its output; None for all.
            cross_layer: cross-layer tensors, or None to compute them here if the family has any.
            dtype: as in `rotary_tables`.
        """
        if batch.parents and not self.shares_prefixes:
            reason = "rotary angles depend on the document's length" if self.config.causal else "later tokens change it"
            raise ValueError(f"documents cannot share a prefix, because {reason}")
        tables, scratch = self.rotary_tables(batch.positions, batch.document_lengths, dtype), Scratch()
        cross_layer = cross_layer or self.cross_layer(batch.input_ids)[0]
        contexts = [
            BlockContext(
                config=self._layer_configs[number],
                layer=layer,
                rotary=table,
                segment_runs=batch.segment_runs,
                scratch=scratch,
                query_rotary=query_table,
                number=number,
                cross_layer=cross_layer,
            )
            for number, (layer, (table, query_table)) in enumerate(zip(self.config.layers, tables, strict=True))
        ]
        contexts[-1] = contexts[-1]._replace(loss_positions=loss_positions)
        return contexts

    def cross_layer(
        self, token_ids: Tensor, dropout_seed: int | None = None
    ) -> tuple[CrossLayer | None, PLEInputsSaved | None]:
        """Return the tensors that layers read in addition to the residual stream, and what their backward needs.

        Only Gemma 4 has such tensors: shared keys and values, and per-layer embeddings (PLE), which a small network
        computes from the token ids before the first block (`nn.decoder.ple_inputs`). Other families return None twice.
        """
        # only Gemma 4 has `value_norm`, and only its layers may share keys and values
        if not self.config.value_norm and self.config.per_layer is None:
            return None, None
        if self.active.per_layer is None:
            return CrossLayer(self.config.kv_sources), None
        embedded = self.embed(token_ids)
        per_layer = self.active.per_layer
        ple, saved = ple_inputs_forward(embedded, token_ids, per_layer, self.config, self.lora, dropout_seed)
        return CrossLayer(self.config.kv_sources, ple), saved

    def block_adapters(self, dropout_seed: int | None) -> list[BlockAdapter]:
        """Return the adapter of every block in the compute dtype; `dropout_seed` is None for no dropout.

        A `BlockAdapter` contains views of the adapter's flat buffers. It is cached and the same in every pass, unless
        the adapter uses dropout, or DoRA, which divides by the norm of each row of W + s B A of the current step.
        """
        lora, dora = self.lora, self._trained.uses_dora
        buffer = None if lora is None else lora.compute_values
        cacheable = not dora and (dropout_seed is None or not self._trained.uses_dropout)
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
            loss_scaling: for example 1 / n for n supervised tokens in the whole step.
            dropout_seed: seed of this micro-batch's dropout masks, or None for no dropout.
            token_loss: the loss as a function of the log-probabilities of the supervised tokens. None for Σ nats, the
                cross-entropy.

        Returns:
            The loss without `loss_scaling`, 0-d float64: Σ nats over supervised tokens, or the value of `token_loss`.

        Raises:
            ValueError: no adapter is attached, or the cached hidden states of the batch start above a trained layer.
            UsageError: the model has no head.
        """
        require_head(self.config)
        logits_shape = None
        if self.recompute == "none" and self._trained.plain_head:
            logits_shape = chunk_shape(len(batch.supervised_positions), self.active.head, self.dtype)

        def head(x: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
            return self._head_gradient_and_loss(x, batch, loss_scaling, dropout_seed, scratch, token_loss)

        return self._run(batch, batch.supervised_positions, head, dropout_seed, logits_shape)

    @torch.no_grad()
    def state_loss_and_gradients(
        self,
        batch: PackedBatch,
        state_loss: StateLoss,
        positions: Tensor | None = None,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """Run one pass without the head, for a loss of the final states, and add ∂loss/∂parameters to `lora.gradients`.

        Args:
            state_loss: the loss as a function of the final hidden states, `Decoder.final_states`. The labels of the
                batch are not read.
            positions: (positions,) int64 in ascending order, whose states the loss reads; None for all.
            dropout_seed: as in `loss_and_gradients`.

        Returns:
            The loss as `state_loss` returned it.

        Raises:
            ValueError: as in `loss_and_gradients`.
        """

        def top(x: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
            scratch.release()
            states, norm = self._final_norm(x)
            loss, d_states = state_loss(states)
            return self._final_norm_backward(d_states, norm), loss

        return self._run(batch, positions, top, dropout_seed)

    def _run(
        self,
        batch: PackedBatch,
        positions: Tensor | None,
        top: Callable[[Tensor, Scratch], tuple[Tensor, Tensor]],
        dropout_seed: int | None,
        logits_shape: tuple[int, int] | None = None,
    ) -> Tensor:
        """Run forward pass, `top` and backward pass. Add all gradients to `lora.gradients`, and return the loss.

        Args:
            positions: positions at which the last block computes its output; None for all.
            top: everything after the last block. Maps the output x of the last block to ∂L/∂x and the loss.
            logits_shape: (chunk, vocab), the shape of the logits that the head computes at once. Their memory is
                allocated before the blocks run, and the blocks keep temporary tensors in it until the head runs. None
                to allocate nothing before the head runs.
        """
        lora, trained = self.lora, self._trained
        if lora is None:
            raise ValueError("there is no adapter to train: attach one first")
        self.refresh()
        cross_layer, ple_saved = self.cross_layer(batch.input_ids, dropout_seed)
        if trained.below_blocks and cross_layer is not None and cross_layer.ple is not None:
            cross_layer.d_ple = torch.zeros_like(cross_layer.ple)
        contexts = self.contexts(batch, positions, cross_layer)
        adapters, scratch = self.block_adapters(dropout_seed), contexts[-1].scratch
        if logits_shape is not None:
            scratch.reserve(logits_shape, torch.empty(0, dtype=self.dtype, device=self.device))

        x, saved = self._forward(batch, adapters, contexts, trained.end.layer)
        d_x: Tensor | None
        d_x, loss = top(x, scratch)
        del x
        for layer in reversed(range(trained.end.layer, len(contexts))):
            block_saved = saved.pop()
            assert block_saved is not None and d_x is not None
            groups = trained.end.input_grad_groups if layer == trained.end.layer else ALL_GROUPS
            weights, context = self.active.blocks[layer], contexts[layer]
            d_x = block_backward(d_x, block_saved, weights, adapters[layer], context, groups)
        if trained.below_blocks and d_x is not None:
            if ple_saved is not None and cross_layer is not None:
                ple_weights = not_none(self.active.per_layer)
                d_x = embedding_output_gradient(
                    d_x, cross_layer, ple_saved, ple_weights, self.config, lora, dropout_seed
                )
            if trained.embedding:
                d_x = self._scale_embedding(self._through_inputs(d_x, batch))
                embedding_gradients(d_x, batch.input_ids, self.active.embedding, self.config, lora)
        return loss

    def _forward(
        self, batch: PackedBatch, adapters: Sequence[BlockAdapter], contexts: Sequence[BlockContext], lowest_layer: int
    ) -> tuple[Tensor, list[BlockSaved | None]]:
        """Return the output of the last block, and the saved tensors of each block from the start layer on.

        Blocks below `lowest_layer` need no backward. Their entries are None.
        """
        first, x = (0, self.input_states(batch)) if batch.start is None else batch.start
        if first > lowest_layer:
            raise ValueError(f"the batch starts at layer {first}, above the trained layer {lowest_layer}")
        if first and first > self.config.start_layer(first):
            raise ValueError(
                f"the batch starts at layer {first}, but this layer or one above it uses the keys of a lower layer"
            )
        saved: list[BlockSaved | None] = []
        for layer in range(first, len(contexts)):
            needs_backward = layer >= lowest_layer
            recompute = self.recompute if needs_backward else "block"  # "block" saves least
            x, block_saved = block_forward(x, self.active.blocks[layer], adapters[layer], contexts[layer], recompute)
            saved.append(block_saved if needs_backward else None)
        return x, saved

    def _head_gradient_and_loss(
        self,
        x: Tensor,
        batch: PackedBatch,
        loss_scaling: float,
        dropout_seed: int | None,
        scratch: Scratch,
        token_loss: TokenLoss | None,
    ) -> tuple[Tensor, Tensor]:
        """Return ∂(loss_scaling · L)/∂x, and the loss L.

        x is the output of the last block, of shape (loss positions, hidden).
        """
        trained = self._trained
        scratch.release()  # memory peaks in the head
        (normed, norm), targets = self._final_norm(x), batch.labels[batch.supervised_positions]
        logits = None
        if trained.plain_head:
            logits = scratch.take("logits", chunk_shape(len(x), self.active.head, x.dtype), x)
        if batch.teacher is not None:
            if trained.head:
                raise ValueError("the adapter trains the head, but distillation needs a frozen head")
            head = self._head_of(dropout_seed)
            d_normed, loss = distillation_backward(normed, batch, head, batch.teacher, loss_scaling, logits)
        elif trained.head or token_loss is not None:
            head, lora = self._head_of(dropout_seed), self.lora if trained.head else None
            d_normed, loss = general_head_backward(normed, batch, head, lora, loss_scaling, token_loss, logits)
        else:
            # L is a sum of token losses, so the gradient of loss_scaling · L with respect to a token loss is known
            # before the head's forward: loss_scaling times the number of documents with the token. Therefore one call
            # computes the losses and d_normed.
            losses, (d_normed, *_) = linear_cross_entropy_backward(
                normed,
                self.active.head,
                targets,
                None,
                batch.loss_multiplier(loss_scaling, normed.dtype),
                self.config.logits,
                out=normed,
                logits=logits,
            )
            loss = batch.per_document(losses).sum(dtype=torch.float64)
        scratch.release(reserved=True)
        return self._final_norm_backward(d_normed, norm), loss

    def _head_of(self, dropout_seed: int | None) -> Head:
        require_head(self.config)
        return head_of(self.active.head, self.config, self.lora, self._trained, dropout_seed)

    def _final_norm(self, x: Tensor) -> tuple[Tensor, NormSaved | None]:
        """Return the normalized output of the last block and the saved tensors, or x and None without a final norm."""
        if self.active.final_norm is None:
            return x, None
        return norm_forward(x, self.active.final_norm, self.active.final_norm_bias, self.config)

    def _final_norm_backward(self, d_normed: Tensor, saved: NormSaved | None) -> Tensor:
        return d_normed if saved is None else norm_backward(d_normed, saved, self._trained.d_final_norm)

    def _through_inputs(self, d_x: Tensor, batch: PackedBatch) -> Tensor:
        """Map ∂L/∂(input of block 0) to ∂L/∂(embedded tokens). They are equal unless an encoder has a norm there."""
        weights = self.active.inputs
        if weights is None:
            return d_x
        _, saved = encoder_inputs_forward(self.embed(batch.input_ids), batch, weights, self.config.norm_eps)
        return encoder_inputs_backward(d_x, saved)
