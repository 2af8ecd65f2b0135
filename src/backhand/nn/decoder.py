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

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.block import RECOMPUTE_MODES, BlockContext, BlockSaved, block_backward, block_forward
from backhand.nn.block_adapter import block_adapter, group_seed, lowest_adapted_group
from backhand.nn.decoder_weights import DecoderWeights, load_weights, module_shapes, named_views
from backhand.nn.family import DecoderConfig
from backhand.nn.family_parsing import decoder_config
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.rotary_frequencies import inverse_frequencies
from backhand.ops.linear_cross_entropy import (
    HeadFactors,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)
from backhand.ops.lora_linear import Dropout, frozen_linear
from backhand.ops.rms_norm import rms_norm_backward, rms_norm_forward
from backhand.ops.rotary import RotaryTable, rotary_table

HEAD = "lm_head"


class Decoder:
    """A frozen decoder, and at most one adapter that it trains.

    Attributes:
        config: the family as data.
        weights: the frozen weights in the compute dtype.
        lora: the attached adapter, or None.
        recompute: `none`, `mlp` or `block`: what the backward pass computes again instead of keeping it.
    """

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, *, recompute: str = "none") -> None:
        if recompute not in RECOMPUTE_MODES:
            raise ValueError(f"recompute is one of {', '.join(RECOMPUTE_MODES)}, not {recompute!r}")
        self.config = config
        self.weights = weights
        self.recompute = recompute
        self.lora: LoRAParameters | None = None
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

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every module an adapter can target, by dotted path."""
        return module_shapes(self.config)

    def frozen_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, view) of every base tensor; training must not move any of them."""
        return named_views(self.weights, self.config)

    def attach(self, lora: LoRAParameters) -> None:
        """Use and train this adapter; its names must be modules of this decoder.

        Raises:
            ValueError: for a slot that is no module here or has another shape.
        """
        shapes = self.module_shapes()
        for name, slot in lora.slots.items():
            if shapes.get(name) != (slot.out_features, slot.in_features):
                raise ValueError(
                    f"{name}: adapter is for {(slot.out_features, slot.in_features)}, model has {shapes.get(name)}"
                )
        lora.refresh_compute(self.dtype)
        self.lora = lora

    def detach(self) -> None:
        """Back to the base model."""
        self.lora = None

    def embed(self, input_ids: Tensor) -> Tensor:
        """x₀ of the first block, (tokens, hidden)."""
        x = torch.nn.functional.embedding(input_ids, self.weights.embedding)
        if self.config.embedding_scaling != 1.0:
            # The factor is rounded to the compute dtype, as transformers does it.
            x = x * torch.tensor(self.config.embedding_scaling, dtype=x.dtype, device=x.device)
        return x

    def rotary_tables(self, positions: Tensor) -> list[RotaryTable]:
        """The angles of these positions, one table for each rotary configuration."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return [rotary_table(positions, frequencies.to(wide)) for frequencies in self._frequencies]

    def contexts(self, batch: PackedBatch) -> list[BlockContext]:
        """What each block needs to know about the batch."""
        tables = self.rotary_tables(batch.positions)
        return [
            BlockContext(self.config, layer.window, tables[layer.rotary], batch.runs) for layer in self.config.layers
        ]

    def head_factors(self, dropout_seed: int | None = None) -> HeadFactors | None:
        """The head's adapter in the compute dtype, if it has one; no dropout without a seed."""
        if self.lora is None or HEAD not in self.lora:
            return None
        slot, dropout = self.lora.slots[HEAD], None
        if dropout_seed is not None and slot.dropout > 0:
            dropout = Dropout(slot.dropout, group_seed(dropout_seed, len(self.config.layers), 0))
        return HeadFactors(self.lora.compute_A(HEAD), self.lora.compute_B(HEAD), slot.scaling, dropout)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """The last block's output before the final norm, (tokens, hidden), keeping nothing."""
        x = self.embed(batch.input_ids)
        for layer, context in enumerate(self.contexts(batch)):
            x, _ = block_forward(x, self.weights.blocks[layer], block_adapter(self.lora, layer, None), context, "block")
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
        normed, _ = rms_norm_forward(x, self.weights.final_norm, self.config.norm_eps, self.config.norm_offset)
        logits = frozen_linear(normed, self.weights.head, None, None)
        factors = self.head_factors()
        if factors is not None:
            logits.addmm_(normed @ factors.lora_A.T, factors.lora_B.T, alpha=factors.scaling)
        return logits

    @torch.no_grad()
    def token_losses(self, batch: PackedBatch) -> Tensor:
        """(supervised tokens,) losses in nats, in the order of the positions, without gradients and without dropout."""
        supervised = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        x = self.hidden_states(batch)[supervised]
        normed, _ = rms_norm_forward(x, self.weights.final_norm, self.config.norm_eps, self.config.norm_offset)
        return linear_cross_entropy_forward(normed, self.weights.head, batch.labels[supervised], self.head_factors())

    def loss(self, batch: PackedBatch) -> Tensor:
        """Σ nats over supervised positions, 0-d float64, without gradients and without dropout."""
        return self.token_losses(batch).sum(dtype=torch.float64)

    @torch.no_grad()
    def loss_and_gradients(self, batch: PackedBatch, loss_scaling: float, dropout_seed: int | None = None) -> Tensor:
        """One forward and backward pass: adds ∂(loss_scaling · Σ nats)/∂(lora_A, lora_B) to `lora.gradients`.

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
        contexts = self.contexts(batch)
        lowest_layer, lowest_group = lowest_adapted_group(lora, len(contexts))

        adapters = [block_adapter(lora, layer, dropout_seed) for layer in range(len(contexts))]
        kept: list[BlockSaved | None] = []
        x = self.embed(batch.input_ids)
        for layer, context in enumerate(contexts):
            below = layer < lowest_layer
            x, saved = block_forward(
                x, self.weights.blocks[layer], adapters[layer], context, "block" if below else self.recompute
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
                self.weights.blocks[layer],
                adapters[layer],
                contexts[layer],
                lora,
                lowest_group if layer == lowest_layer else -1,
            )
        return loss

    def _head_loss_and_gradient(
        self, x: Tensor, batch: PackedBatch, loss_scaling: float, dropout_seed: int | None
    ) -> tuple[Tensor | None, Tensor]:
        """∂L/∂x of the last block's output, (tokens, hidden), zero off the supervised rows, and Σ nats."""
        lora = self.lora
        supervised = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        normed, norm = rms_norm_forward(
            x[supervised], self.weights.final_norm, self.config.norm_eps, self.config.norm_offset
        )
        losses, grads = linear_cross_entropy_backward(
            normed, self.weights.head, batch.labels[supervised], self.head_factors(dropout_seed), loss_scaling
        )
        if lora is not None and grads.d_lora_A is not None and grads.d_lora_B is not None:
            lora.d_lora_A(HEAD).add_(grads.d_lora_A)
            lora.d_lora_B(HEAD).add_(grads.d_lora_B)
        d_rows = rms_norm_backward(grads.d_x, norm, weight_gradient=False).d_x
        d_x = torch.zeros_like(x).index_copy_(0, supervised, d_rows)
        return d_x, losses.sum(dtype=torch.float64)
