"""Read rows of embeddings and of rankings, in the forms of sentence-transformers.

    anchor, positive[, negative | negative_1, negative_2, … | negatives]      two texts that belong together
    sentence1, sentence2, score                                               two texts and their similarity
    text, label                                                               one of several texts with this label
    text                                                                      a text whose vector is computed

Rows of rankings have a query instead of the anchor, and one or several documents with their scores.
"""

from __future__ import annotations

from typing import Any

from backhand.data.forms import LABELLED_TEXT, LISTED_SCORES, SCORES
from backhand.data.raw_rows import TRUTH, RawRow, describe, has_unclear_comma, number_of
from backhand.data.row_kind import Form, negative_columns
from backhand.data.rows import EmbeddingRow, RankingRow
from backhand.errors import DataError


def read_embedding(form: Form, raw: RawRow) -> EmbeddingRow:
    """Read a row.

    Raises:
        DataError: a text is empty or no text, the score is no number, or the label neither text nor number.
    """
    if form.columns == LABELLED_TEXT:
        name, label = form.columns
        text = _text(name, raw.values[name], raw.source)
        return EmbeddingRow((text,), None, raw.source, _label(label, raw.values[label], raw.source))
    names = [name for name in form.columns if name not in SCORES]
    texts = [_text(name, raw.values[name], raw.source) for name in names]
    score = None
    if form.columns[-1] in SCORES:
        score = _score(form.columns[-1], raw.values[form.columns[-1]], raw.source)
    elif len(names) > 1:
        texts += _negatives(raw)
    return EmbeddingRow(tuple(texts), score, raw.source)


def read_ranking(form: Form, raw: RawRow, *, has_positives: bool) -> RankingRow:
    """Read a row. A positive has the target 1, and a negative 0.

    Args:
        has_positives: documents without a score are positives; otherwise they have no target.

    Raises:
        DataError: a text is empty or no text, a score is no number, or the numbers of documents and scores differ.
    """
    first, second, *scored = form.columns
    query, value = _text(first, raw.values[first], raw.source), raw.values[second]
    several = value if isinstance(value, list | tuple) else [value]
    documents = [_text(second, one, raw.source) for one in several]
    if not documents:
        raise DataError(f"{second} is empty", where=raw.source, next_step="fill it in, or remove the row")
    targets: list[float] = []
    if scored:
        (name,) = scored
        given = raw.values[name]
        scores = given if name in LISTED_SCORES and isinstance(given, list | tuple) else [given]
        if len(scores) != len(documents):
            raise DataError(
                f"there are {len(documents):,} documents and {len(scores):,} scores",
                where=raw.source,
                next_step="give one number per document",
            )
        targets = [_score(name, one, raw.source) for one in scores]
    elif has_positives:
        negatives = _negatives(raw)
        targets = [1.0] * len(documents) + [0.0] * len(negatives)
        documents += negatives
    return RankingRow(query, tuple(documents), tuple(targets), raw.source, isinstance(value, list | tuple))


def _negatives(raw: RawRow) -> list[str]:
    """Return the hard negatives of a row."""
    texts: list[str] = []
    for name in negative_columns(raw.values):
        value = raw.values[name]
        several = value if isinstance(value, list | tuple) else [value]
        # Tables have empty cells where a row has fewer negatives than others.
        texts += [_text(name, one, raw.source) for one in several if not _is_empty(one)]
    return texts


def _is_empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _text(name: str, value: Any, source: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {describe(value)}, not text", where=source)
    if not value.strip():
        raise DataError(f"{name} is empty", where=source, next_step="fill it in, or remove the row")
    return value


def _label(name: str, value: Any, source: str) -> str:
    label = str(value).strip() if isinstance(value, str | int | float) else ""
    if not label or value != value:
        raise DataError(
            f"{name} is {describe(value)}, not a label",
            where=source,
            next_step="give a text or a number: texts with the same label belong together",
        )
    return label


def _score(name: str, value: Any, source: str) -> float:
    if isinstance(value, bool | str) and (truth := TRUTH.get(str(value).strip().lower())) is not None:
        return float(truth)
    score = number_of(value)
    if has_unclear_comma(value):
        raise DataError(
            f"{name} is {value!r}, which may be a number with a decimal comma or one of thousands",
            where=source,
            next_step="write it with a decimal point and without separators of thousands",
        )
    if score is None:
        raise DataError(
            f"{name} is {describe(value)}, not a number",
            where=source,
            next_step="give a number, or yes and no; a higher one means that the texts belong together more",
        )
    return score
