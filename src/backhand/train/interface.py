"""What the training loop sees of a model: a batch in, the loss and the adapter's gradients out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from backhand.nn.batch import PackedBatch
from backhand.nn.lora_parameters import LoRAParameters


class Trainable(Protocol):
    """A frozen base model with at most one adapter. The decoder engine and the transformers fallback both are one."""

    @property
    def lora(self) -> LoRAParameters | None:
        """The attached adapter, or None."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model lives and where batches must be."""
        ...

    @property
    def shares_prefixes(self) -> bool:
        """Whether batches may have a shared prefix."""
        ...

    def attach(self, lora: LoRAParameters) -> None:
        """Use and train this adapter. Raises ValueError for a slot that does not fit the model."""
        ...

    def detach(self) -> None:
        """Back to the base model."""
        ...

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every module an adapter can target, by dotted path."""
        ...

    def frozen_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything that must not move."""
        ...

    def loss_and_gradients(self, batch: PackedBatch, loss_scaling: float, dropout_seed: int | None = None) -> Tensor:
        """Add ∂(loss_scaling · Σ nats)/∂(lora_A, lora_B) to `lora.gradients`; return Σ nats, 0-d float64."""
        ...

    def loss(self, batch: PackedBatch) -> Tensor:
        """Σ nats over the supervised positions, 0-d float64, without gradients and without dropout."""
        ...

    def logits(self, input_ids: Tensor, document_lengths: Sequence[int] | None = None) -> Tensor:
        """(tokens, vocab) logits of every position, documents kept apart, without dropout."""
        ...
