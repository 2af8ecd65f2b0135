"""Forward passes over rows, divided among the processes: log-probabilities of documents, their vectors, and logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from backhand.data.packing import RowPacker
from backhand.distributed.communicator import Communicator
from backhand.errors import UsageError
from backhand.generation.completer import LanguageModel
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.class_head import class_logits
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.pooled_states import pooled_states
from backhand.ops.pooling import Pooling


def token_owners(packer: RowPacker, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the document of each supervised token of the rows' batch, (supervised,), and the tokens per document."""
    examples = packer.by_document.examples
    counts = torch.tensor([examples[place].supervised_tokens for place in packer.documents(rows)], dtype=torch.int64)
    return torch.arange(len(counts)).repeat_interleave(counts), counts.double()


class RowPasses(NamedTuple):
    """Forward passes over rows, which are divided among the processes."""

    groups: list[list[int]]  # the rows of each pass
    tokens: list[int]  # number of tokens of each pass, in descending order
    batch: Callable[[int], PackedBatch]  # returns the batch of a pass of this process

    @classmethod
    def of(
        cls,
        packer: RowPacker,
        rows: Sequence[int],
        micro_batch_rows: int,
        processes: Communicator,
        hidden_states: HiddenStateCache | None,
    ) -> RowPasses:
        """Divide rows.

        Args:
            hidden_states: cache of the rows' hidden states, which may compute later passes of this process ahead.
        """
        groups = packer.micro_batches(rows, micro_batch_rows)
        tokens = [packer.packed_tokens(group) for group in groups]
        mine = processes.assign(tokens)[processes.rank]

        def batch(number: int) -> PackedBatch:
            if hidden_states is None:
                return packer.packed(groups[number], "cpu")
            return hidden_states.packed(groups[number], (groups[own] for own in mine if own > number))

        return cls(groups, tokens, batch)


def document_sums(
    model: LanguageModel,
    packer: RowPacker,
    rows: Sequence[int],
    micro_batch_rows: int,
    processes: Communicator,
    *,
    hidden_states: HiddenStateCache | None = None,
    exact: bool = False,
    interruptible: bool = False,
    on_row: Callable[[], None] = lambda: None,
) -> Tensor | None:
    """Compute s of every document of these rows, (documents,) float64, equal for any number of processes.

    Args:
        model: the model; it computes without gradients and without dropout.
        hidden_states: cache of the rows' hidden states.
        exact: as in `Decoder.token_losses`, for documents that are compared with each other.
        interruptible: return None if a process has been asked to stop.
        on_row: called once per row of this process as soon as its micro-batch is computed.
    """
    groups, tokens, batch = RowPasses.of(packer, rows, micro_batch_rows, processes, hidden_states)

    def sums(number: int) -> list[float]:
        group = groups[number]
        losses = model.token_losses(batch(number).to(model.device), exact=exact).double().cpu()
        owner, counts = token_owners(packer, group)
        result: list[float] = (-torch.zeros(len(counts), dtype=torch.float64).index_add_(0, owner, losses)).tolist()
        for _ in group:
            on_row()
        return result

    by_group = processes.parallel_map(tokens, sums, interruptible=interruptible)
    if by_group is None:
        return None
    place_of = {
        place: value
        for group, values in zip(groups, by_group, strict=True)
        for place, value in zip(packer.documents(group), values, strict=True)
    }
    return torch.tensor([place_of[place] for place in packer.documents(rows)], dtype=torch.float64)


def head_logits(
    model: LanguageModel,
    packer: RowPacker,
    micro_batch_rows: int,
    processes: Communicator,
    *,
    hidden_states: HiddenStateCache | None = None,
    interruptible: bool = False,
    done: Callable[[], object] = lambda: None,
) -> Tensor | None:
    """Return the logits of all documents, (documents, outputs) float64, equal for any number of processes.

    Args:
        packer: of the rows.
        micro_batch_rows: largest number of rows per forward pass.
        hidden_states: cache of the rows' hidden states.
        interruptible: return None if a process has been asked to stop.
        done: called once per row.
    """
    every = range(len(packer.lengths))
    groups, tokens, batch = RowPasses.of(packer, every, micro_batch_rows, processes, hidden_states)

    def logits(number: int) -> list[list[float]]:
        assert isinstance(model, Decoder), "other engines are refused before"
        found = class_logits(model, batch(number).to(model.device)).double().tolist()
        for _ in groups[number]:
            done()
        return cast("list[list[float]]", found)

    parts = processes.parallel_map(tokens, logits, interruptible=interruptible)
    if parts is None:
        return None
    places = [document for group in groups for document in packer.documents(group)]
    by_document = dict(zip(places, (values for part in parts for values in part), strict=True))
    return torch.tensor([by_document[place] for place in range(len(places))], dtype=torch.float64)


def check_pooling(pooling: Pooling, *, causal: bool) -> None:
    """Raise UsageError if the vectors of all texts would be equal.

    Args:
        causal: the attention of the model is causal.
    """
    if pooling == "cls" and causal:
        raise UsageError(
            "the first token of a text does not see the others in this model",
            where="pooling",
            why="its attention is causal, so that all texts would have the same vector",
            next_step="give --pooling last or --pooling mean",
        )


def embed_batch(model: object, batch: PackedBatch, pooling: Pooling, dropout_seed: int | None = None) -> Tensor:
    """Return the vectors of a batch, (documents, hidden) float32 or wider on the CPU, without gradients."""
    assert isinstance(model, Decoder), "other engines are refused before"
    return pooled_states(model, batch, pooling, dropout_seed).cpu()


def embed_rows(
    model: LanguageModel | Decoder,
    packer: RowPacker,
    pooling: Pooling,
    micro_batch_rows: int,
    processes: Communicator,
    *,
    hidden_states: HiddenStateCache | None = None,
    interruptible: bool = False,
    done: Callable[[], object] = lambda: None,
) -> Tensor | None:
    """Return the vectors of all documents of the packer, (documents, hidden), in the order of its rows.

    Args:
        micro_batch_rows: largest number of rows per forward pass.
        hidden_states: cache of the rows' hidden states.
        interruptible: return None if a process has been asked to stop.
        done: called once per row.
    """
    every = range(len(packer.lengths))
    groups, tokens, batch = RowPasses.of(packer, every, micro_batch_rows, processes, hidden_states)

    def embed(number: int) -> Tensor:
        vectors = embed_batch(model, batch(number).to(model.device), pooling)
        for _ in groups[number]:
            done()
        return vectors

    return gathered(model, processes, tokens, list(map(packer.documents, groups)), embed, interruptible=interruptible)


def gathered(
    model: object,
    processes: Communicator,
    tokens: Sequence[int],
    places: Sequence[list[int]],
    embed: Callable[[int], Tensor],
    *,
    interruptible: bool = False,
) -> Tensor | None:
    """Return the vectors of all micro-batches, (documents, hidden), from all processes.

    Args:
        tokens: number of tokens of each micro-batch, in descending order.
        places: rows of the result that each micro-batch computes.
        embed: returns the vectors of a micro-batch.
        interruptible: return None if a process has been asked to stop.
    """
    assert isinstance(model, Decoder), "other engines are refused before"
    shares, complete = processes.assign(tokens), True
    wide = torch.promote_types(model.dtype, torch.float32)
    vectors = torch.empty(sum(map(len, places)), model.config.hidden_size, dtype=wide)
    for number in shares[processes.rank]:
        if interruptible and processes.stop_requested:
            complete = False
            break
        vectors[places[number]] = embed(number)
    if not all(processes.all_gather_object(complete)):
        return None
    processes.share_rows(vectors, [[place for number in share for place in places[number]] for share in shares])
    return vectors
