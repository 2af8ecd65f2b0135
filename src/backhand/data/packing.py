"""Examples packed into one batch without padding, and rows divided into micro-batches that fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from backhand.data.examples import Example
from backhand.nn.batch import IGNORE_INDEX, PackedBatch


def pack(examples: Iterable[Example], *, shared: int = 0, device: torch.device | str = "cpu") -> PackedBatch:
    """Documents behind one another, shortest first, so that equal lengths are neighbours.

    labels[i] is token i + 1 of the same document where that token is supervised. Nothing behind the last such i can
    change the loss, since attention is causal, so a document enters only up to there: its last token, and whatever the
    template puts behind the last reply, are labels at most and never inputs. A document without a supervised token has
    no positions at all.

    Args:
        examples: any number, in any order; documents of equal length keep theirs.
        shared: tokens, none of which predicts a supervised one, with which all of them begin: they stand in the batch
            once.
        device: where the tensors go.

    Returns:
        input_ids and labels (tokens,) int64, and the length of each document behind what is shared.

    Raises:
        ValueError: not all documents begin with the same `shared` tokens, or one of these predicts a supervised token.
    """
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    prefix = np.zeros(0, dtype=np.int64)
    for example in sorted(examples, key=trained_length):
        length = trained_length(example)
        if length:
            targets = example.input_ids[1 : length + 1].astype(np.int64)
            beginning = example.input_ids[:shared].astype(np.int64)
            if example.supervised[: shared + 1].any() or (ids and not np.array_equal(beginning, prefix)):
                raise ValueError(f"{example.source}: the first {shared} tokens are not shared, or carry loss")
            prefix = beginning
            ids.append(example.input_ids[shared:length].astype(np.int64))
            labels.append(np.where(example.supervised[1 : length + 1], targets, IGNORE_INDEX)[shared:])
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate([prefix, *ids])).to(device),
        labels=torch.from_numpy(np.concatenate([np.full_like(prefix, IGNORE_INDEX), *labels])).to(device),
        document_lengths=tuple(len(document) for document in ids),
        shared_prefix=len(prefix),
    )


def trained_length(example: Example) -> int:
    """Tokens of the example that enter the model: those before its last supervised token."""
    places = np.flatnonzero(example.supervised)
    return int(places[-1]) if len(places) else 0


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], *, max_rows: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Divide the rows of one optimizer step, longest first.

    So the largest micro-batch, the one that may not fit in memory, comes at once, and the lengths in each are alike.

    Args:
        rows: indices into `lengths`.
        lengths: tokens of every example.
        max_rows: no more rows in one micro-batch than this.
        max_tokens: no more tokens in one than this, unless a single row has more.

    Returns:
        Indices, each of `rows` once, in groups.
    """
    groups: list[list[int]] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        full = (
            not groups or len(groups[-1]) == max_rows or (max_tokens is not None and tokens + lengths[row] > max_tokens)
        )
        if full:
            groups.append([])
            tokens = 0
        groups[-1].append(row)
        tokens += lengths[row]
    return groups
