"""The classification head of a decoder or an encoder: logits of labels from one vector per document.

    v = pooled final states,   logits = class_head(v)      (documents, labels)

The head is trained in full together with the adapter, under the names of transformers' class for sequence
classification (`nn.families.class_heads`). Parameters that the adapter does not have are those of the model's files,
such as BERT's pooler in an adapter that PEFT has trained. The head computes in the dtype of the adapter's buffer,
float32 in training, whatever the compute dtype of the blocks is. A loss of the logits gives every gradient:

    (loss, ∂L/∂logits) → gradients of the head, ∂L/∂v → final states → blocks
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backhand.errors import ArtifactError, not_none
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.pooled_states import pooled_gradients, pooled_states
from backhand.ops.class_head import ClassHeadSaved, class_head_backward, class_head_forward

LogitsLoss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function from logits, (documents, labels) in float32 or wider, to the loss, 0-d, and its gradient of the logits."""


def class_logits(decoder: Decoder, batch: PackedBatch) -> Tensor:
    """Return the logits of a batch, (documents, labels) in float32 or wider, without gradients.

    Raises:
        ArtifactError: neither the adapter nor the model has all parameters of the head.
    """
    return _forward(decoder, pooled_states(decoder, batch, decoder.config.class_head.pooling))[0]


def class_gradients(decoder: Decoder, batch: PackedBatch, loss: LogitsLoss, dropout_seed: int | None = None) -> Tensor:
    """Run one forward and backward pass for a loss of the logits, and add all gradients to those of the adapter.

    Args:
        loss: maps the logits of the batch's documents to the loss and its gradient.
        dropout_seed: as in `ForwardBackward.loss_and_gradients`.

    Returns:
        The loss as `loss` returned it.

    Raises:
        ArtifactError: as `class_logits`.
    """

    def of_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
        logits, saved = _forward(decoder, vectors)
        value, d_logits = loss(logits)
        grads = class_head_backward(d_logits.to(logits), saved)
        lora = not_none(decoder.lora)
        for argument, name in decoder.config.class_head.parameters.items():
            if name in lora.full_tensors:
                lora.gradient(name).add_(getattr(grads, f"d_{argument}"))
        return value, grads.d_x

    return pooled_gradients(decoder, batch, decoder.config.class_head.pooling, of_vectors, dropout_seed)


def has_score_head(decoder: Decoder) -> bool:
    """Return True if the model's own files have a whole head with one output, as those of a cross-encoder."""
    head, parameters = decoder.config.class_head, decoder.weights.class_head
    whole = all(name in parameters for name in head.parameters.values())
    return whole and head.labels_of({name: tensor.shape for name, tensor in parameters.items()}) == 1


def _forward(decoder: Decoder, vectors: Tensor) -> tuple[Tensor, ClassHeadSaved]:
    head, lora = decoder.config.class_head, decoder.lora
    parameters = dict(decoder.weights.class_head)
    if lora is not None:
        parameters |= {name: lora.tensor(name) for name in head.parameters.values() if name in lora.full_tensors}
    if missing := [name for name in head.parameters.values() if name not in parameters]:
        raise ArtifactError(
            f"neither the adapter nor the model has {missing[0]}, a part of the head for classification",
            next_step="give an adapter with a head, of --objective classify, or of rank on an encoder",
        )
    dtype = torch.promote_types(vectors.dtype, parameters[f"{head.output}.weight"].dtype)
    weights = {argument: parameters[name].to(dtype) for argument, name in head.parameters.items()}
    eps = decoder.config.norm_eps
    return class_head_forward(vectors.to(dtype), **weights, activation=head.activation, eps=eps)
