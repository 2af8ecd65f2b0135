"""The loss with which a classification head, a score head or vectors are proved: a weighted sum of the outputs.

    v = pooling of the final states,   y = head(v), or v without a head,   L = Σ_documents Σ_k w_k y_k

The losses of labels, rankings and vectors are ops with proofs of their own. Their gradients take the place of w. The
sum does not depend on how documents are packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.class_head import class_gradients
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.pooled_states import pooled_gradients
from backhand.nn.families.family import DecoderConfig
from backhand.ops.class_head import class_head_backward, class_head_forward, class_head_reference
from backhand.ops.pooling import Pooling, pooling_backward, pooling_forward, pooling_reference

_PARTS = ("output_bias", "dense", "dense_bias", "norm", "norm_bias")
"""Arguments of `class_head_reference` for parts that not all heads have."""


class HeadGradients(NamedTuple):
    """The loss of a batch with its gradients."""

    loss: Tensor  # 0-d
    d_states: Tensor  # ∂L/∂ of the supervised states, (supervised positions, hidden)
    d_parameters: Mapping[str, Tensor]  # by name


@dataclass(frozen=True)
class HeadLoss:
    """The weighted sum of the logits of a head, or of the vectors of texts."""

    config: DecoderConfig
    vectors: Pooling | None = None  # the pooling of vectors, if these are proved without a head

    @property
    def pooling(self) -> Pooling:
        """The vector of a text that the loss or the head reads."""
        return self.vectors or self.config.class_head.pooling

    def of_logits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, 0-d, and its gradient of the logits or vectors, (documents, outputs)."""
        weights = torch.sin(torch.arange(1, logits.shape[1] + 1, dtype=torch.float64, device=logits.device)).to(logits)
        return (logits * weights).sum(), weights.expand_as(logits)

    def engine_gradients(
        self, decoder: Decoder, batch: PackedBatch, loss_scaling: float, dropout_seed: int | None = None
    ) -> None:
        """Add the gradients of the engine's own step to those of the adapter."""

        def loss(logits: Tensor) -> tuple[Tensor, Tensor]:
            value, d_logits = self.of_logits(logits)
            return value, loss_scaling * d_logits

        if self.vectors is None:
            class_gradients(decoder, batch, loss, dropout_seed)
        else:
            pooled_gradients(decoder, batch, self.vectors, loss, dropout_seed)

    def by_hand(self, states: Tensor, batch: PackedBatch, parameters: Mapping[str, Tensor]) -> HeadGradients:
        """Compute loss and gradients by the ops.

        Args:
            states: after the final norm, (supervised positions, hidden).
            parameters: of the head, by name.
        """
        head = self.config.class_head
        vectors, pooled = pooling_forward(batch.per_document(states), batch.document_tokens, self.pooling)
        if self.vectors is not None:
            loss, d_vectors = self.of_logits(vectors)
            return HeadGradients(loss, batch.sum_at_positions(pooling_backward(d_vectors, pooled).d_x), {})
        named = {argument: parameters[name] for argument, name in head.parameters.items()}
        logits, saved = class_head_forward(vectors, **named, activation=head.activation, eps=self.config.norm_eps)
        loss, d_logits = self.of_logits(logits)
        grads = class_head_backward(d_logits, saved)
        d_states = batch.sum_at_positions(pooling_backward(grads.d_x, pooled).d_x)
        d_parameters = {name: getattr(grads, f"d_{argument}") for argument, name in head.parameters.items()}
        return HeadGradients(loss, d_states, d_parameters)

    def reference(self, states: Tensor, batch: PackedBatch, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute the same loss by torch, for autograd to differentiate. The arguments are those of `by_hand`."""
        head = self.config.class_head
        vectors = pooling_reference(batch.per_document(states), batch.document_tokens, self.pooling)
        if self.vectors is not None:
            return self.of_logits(vectors)[0]
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        names = head.parameters
        given = {argument: parameters[names[argument]].to(dtype) if argument in names else None for argument in _PARTS}
        output = parameters[names["output"]].to(dtype)
        logits = class_head_reference(
            vectors.to(dtype), output, **given, activation=head.activation, eps=self.config.norm_eps
        )
        return self.of_logits(logits)[0]
