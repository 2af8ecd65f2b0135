"""One vector per document from the final hidden states, and the gradients of a loss of these vectors.

    H = final states,   v_d = pooling of the supervised states of document d,   L = loss(v)

The supervised positions of a batch say which states belong to the vector of a document (`data.embedding_examples`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from backhand.nn.batch import PackedBatch, StateLoss
from backhand.nn.decoder.decoder import Decoder
from backhand.ops.pooling import Pooling, pooling_backward, pooling_forward

VectorLoss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function from vectors, (documents, hidden) in float32 or wider, to the loss, 0-d, and its gradient of the vectors.

The documents are those of the batch, in its order.
"""


def read_positions(batch: PackedBatch) -> Tensor | None:
    """Return the positions to compute in the last block: those that the pooling reads, or None for all.

    The number of tokens of a batch is one of few sizes, for which the matrix library compiles its kernels once. The
    number of read positions is any. If most positions are read, computing all of them is faster.
    """
    supervised = batch.supervised_positions
    return None if 2 * len(supervised) > len(batch.input_ids) else supervised


def pooled_states(decoder: Decoder, batch: PackedBatch, pooling: Pooling, dropout_seed: int | None = None) -> Tensor:
    """Return the vectors of a batch, (documents, hidden) in float32 or wider, without gradients."""
    positions = read_positions(batch)
    states = decoder.final_states(batch, positions, dropout_seed)
    if positions is None:
        states = states[batch.supervised_positions]
    return pooling_forward(batch.per_document(states), batch.document_tokens, pooling)[0]


def loss_of_states(batch: PackedBatch, pooling: Pooling, loss: VectorLoss) -> tuple[StateLoss, Tensor | None]:
    """Return a loss of vectors as a loss of states (`Decoder.state_loss_and_gradients`), and the states' positions."""
    lengths, supervised, positions = batch.document_tokens, batch.supervised_positions, read_positions(batch)

    def of_states(all_states: Tensor) -> tuple[Tensor, Tensor]:
        states = all_states if positions is not None else all_states[supervised]
        vectors, saved = pooling_forward(batch.per_document(states), lengths, pooling)
        value, d_vectors = loss(vectors)
        d_read = batch.sum_at_positions(pooling_backward(d_vectors.to(states.device), saved).d_x)
        return value, d_read if positions is not None else all_states.zero_().index_copy_(0, supervised, d_read)

    return of_states, positions


def pooled_gradients(
    decoder: Decoder, batch: PackedBatch, pooling: Pooling, loss: VectorLoss, dropout_seed: int | None = None
) -> Tensor:
    """Add the gradients of a loss of the vectors to those of the adapter, and return the loss."""
    of_states, positions = loss_of_states(batch, pooling, loss)
    return decoder.state_loss_and_gradients(batch, of_states, positions, dropout_seed)
