"""Figures of held-out vectors before and after training: nearest texts, cosines, and the drift of neutral texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backhand.data.data_report import TruncationStats
from backhand.data.embedding_examples import EmbeddingEncoder, EmbeddingFormat
from backhand.data.examples import Example
from backhand.data.held_out import neutral_texts
from backhand.data.packing import RowPacker
from backhand.data.rows import EmbeddingRow, TextIdentities
from backhand.data.text_encoder import TextEncoder
from backhand.ops.info_nce import BLOCK_SCORES
from backhand.ops.normalize import normalize_forward

BINS = 40
"""Number of bins of a histogram of cosines, from -1 to 1."""
NEAREST = 3
SHOWN_LETTERS = 300


def neutral_packer(encoder: TextEncoder, text_format: EmbeddingFormat, max_length: int) -> RowPacker:
    """Return the rows of the package's neutral texts, one text each."""
    rows = [EmbeddingRow((text,), None, f"neutral text {number}") for number, text in enumerate(neutral_texts())]
    encoded = EmbeddingEncoder(encoder, text_format, max_length).encode(rows, TruncationStats())
    return RowPacker([one for one in encoded if isinstance(one, Example)], share_prefixes=False)


def drift(base: Tensor, adapted: Tensor) -> float:
    """Return the mean absolute change of the cosines of different texts.

    Args:
        base, adapted: vectors of the same texts, (texts, hidden).
    """
    first, second = (units @ units.T for units in (normalize_forward(one)[0] for one in (base, adapted)))
    count = len(first)
    return float((first - second).abs().fill_diagonal_(0).sum() / max(1, count * (count - 1)))


def first_documents(counts: Sequence[int]) -> Tensor:
    """Return the index of each row's first document, (rows,) int64, for the number of documents per row."""
    each = torch.tensor(counts, dtype=torch.int64)
    return each.cumsum(0) - each


def cosine_histogram(embeddings: Tensor, counts: Sequence[int]) -> dict[str, list[float]]:
    """Return the distribution of cosines over `BINS` bins, as shares.

    Args:
        embeddings: (documents, hidden), the vectors of all texts of the rows.
        counts: number of texts of each row.

    Returns:
        `pairs`: of anchors with the positive of their row; `others`: with the positives of other rows.
    """
    units, first = normalize_forward(embeddings)[0].float(), first_documents(counts)
    anchors, positives = units[first], units[first + 1]
    pairs = torch.histc((anchors * positives).sum(1).clamp(-1, 1), BINS, -1, 1)
    every, size = torch.zeros(BINS), max(1, BLOCK_SCORES // len(anchors))
    for start in range(0, len(anchors), size):
        every += torch.histc((anchors[start : start + size] @ positives.T).clamp(-1, 1), BINS, -1, 1)
    others = (every - pairs).clamp(min=0)
    return {name: (found / found.sum().clamp(min=1)).tolist() for name, found in (("pairs", pairs), ("others", others))}


def nearest_texts(
    rows: Sequence[TextIdentities], embeddings: Tensor, texts: Sequence[str], shown: Sequence[int]
) -> list[list[dict[str, Any]]]:
    """Return, for the anchor of each shown row, the nearest candidates with their cosines.

    The text of the anchor itself is no candidate, unless it is its own positive.

    Args:
        rows: digests of the rows' texts.
        embeddings: (documents, hidden), the vectors of all texts of the rows.
        texts: the texts, in the same order.
        shown: numbers of the rows.
    """
    units, anchors = normalize_forward(embeddings)[0], first_documents([len(row.texts) for row in rows]).tolist()
    candidates: dict[int, int] = {}
    relevant: dict[int, set[int]] = {}  # by the label or by the text of the anchor
    for row, place in zip(rows, anchors, strict=True):
        if row.score is None:  # the second text of a scored pair may be dissimilar
            relevant.setdefault(row.label or row.texts[0], set()).add(row.texts[1])
        for number, text in enumerate(row.texts[1:], place + 1):
            candidates.setdefault(text, number)
    digests, places = [*candidates], [*candidates.values()]
    found = []
    for number in shown:
        row, scores = rows[number], units[places] @ units[anchors[number]]
        right = relevant.get(row.label or row.texts[0], set())
        itself = row.texts[0] in candidates and (row.label is not None or row.texts[0] not in right)
        if itself:
            scores[digests.index(row.texts[0])] = -torch.inf
        cosines, best = scores.topk(min(NEAREST, len(places) - itself))
        found.append(
            [
                {"text": texts[places[one]][:SHOWN_LETTERS], "cosine": cosine, "right": digests[one] in right}
                for cosine, one in zip(cosines.tolist(), best.tolist(), strict=True)
            ]
        )
    return found
