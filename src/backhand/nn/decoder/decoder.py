"""The decoder engine: a training step of a decoder language model with no autograd graph at all.

    x = embedding(ids);  x = block(x) for each block;  L = Σ cross-entropy(head(norm(x))) over supervised positions

The forward pass keeps per block what `nn.decoder.block` lists. The backward pass walks the blocks from the top and adds
every adapter gradient to one flat buffer (`nn.lora_parameters`). It stops at the lowest trained module: nothing below
is kept for it. A batch may bring the cached output of the blocks below (`Decoder.entering`); then the forward pass
begins there. `Decoder.loss_and_gradients` is both passes. What an adapter may train in embedding and head beside the
head's factors stands in `trained_ends`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch, Scratch, TokenLoss
from backhand.nn.decoder.adapted_group import (
    EMBEDDING,
    BlockAdapter,
    GroupAdapter,
    block_adapter,
    group_adapter,
    group_forward,
    group_seed,
    lowest_trained_group,
    trains_embedding,
)
from backhand.nn.decoder.block import RECOMPUTE_MODES, BlockSaved, block_backward, block_forward
from backhand.nn.decoder.carried import Carried
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.mixer import BlockContext
from backhand.nn.decoder.per_layer_input import BeginKept, embedded_gradient, inputs_forward
from backhand.nn.decoder.rotary import frequencies_of
from backhand.nn.decoder.trained_ends import adapted_rows, embedding_gradients, head_loss_and_gradients, head_losses
from backhand.nn.decoder.weights import (
    DecoderWeights,
    TrainedWeights,
    linear_parts,
    load_weights,
    module_shapes,
    named_views,
)
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import TOKENS, LoRAParameters
from backhand.nn.module_shapes import ModuleShapes, check_fits
from backhand.ops.frozen_matrix import FrozenMatrix, frozen_dense, frozen_rows
from backhand.ops.linear_cross_entropy import (
    HeadFactors,
    chunk_shape,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    ruled,
)
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_backward, rms_norm_forward
from backhand.ops.rotary import RotaryTable, angles, scaled_for_queries

HEAD = "lm_head"


class Decoder:
    """A frozen decoder, and at most one adapter that it trains.

    Attributes:
        config: the model as data, sizes and what is particular to its family (Llama, Qwen3, Gemma 3, …).
        weights: the frozen weights in the compute dtype.
        active: the weights that are computed with: the frozen ones, but for tensors that the adapter trains itself,
            without factors (whole modules, rows of the embedding); these stand in the place of the base's.
        lora: the attached adapter, or None.
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
        self.lora: LoRAParameters | None = None
        self._trained: TrainedWeights | None = None
        self._head: GroupAdapter | None = None
        self._adapters: tuple[Tensor | None, list[BlockAdapter]] | None = None
        self._sized = [config.at(layer) for layer in config.layers]
        self._frequencies = [
            frequencies_of(rotary, head_dim, self.device)
            for rotary, head_dim in zip(config.rotary, config.rotary_dims, strict=True)
        ]

    @classmethod
    def from_source(
        cls,
        source: ModelSource,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        recompute: str = "none",
        quantized: bool = False,
    ) -> Decoder:
        """Read the configuration and every tensor of a model source into the compute dtype.

        Args:
            source: an opened model.
            dtype: the compute dtype.
            device: where to compute.
            recompute: see the class.
            quantized: leave the matrices as the source stores them.

        Raises:
            UnsupportedModel: for a configuration that the engine does not compute exactly.
            ArtifactError: for tensors that are missing or of another shape.
        """
        config = decoder_config(source.config)
        return cls(config, load_weights(source, config, dtype, device, quantized=quantized), recompute=recompute)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.weights.embedding.device

    def module_shapes(self) -> ModuleShapes:
        """(out, in) of every linear module an adapter can target, by dotted path, and what else it can train."""
        return module_shapes(self.config)

    def frozen_tensors(self) -> Iterator[tuple[str, FrozenMatrix]]:
        """(Hugging Face name, view or quantized matrix) of all of the base; training must not move any of it."""
        return named_views(self.weights, self.config)

    def attach(self, lora: LoRAParameters) -> None:
        """Use and train this adapter; its names must be modules of this decoder.

        Raises:
            ValueError: for a slot or a trained tensor that is none here or has another shape.
        """
        check_fits(lora, self.module_shapes())
        lora.refresh_compute(self.dtype)
        self.lora = lora
        self._trained = TrainedWeights(self.weights, self.config, lora) if lora.trained else None
        self._adapters = None
        self.refresh()

    def detach(self) -> None:
        """Back to the base model."""
        self.lora, self._trained, self._head, self._adapters, self.active = None, None, None, None, self.weights

    def refresh(self) -> None:
        """Take over the adapter as it is now, with the tensors that it trains itself; each pass calls this first."""
        self._head = None
        if self.lora is not None and self.lora.compute_dtype != self.dtype:
            self.lora.refresh_compute(self.dtype)  # it was attached to a decoder of another dtype meanwhile
        if self._trained is not None:
            self.active = self._trained.current()

    def start_values(self, lora: LoRAParameters) -> None:
        """Set what in a fresh adapter starts from the base model, see `LoRAParameters.start_at`."""
        if not lora.plain:
            base = dict(named_views(self.weights, self.config)) | {f"{HEAD}.weight": self.weights.head}
            lora.start_at(lambda name: frozen_dense(base[name]))

    def embed(self, input_ids: Tensor) -> Tensor:
        """x₀ of the first block, (tokens, hidden): c · table[ids], with c = √hidden in Gemma and 1 elsewhere."""
        lora, table = self.lora, self.active.embedding
        if lora is None or EMBEDDING not in lora:
            return self._embedding_scaled(frozen_rows(table, input_ids))
        return self._embedding_scaled(adapted_rows(input_ids, table, self.config, lora))

    def _embedding_scaled(self, x: Tensor) -> Tensor:
        """c x; c is rounded to the compute dtype, as transformers does it."""
        if self.config.embedding_scaling == 1.0:
            return x
        return x * torch.tensor(self.config.embedding_scaling, dtype=x.dtype, device=x.device)

    def rotary_tables(self, positions: Tensor, reach: Tensor) -> list[tuple[RotaryTable | None, RotaryTable | None]]:
        """The angles of these positions in every layer, and those of queries where they are others; None without any.

        One table for each rotary configuration.

        Args:
            positions: (tokens,) int64.
            reach: (tokens,) int64, how long each token's document is.
        """
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        tables = [angles(frequencies, positions, wide, reach) for frequencies in self._frequencies]
        scaling = self.config.query_scaling
        queries = [
            None if scaling is None else scaled_for_queries(table, positions, scaling.beta, scaling.length)
            for table in tables
        ]
        return [
            (None, None) if layer.rotary is None else (tables[layer.rotary], queries[layer.rotary])
            for layer in self.config.layers
        ]

    def contexts(
        self, batch: PackedBatch, rows: Tensor | None = None, carried: Carried | None = None
    ) -> list[BlockContext]:
        """What each block needs to know of the batch; `rows`, (wanted,) int64, are those wanted of the last one.

        What the pass carries is made here where it is not given and the family has anything.
        """
        if batch.parents and not self.shares_prefixes:
            raise ValueError("what documents share would be rotated by the length of one document alone")
        tables, scratch = self.rotary_tables(batch.positions, batch.reach), Scratch()
        carried = carried or self.carried(batch.input_ids)[0]
        contexts = [
            BlockContext(sized, layer, table, batch.runs, scratch, queries, None, number, carried)
            for number, (sized, layer, (table, queries)) in enumerate(
                zip(self._sized, self.config.layers, tables, strict=True)
            )
        ]
        contexts[-1] = contexts[-1]._replace(wanted=rows)
        return contexts

    def carried(self, token_ids: Tensor, dropout_seed: int | None = None) -> tuple[Carried | None, BeginKept | None]:
        """What a pass over these tokens carries beside the stream, None for nothing; and what its begin kept."""
        if not self.config.value_norm and self.config.per_layer is None:
            return None, None
        weights = self.active.per_layer
        if weights is None:
            return Carried(self.config.lenders), None
        h = self.embed(token_ids)
        inputs, kept = inputs_forward(h, token_ids, weights, self.config, self.lora, dropout_seed)
        return Carried(self.config.lenders, inputs), kept

    def block_adapters(self, dropout_seed: int | None) -> list[BlockAdapter]:
        """The adapter of every block in the compute dtype; no dropout without a seed.

        Without a seed they name the same views in each pass, but for DoRA, whose norms are taken here.
        """
        lora = self.lora
        slots = [] if lora is None else list(lora.slots.values())
        buffer = None if lora is None else lora.compute_values
        dora, drops = any(slot.use_dora for slot in slots), any(slot.dropout for slot in slots)
        fixed = not dora and not (drops and dropout_seed is not None)
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

    def head_adapter(self, dropout_seed: int | None = None, chunk: int = 0) -> GroupAdapter:
        """The head's adapter in the compute dtype; no dropout without a seed, one of its own for each chunk."""
        seed = None if dropout_seed is None else group_seed(dropout_seed, len(self.config.layers), chunk)
        if self._head is not None and seed is None:
            return self._head
        adapter = group_adapter(self.lora, (HEAD,), (self.config.vocab_size,), seed, (self.active.head,))
        if seed is None and adapter.extras is not None:
            self._head = adapter  # DoRA's norm goes over the whole table: not once a generated token
        return adapter

    def head_factors(self, dropout_seed: int | None = None) -> HeadFactors | None:
        """The factors of a head with nothing else, if it has any; no dropout without a seed."""
        group = self.head_adapter(dropout_seed).group
        if not group.members:
            return None
        (own,) = group.members
        return HeadFactors(own.lora_A, own.lora_B, own.scaling, group.dropout)

    def _head_is_plain(self) -> bool:
        """Whether nothing but factors is trained in the head."""
        return self.lora is None or (self.head_adapter().extras is None and self._head_rows() is None)

    def _head_rows(self) -> str | None:
        """Name of the trained rows of the head's table, where it is tied to an embedding with some."""
        name = f"{EMBEDDING}.{TOKENS}"
        return name if self.config.tied_head and self.lora is not None and name in self.lora.trained else None

    def hidden_states(self, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
        """The last block's output before the final norm, (tokens, hidden) or these rows of it, keeping nothing."""
        return self._passed(batch, len(self.config.layers), rows)

    @torch.no_grad()
    def entering(self, batch: PackedBatch, layer: int) -> Tensor:
        """x₀ of block `layer`, (tokens, hidden): the output of the embedding and the blocks below it."""
        return self._passed(batch, layer)

    def _passed(self, batch: PackedBatch, until: int, rows: Tensor | None = None) -> Tensor:
        """x₀ of block `until`, or the last one's output; `rows` are those wanted of it."""
        self.refresh()
        first, x = self._begun(batch)
        adapters = self.block_adapters(None)
        contexts = self.contexts(batch, rows)
        for layer in range(first, until):
            x, _ = block_forward(x, self.active.blocks[layer], adapters[layer], contexts[layer], "block")
        return x

    def _begun(self, batch: PackedBatch) -> tuple[int, Tensor]:
        """The first block to compute, and its x₀."""
        return (0, self.embed(batch.input_ids)) if batch.entering is None else batch.entering

    @torch.no_grad()
    def logits(self, input_ids: Tensor, document_lengths: Sequence[int] | None = None) -> Tensor:
        """Logits of every position, (tokens, vocab), in the compute dtype.

        Args:
            input_ids: (tokens,) int64.
            document_lengths: they sum to tokens; None for one document.
        """
        lengths = (input_ids.shape[0],) if document_lengths is None else tuple(document_lengths)
        batch = PackedBatch(input_ids, torch.full_like(input_ids, IGNORE_INDEX), lengths)
        return self.head(self.hidden_states(batch))

    def head(self, x: Tensor) -> Tensor:
        """Logits, (rows, vocab), of the last block's output, (rows, hidden)."""
        projected = self.projected(x)
        return ruled(projected, self.config.logits)[0].to(projected.dtype)

    def projected(self, x: Tensor) -> Tensor:
        """Final norm and output projection: (rows, hidden) to (rows, vocab), before what the family does to logits."""
        normed, _ = self._final_norm(x)
        return group_forward(normed, self.active.head, None, self.head_adapter())[0]

    def _final_norm(self, x: Tensor) -> tuple[Tensor, RMSNormSaved]:
        return rms_norm_forward(x, self.active.final_norm, self.config.norm_eps, self.config.norm_offset)

    @torch.no_grad()
    def token_losses(self, batch: PackedBatch) -> Tensor:
        """(supervised tokens,) losses in nats, document by document, without gradients and without dropout."""
        supervised = batch.supervised_positions
        x = self._passed(batch, len(self.config.layers), supervised)
        (normed, _), targets = self._final_norm(x), batch.labels[supervised]
        return batch.of_documents(self._head_losses(normed, targets, None, None))

    def _head_losses(
        self, normed: Tensor, targets: Tensor, dropout_seed: int | None, scratch: Scratch | None
    ) -> Tensor:
        """(rows,) losses in nats of normed rows, (rows, hidden)."""
        head, rule = self.active.head, self.config.logits
        if self._head_is_plain():
            factors = self.head_factors(dropout_seed)
            room = None if scratch is None else self._logits_room(normed, scratch)
            return linear_cross_entropy_forward(normed, head, targets, factors, rule, logits=room)
        return head_losses(normed, head, targets, lambda chunk: self.head_adapter(dropout_seed, chunk), rule)

    def _logits_room(self, x: Tensor, scratch: Scratch) -> Tensor:
        """Where a chunk's logits of x, (rows, hidden), may stand."""
        return scratch.take("logits", chunk_shape(len(x), self.active.head, x.dtype), x)

    def loss(self, batch: PackedBatch) -> Tensor:
        """Σ nats over supervised tokens, 0-d float64, without gradients and without dropout."""
        return self.token_losses(batch).sum(dtype=torch.float64)

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
            batch: the packed documents.
            loss_scaling: e.g. 1 / supervised tokens of the whole step.
            dropout_seed: draws this micro-batch's dropout masks; None for no dropout.
            token_loss: the loss as a function of the supervised tokens' log-probabilities; None for Σ nats, whose
                gradient the head computes along with it.

        Returns:
            The loss, 0-d float64: Σ nats over supervised tokens, or what `token_loss` says.

        Raises:
            ValueError: without an attached adapter, or for a batch that enters above something trained.
        """
        lora = self.lora
        if lora is None:
            raise ValueError("there is no adapter to train: attach one first")
        self.refresh()
        carried, begin = self.carried(batch.input_ids, dropout_seed)
        contexts = self.contexts(batch, batch.supervised_positions, carried)
        lowest_layer, lowest_group = lowest_trained_group(lora.layout, len(contexts))
        if carried is not None and carried.inputs is not None and (lowest_layer, lowest_group) == (0, -1):
            carried.d_inputs = torch.zeros_like(carried.inputs)

        scratch = contexts[-1].scratch
        if self.recompute == "none" and self._head_is_plain():
            # Not under recomputation: blocks then allocate more that is not kept, and the logits take its place later.
            supervised = len(batch.supervised_positions)
            scratch.reserve(chunk_shape(supervised, self.active.head, self.dtype), self.active.final_norm)
        adapters = self.block_adapters(dropout_seed)
        kept: list[BlockSaved | None] = []
        first, x = self._begun(batch)
        if first > lowest_layer:
            raise ValueError(f"the batch enters at layer {first}, and layer {lowest_layer} is trained")
        if first and first > self.config.enterable(first):
            raise ValueError(f"the batch enters at layer {first}, above one whose keys are used there")
        for layer in range(first, len(contexts)):
            below = layer < lowest_layer  # nothing here is trained, nor further down: keep as little as can be
            recompute = "block" if below else self.recompute
            x, saved = block_forward(x, self.active.blocks[layer], adapters[layer], contexts[layer], recompute)
            kept.append(None if below else saved)

        d_x, loss = self._head_loss_and_gradient(x, batch, loss_scaling, dropout_seed, scratch, token_loss)
        del x
        for layer in reversed(range(lowest_layer, len(contexts))):
            saved_block = kept.pop()
            assert saved_block is not None and d_x is not None
            lowest = lowest_group if layer == lowest_layer else -1
            weights, adapter, context = self.active.blocks[layer], adapters[layer], contexts[layer]
            d_x = block_backward(d_x, saved_block, weights, adapter, context, lowest)
        if (lowest_layer, lowest_group) == (0, -1) and d_x is not None:
            # The embedding is trained, or what makes the layers' inputs.
            if begin is not None and carried is not None:
                d_x = embedded_gradient(d_x, carried, begin, self.active.per_layer, self.config, lora, dropout_seed)
            if trains_embedding(lora):
                d_x = self._embedding_scaled(d_x)
                embedding_gradients(d_x, batch.input_ids, self.active.embedding, self.config, lora)
        return loss

    def _head_loss_and_gradient(
        self,
        x: Tensor,
        batch: PackedBatch,
        loss_scaling: float,
        dropout_seed: int | None,
        scratch: Scratch,
        token_loss: TokenLoss | None,
    ) -> tuple[Tensor | None, Tensor]:
        """∂L/∂x and the loss, from the last block's output at the supervised positions, (supervised, hidden) both."""
        lora = self.lora
        assert lora is not None
        scratch.let_go()  # most is held while the head is at work
        (normed, norm), targets = self._final_norm(x), batch.labels[batch.supervised_positions]
        multiplier: float | Tensor = loss_scaling if batch.weights is None else loss_scaling * batch.weights
        loss: Tensor | None = None
        if token_loss is not None:
            log_p = batch.of_documents(-self._head_losses(normed, targets, dropout_seed, scratch))
            loss, d_log_p = token_loss(log_p)
            multiplier = -loss_scaling * batch.at_positions(d_log_p)  # of the nats
        if self._head_is_plain():
            # Forward and backward at once: the loss comes last in the model, so its gradient can follow immediately.
            factors = self.head_factors(dropout_seed)
            losses, grads = linear_cross_entropy_backward(
                normed,
                self.active.head,
                targets,
                factors,
                multiplier,
                self.config.logits,
                out=normed if factors is None else None,
                logits=self._logits_room(x, scratch),
            )
            if grads.d_lora_A is not None and grads.d_lora_B is not None:
                lora.d_lora_A(HEAD).add_(grads.d_lora_A)
                lora.d_lora_B(HEAD).add_(grads.d_lora_B)
            d_normed = grads.d_x
        else:
            losses, d_normed = head_loss_and_gradients(
                normed,
                self.active.head,
                targets,
                lambda chunk: self.head_adapter(dropout_seed, chunk),
                lora,
                multiplier,
                self.config.logits,
                self._head_rows(),
            )
        scratch.let_go(room=True)
        name = f"{self.config.final_norm}.weight"
        trained = name in lora.trained
        d_x, d_weight = rms_norm_backward(d_normed, norm, weight_gradient=trained)
        if d_weight is not None:
            lora.gradient(name).add_(d_weight)
        return d_x, batch.of_documents(losses).sum(dtype=torch.float64) if loss is None else loss
