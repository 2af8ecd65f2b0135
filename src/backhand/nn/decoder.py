"""The decoder engine: a training step of a decoder language model with no autograd graph at all.

    x = embedding(ids);  x = block(x) for each block;  L = Σ cross-entropy(head(norm(x))) over supervised positions

The forward pass keeps per block what `nn.block` lists; the backward pass walks the blocks from the top and adds every
adapter gradient to one flat buffer. It stops at the lowest adapted module: below it nothing is kept and nothing is
computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from backhand.nn.adapted_group import group_forward
from backhand.nn.attention_half import BlockContext
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.block import RECOMPUTE_MODES, BlockSaved, block_backward, block_forward
from backhand.nn.block_adapter import (
    EMBEDDING,
    BlockAdapter,
    GroupAdapter,
    block_adapter,
    group_adapter,
    group_seed,
    lowest_trained_group,
)
from backhand.nn.decoder_weights import DecoderWeights, linear_parts, load_weights, module_shapes, named_views
from backhand.nn.embedding_layer import embed, embed_backward
from backhand.nn.family import DecoderConfig
from backhand.nn.family_parsing import decoder_config
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import TOKENS, LoRAParameters
from backhand.nn.module_shapes import ModuleShapes, check_fits
from backhand.nn.rotary_frequencies import inverse_frequencies
from backhand.nn.scratch import Scratch
from backhand.nn.trained_head import head_loss_and_gradients, head_losses
from backhand.nn.trained_weights import TrainedWeights
from backhand.ops.linear_cross_entropy import (
    HeadFactors,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_backward, rms_norm_forward
from backhand.ops.rotary import RotaryTable, rotary_table

HEAD = "lm_head"
FINAL_NORM = "model.norm.weight"


class Decoder:
    """A frozen decoder, and at most one adapter that it trains.

    Attributes:
        config: the family as data.
        weights: the frozen weights in the compute dtype.
        active: the weights that are computed with: the frozen ones, or those tensors of the adapter that are trained as
            they are in their place.
        lora: the attached adapter, or None.
        recompute: `none`, `mlp` or `block`: what the backward pass computes again instead of keeping it.
        shares_prefixes: batches may have a shared prefix.
    """

    shares_prefixes = True

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, *, recompute: str = "none") -> None:
        if recompute not in RECOMPUTE_MODES:
            raise ValueError(f"recompute is one of {', '.join(RECOMPUTE_MODES)}, not {recompute!r}")
        self.config = config
        self.weights = weights
        self.active = weights
        self.recompute = recompute
        self.lora: LoRAParameters | None = None
        self._trained: TrainedWeights | None = None
        self._head: GroupAdapter | None = None
        self._frequencies = [inverse_frequencies(rotary, config.head_dim, self.device) for rotary in config.rotary]

    @classmethod
    def from_source(
        cls, source: ModelSource, *, dtype: torch.dtype, device: torch.device | str = "cpu", recompute: str = "none"
    ) -> Decoder:
        """Read the configuration and every tensor of a model source into the compute dtype.

        Raises:
            UnsupportedModel: for a configuration that the engine does not compute exactly.
            ArtifactError: for tensors that are missing or of another shape.
        """
        config = decoder_config(source.config)
        return cls(config, load_weights(source, config, dtype, device), recompute=recompute)

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

    def frozen_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, view) of every base tensor; training must not move any of them."""
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
        self.refresh()

    def detach(self) -> None:
        """Back to the base model."""
        self.lora, self._trained, self._head, self.active = None, None, None, self.weights

    def refresh(self) -> None:
        """Take over the adapter's tensors that are trained as they are; each pass begins with it."""
        self._head = None
        if self.lora is not None and self.lora.compute_dtype != self.dtype:
            self.lora.refresh_compute(self.dtype)  # it was attached to a decoder of another dtype meanwhile
        if self._trained is not None:
            self.active = self._trained.current()

    def start_values(self, lora: LoRAParameters) -> None:
        """Set what in a fresh adapter starts from the base model, see `LoRAParameters.start_at`."""
        if not lora.plain:
            base = dict(named_views(self.weights, self.config)) | {f"{HEAD}.weight": self.weights.head}
            lora.start_at(base.__getitem__)

    def embed(self, input_ids: Tensor) -> Tensor:
        """x₀ of the first block, (tokens, hidden)."""
        return embed(input_ids, self.active.embedding, self.config, self.lora)

    def rotary_tables(self, positions: Tensor) -> list[RotaryTable]:
        """The angles of these positions, one table for each rotary configuration."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return [rotary_table(positions, frequencies.to(wide)) for frequencies in self._frequencies]

    def contexts(self, batch: PackedBatch, rows: Tensor | None = None) -> list[BlockContext]:
        """What each block needs to know about the batch, and the last one about the rows that are wanted of it."""
        tables, scratch = self.rotary_tables(batch.positions), Scratch()
        contexts = [
            BlockContext(
                self.config, layer.window, tables[layer.rotary], batch.runs, scratch, shared=batch.shared_prefix
            )
            for layer in self.config.layers
        ]
        contexts[-1] = contexts[-1]._replace(rows=rows)
        return contexts

    def block_adapters(self, dropout_seed: int | None) -> list[BlockAdapter]:
        """The adapter of every block in the compute dtype; no dropout without a seed."""
        dora = self.lora is not None and any(slot.use_dora for slot in self.lora.slots.values())
        return [
            block_adapter(self.lora, layer, dropout_seed, linear_parts(block, self.config) if dora else None)
            for layer, block in enumerate(self.active.blocks)
        ]

    def head_adapter(self, dropout_seed: int | None = None, chunk: int = 0) -> GroupAdapter:
        """The head's adapter in the compute dtype; no dropout without a seed, one of its own for each chunk."""
        seed = None if dropout_seed is None else group_seed(dropout_seed, len(self.config.layers), chunk)
        if self._head is not None and seed is None:
            return self._head
        adapter = group_adapter(self.lora, (HEAD,), seed, (self.active.head,))
        if seed is None and adapter.extras is not None:
            self._head = adapter  # DoRA's norm goes over the whole table: not once a generated token
        return adapter

    def head_factors(self, dropout_seed: int | None = None) -> HeadFactors | None:
        """The factors of a head with nothing else, if it has any; no dropout without a seed."""
        (factors,), dropout, _ = self.head_adapter(dropout_seed)[1:]
        return None if factors is None else HeadFactors(*factors, dropout)

    def _head_is_plain(self) -> bool:
        """Whether nothing but factors is trained in the head."""
        return self.lora is None or (self.head_adapter().extras is None and self._head_rows() is None)

    def _head_rows(self) -> str | None:
        """Name of the trained rows of the head's table, where it is tied to an embedding with some."""
        name = f"{EMBEDDING}.{TOKENS}"
        return name if self.config.tied_head and self.lora is not None and name in self.lora.trained else None

    def hidden_states(self, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
        """The last block's output before the final norm, (tokens, hidden) or these rows of it, keeping nothing."""
        self.refresh()
        x = self.embed(batch.input_ids)
        adapters = self.block_adapters(None)
        for layer, context in enumerate(self.contexts(batch, rows)):
            x, _ = block_forward(x, self.active.blocks[layer], adapters[layer], context, "block")
        return x

    @torch.no_grad()
    def logits(self, input_ids: Tensor, document_lengths: Sequence[int] | None = None) -> Tensor:
        """Logits of every position, (tokens, vocab), in the compute dtype.

        Args:
            input_ids: (tokens,) int64.
            document_lengths: they sum to tokens; None for one document.
        """
        lengths = (input_ids.shape[0],) if document_lengths is None else tuple(document_lengths)
        x = self.hidden_states(PackedBatch(input_ids, torch.full_like(input_ids, IGNORE_INDEX), lengths))
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        """Final norm and output projection: (rows, hidden) to (rows, vocab)."""
        normed, _ = self._final_norm(x)
        return group_forward(normed, self.active.head, None, (self.config.vocab_size,), self.head_adapter())[0]

    def _final_norm(self, x: Tensor) -> tuple[Tensor, RMSNormSaved]:
        return rms_norm_forward(x, self.active.final_norm, self.config.norm_eps, self.config.norm_offset)

    @torch.no_grad()
    def token_losses(self, batch: PackedBatch) -> Tensor:
        """(supervised tokens,) losses in nats, in the order of the positions, without gradients and without dropout."""
        supervised = batch.supervised_positions
        x = self.hidden_states(batch, supervised)
        (normed, _), targets = self._final_norm(x), batch.labels[supervised]
        if self._head_is_plain():
            return linear_cross_entropy_forward(normed, self.active.head, targets, self.head_factors())
        return head_losses(normed, self.active.head, targets, self.head_adapter())

    def loss(self, batch: PackedBatch) -> Tensor:
        """Σ nats over supervised positions, 0-d float64, without gradients and without dropout."""
        return self.token_losses(batch).sum(dtype=torch.float64)

    @torch.no_grad()
    def loss_and_gradients(self, batch: PackedBatch, loss_scaling: float, dropout_seed: int | None = None) -> Tensor:
        """One forward and backward pass: adds ∂(loss_scaling · Σ nats)/∂(what is trained) to `lora.gradients`.

        Args:
            batch: the packed documents.
            loss_scaling: e.g. 1 / supervised tokens of the whole step.
            dropout_seed: draws this micro-batch's dropout masks; None for no dropout.

        Returns:
            Σ nats over supervised positions, 0-d float64.

        Raises:
            ValueError: without an attached adapter.
        """
        lora = self.lora
        if lora is None:
            raise ValueError("there is no adapter to train: attach one first")
        contexts = self.contexts(batch, batch.supervised_positions)
        lowest_layer, lowest_group = lowest_trained_group(lora, len(contexts))

        self.refresh()
        adapters = self.block_adapters(dropout_seed)
        kept: list[BlockSaved | None] = []
        x = self.embed(batch.input_ids)
        for layer, context in enumerate(contexts):
            below = layer < lowest_layer
            x, saved = block_forward(
                x, self.active.blocks[layer], adapters[layer], context, "block" if below else self.recompute
            )
            kept.append(None if below else saved)

        d_x, loss = self._head_loss_and_gradient(x, batch, loss_scaling, dropout_seed)
        del x
        for layer in reversed(range(lowest_layer, len(contexts))):
            saved_block = kept.pop()
            assert saved_block is not None and d_x is not None
            d_x = block_backward(
                d_x,
                saved_block,
                self.active.blocks[layer],
                adapters[layer],
                contexts[layer],
                lora,
                lowest_group if layer == lowest_layer else -1,
            )
        if (lowest_layer, lowest_group) == (0, -1) and d_x is not None:
            embed_backward(d_x, batch.input_ids, self.active.embedding, self.config, lora)
        return loss

    def _head_loss_and_gradient(
        self, x: Tensor, batch: PackedBatch, loss_scaling: float, dropout_seed: int | None
    ) -> tuple[Tensor | None, Tensor]:
        """∂L/∂x of the last block's output at the supervised positions, (supervised, hidden), and Σ nats."""
        lora = self.lora
        assert lora is not None
        (normed, norm), targets = self._final_norm(x), batch.labels[batch.supervised_positions]
        if self._head_is_plain():
            losses, grads = linear_cross_entropy_backward(
                normed, self.active.head, targets, self.head_factors(dropout_seed), loss_scaling
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
                loss_scaling,
                self._head_rows(),
            )
        trained = FINAL_NORM in lora.trained
        d_x, d_weight = rms_norm_backward(d_normed, norm, weight_gradient=trained)
        if d_weight is not None:
            lora.gradient(FINAL_NORM).add_(d_weight)
        return d_x, losses.sum(dtype=torch.float64)
