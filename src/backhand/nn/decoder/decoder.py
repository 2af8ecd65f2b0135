"""The decoder engine: a frozen decoder that is loaded, takes an adapter, and computes with and without gradients.

Its training step, forward and backward by hand, is `nn.decoder.forward_backward`. This file has loading, attaching, and
the passes that save nothing: hidden states, logits, losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.adapted_group import HEAD, GroupAdapter
from backhand.nn.decoder.adapted_head import distillation_losses, head_adapter, head_factors, head_losses
from backhand.nn.decoder.class_head_weights import start_class_head
from backhand.nn.decoder.forward_backward import ForwardBackward, require_head
from backhand.nn.decoder.projections import group_forward
from backhand.nn.decoder.weights import load_weights, module_shapes, named_views
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.module_shapes import ModuleShapes, check_fits
from backhand.ops.head_factors import HeadFactors
from backhand.ops.linear_cross_entropy import CHUNK_ROWS
from backhand.ops.logits_rule import ruled
from backhand.ops.weight_tiles import FrozenMatrix, frozen_dense


class Decoder(ForwardBackward):
    """A frozen decoder and at most one adapter that it trains. `ForwardBackward` documents the attributes."""

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
            recompute: as in `ForwardBackward`.
            quantized: keep the matrices in the blocks of the source.

        Raises:
            UnsupportedModel: the engine does not compute this configuration exactly.
            ArtifactError: tensors are missing or have another shape.
        """
        config = decoder_config(source.config)
        return cls(config, load_weights(source, config, dtype, device, quantized=quantized), recompute=recompute)

    def module_shapes(self) -> ModuleShapes:
        """Return (out, in) of every linear module that an adapter can target, and the other trainable tensors."""
        return module_shapes(self.config)

    def frozen_tensors(self) -> Iterator[tuple[str, FrozenMatrix]]:
        """Yield (Hugging Face name, view or quantized matrix) of every base tensor. Training must not change them."""
        return named_views(self.weights, self.config)

    def attach(self, lora: LoRAParameters) -> None:
        """Attach an adapter, to be used and trained. Its names must be modules of this decoder.

        Raises:
            ValueError: a slot or a trained tensor does not exist here or has another shape.
        """
        labels = self.config.class_head.labels_of({one.name: one.shape for one in lora.full_tensors.values()})
        check_fits(lora, module_shapes(self.config, labels))
        lora.refresh_compute(self.dtype)
        self._attach(lora)
        self.refresh()

    def detach(self) -> None:
        """Return to the base model."""
        self._attach(None)

    def start_values(self, lora: LoRAParameters, generator: torch.Generator | None = None) -> None:
        """Set the tensors of a fresh adapter that start from the base. See `LoRAParameters.initialise_from_base`.

        Args:
            generator: draws the weights of a new classification head; None for zeros.
        """
        if not lora.plain:
            base = dict(named_views(self.weights, self.config)) | {f"{HEAD}.weight": self.weights.head}
            base |= start_class_head(lora, self.config, self.weights.class_head, generator)
            lora.initialise_from_base(lambda name: frozen_dense(base[name]))

    def head_adapter(self) -> GroupAdapter:
        """Return the head's adapter in the compute dtype, without dropout."""
        if self._head is not None:
            return self._head
        adapter = head_adapter(self.active.head, self.config, self.lora)
        if adapter.extras is not None:
            self._head = adapter  # DoRA's norm reads the whole table, too slow for every generated token
        return adapter

    def head_factors(self, dropout_seed: int | None = None) -> HeadFactors | None:
        """Return the factors of a plain head, or None if it has none; `dropout_seed` is None for no dropout."""
        return head_factors(head_adapter(self.active.head, self.config, self.lora, dropout_seed))

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Return the last block's output before the final norm, (tokens, hidden), without saving anything."""
        return self._states_at(batch, len(self.config.layers))

    @torch.no_grad()
    def layer_input(self, batch: PackedBatch, layer: int) -> Tensor:
        """Return x₀ of block `layer`, (tokens, hidden): the output of the embedding and the blocks below."""
        return self._states_at(batch, layer)

    def _states_at(
        self, batch: PackedBatch, until: int, rows: Tensor | None = None, dropout_seed: int | None = None
    ) -> Tensor:
        """Return x₀ of block `until`, or the last block's output at `rows`; `dropout_seed` is None for no dropout."""
        self.refresh()
        contexts = self.contexts(batch, rows, self.cross_layer(batch.input_ids, dropout_seed)[0])
        return self._forward(batch, self.block_adapters(dropout_seed), contexts[:until], until)[0]

    @torch.no_grad()
    def logits(self, input_ids: Tensor, document_lengths: Sequence[int] | None = None) -> Tensor:
        """Return logits of every position, (tokens, vocab), in the compute dtype.

        Args:
            input_ids: (tokens,) int64.
            document_lengths: lengths that sum to the number of tokens; None for one document.
        """
        require_head(self.config)
        lengths = (input_ids.shape[0],) if document_lengths is None else tuple(document_lengths)
        batch = PackedBatch(input_ids, torch.full_like(input_ids, IGNORE_INDEX), lengths)
        return self.head(self.hidden_states(batch))

    def head(self, x: Tensor) -> Tensor:
        """Return logits of shape (rows, vocab) for the last block's output, (rows, hidden)."""
        projected = self.projected(x)
        return ruled(projected, self.config.logits)[0].to(projected.dtype)

    def output(self, x: Tensor) -> Tensor:
        """Return `head` of the last block's output or, for a model without a head, the final states."""
        return self.head(x) if self.config.has_head else self.final_norm(x)

    def final_norm(self, x: Tensor) -> Tensor:
        """Return the final states of the last block's output, both (rows, hidden)."""
        return self._final_norm(x)[0]

    def projected(self, x: Tensor) -> Tensor:
        """Return final norm and output projection, (rows, hidden) to (rows, vocab), before the rule for logits."""
        normed, _ = self._final_norm(x)
        return group_forward(normed, self.active.head, None, self.head_adapter())[0]

    def most_probable_tokens(self, states: Tensor) -> Tensor:
        """Return the most probable next token, (rows,), for hidden states after the final norm, (rows, hidden).

        The rule for logits increases with its argument, so it is left out. Logits exist for one chunk of rows.
        """
        head, adapter = self.active.head, self.head_adapter()
        tokens = [group_forward(part, head, None, adapter)[0].argmax(-1) for part in states.split(CHUNK_ROWS)]
        return torch.cat(tokens)

    @torch.no_grad()
    def token_losses(self, batch: PackedBatch, dropout_seed: int | None = None, *, exact: bool = False) -> Tensor:
        """Return losses in nats, (supervised tokens,), document by document, without gradients.

        Args:
            dropout_seed: as in `loss_and_gradients`; None for no dropout.
            exact: compute the logit of each target in float32, to compare targets with each other.
        """
        head = self._head_of(dropout_seed)
        normed = self.final_states(batch, batch.supervised_positions, dropout_seed)
        if batch.teacher is not None:
            return batch.per_document(distillation_losses(normed, head, batch.teacher))
        return batch.per_document(head_losses(normed, batch.labels[batch.supervised_positions], head, exact=exact))

    @torch.no_grad()
    def supervised_states(self, batch: PackedBatch) -> Tensor:
        """Return the hidden states after the final norm, (supervised tokens, hidden), document by document."""
        return batch.per_document(self.final_states(batch, batch.supervised_positions))

    @torch.no_grad()
    def final_states(
        self, batch: PackedBatch, positions: Tensor | None = None, dropout_seed: int | None = None
    ) -> Tensor:
        """Return the hidden states after the final norm, without saving anything.

        `state_loss_and_gradients` is the backward pass for a loss of these states.

        Args:
            positions: (positions,) int64 in ascending order; None for all.
            dropout_seed: as in `loss_and_gradients`.

        Returns:
            (positions, hidden), in the compute dtype.
        """
        x = self._states_at(batch, len(self.config.layers), positions, dropout_seed)
        return self._final_norm(x)[0]

    def loss(self, batch: PackedBatch) -> Tensor:
        """Return Σ nats over supervised tokens, 0-d float64, without gradients and dropout."""
        return self.token_losses(batch).sum(dtype=torch.float64)
