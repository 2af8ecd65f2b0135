"""Pairs of texts with the same label, from rows of one text with its label.

    text, label   →   the text as the anchor, another text with its label as the positive

There is one pair per row, not one per pair of rows with a label: 100,000 rows give 100,000 pairs. A pair refers to the
tokens of both texts, which are stored once. The different texts of a label form a ring, ordered by their digests, and
the positive of a text is the next one on the ring. So every text is an anchor once and a positive once, whatever the
order of the rows is. The other texts of the label in a step are no negatives (`ops.info_nce`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from backhand.data.embedding_examples import identity
from backhand.data.rows import EmbeddingRow, RowFacts, TextIdentities
from backhand.data.stored_examples import FIRST, NEXT, PreparedData, StoredExamples, with_totals
from backhand.errors import DataError
from backhand.words import count_of


def partners(labels: Sequence[int], texts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the row of the positive of each row, (rows,) int64; -1 if its label has no other text.

    Args:
        labels, texts: digests of the label and of the text of each row.
    """
    keys = np.array([labels, texts], dtype=np.uint64)
    different, first, number = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    count = different.shape[1]
    starts = np.flatnonzero(np.append(True, different[0, 1:] != different[0, :-1]))  # of each label, in order
    sizes = np.diff(np.append(starts, count))
    following = np.arange(1, count + 1)
    following[starts + sizes - 1] = starts
    positives = np.where(np.repeat(sizes, sizes) > 1, first[following], -1)
    return np.asarray(positives[number.reshape(-1)], dtype=np.int64)


def paired_rows(rows: Sequence[EmbeddingRow]) -> list[EmbeddingRow]:
    """Return rows of one text with its label as rows of pairs, without the rows that have no partner.

    Other rows are returned unchanged. Raises DataError as `with_pairs`.
    """
    labelled = [row for row in rows if row.label is not None]
    if not labelled:
        return list(rows)
    _check_forms(len(labelled), len(rows), labelled[0].source)
    others = partners([identity(row.label or "") for row in rows], [identity(row.texts[0]) for row in rows])
    if not (others >= 0).any():
        raise _without_pairs(rows[0].source)
    return [
        replace(row, texts=(row.texts[0], rows[other].texts[0]))
        for row, other in zip(rows, others.tolist(), strict=True)
        if other >= 0
    ]


def _check_forms(labelled: int, rows: int, where: str | None) -> None:
    if labelled < rows:
        raise DataError(
            f"{labelled:,} of {rows:,} rows have a label, and the others are pairs",
            where=where,
            next_step="give rows of one form",
        )


def _without_pairs(where: str, *, held_out: bool = False) -> DataError:
    more = "give several texts per label, or rows with anchor and positive"
    return DataError(
        f"no two {'held-out ' if held_out else ''}texts have the same label, so that there are no pairs",
        where=where,
        next_step="give a larger --eval-fraction, or 0 for no held-out rows, or --eval-data" if held_out else more,
    )


def with_pairs(data: PreparedData, *, held_out: bool = False) -> PreparedData:
    """Return rows of one text with its label as rows of pairs. Other rows are returned unchanged.

    Args:
        held_out: the rows are held out.

    Raises:
        DataError: some rows have a label and others none, or no two texts have the same label.
    """
    examples = data.examples
    labelled = [row for row in examples.facts(TextIdentities) if row.label is not None]
    if not labelled:
        return data
    _check_forms(len(labelled), len(examples), data.report.sources[0].source if data.report.sources else None)
    labels = [row.label or 0 for row in labelled]
    others = partners(labels, [row.texts[0] for row in labelled])
    paired = np.flatnonzero(others >= 0)
    if not len(paired):
        raise _without_pairs(examples[0].source, held_out=held_out)
    alone = len(examples) - len(paired)
    notes = data.report.notes
    if alone:
        notes += (f"{count_of(alone, 'row')} left out: no other text has its label",)
    pairs = _pairs(examples, labelled, paired, others[paired])
    counted = with_totals(pairs, replace(data.report, notes=notes))
    return replace(data, examples=counted.examples, report=counted.report)


def _pairs(
    examples: StoredExamples,
    rows: Sequence[TextIdentities],
    anchors: npt.NDArray[np.int64],
    positives: npt.NDArray[np.int64],
) -> StoredExamples:
    records = examples.records[examples.chosen[np.stack((anchors, positives), 1).ravel()]]
    records["place"][::2], records["place"][1::2] = FIRST, NEXT
    identities: dict[int, RowFacts] = {}
    for number, (one, other) in enumerate(zip(anchors.tolist(), positives.tolist(), strict=True)):
        pair = TextIdentities((rows[one].texts[0], rows[other].texts[0]), None, rows[one].label)
        identities[2 * number] = pair
        both = records[2 * number : 2 * number + 2]
        both["key"] = np.void(hashlib.sha256(both["key"].tobytes()).digest())
        both["token_digest"] = np.frombuffer(hashlib.sha256(both["token_digest"].tobytes()).digest()[:8], np.uint64)
    return StoredExamples.all_of(examples.tokens, records, identities)
