"""Read rows of embeddings, in the forms of sentence-transformers.

anchor, positive[, negative | negative_1, negative_2, … | negatives]      two texts that belong together
sentence1, sentence2, score                                               two texts and their similarity
text                                                                      a text whose vector is computed
"""

from __future__ import annotations

import math
from typing import Any

from backhand.data.forms import SCORES, Form, negative_columns
from backhand.data.raw_rows import RawRow, describe
from backhand.data.rows import EmbeddingRow
from backhand.errors import DataError


def read_embedding(form: Form, raw: RawRow) -> EmbeddingRow:
    """Read a row.

    Raises:
        DataError: a text is empty or no text, or the score is no number.
    """
    names = [name for name in form.columns if name not in SCORES]
    texts = [_text(name, raw.values[name], raw.source) for name in names]
    score = None
    if form.columns[-1] in SCORES:
        score = _score(form.columns[-1], raw.values[form.columns[-1]], raw.source)
    elif len(names) > 1:
        for name in negative_columns(raw.values):
            value = raw.values[name]
            several = value if isinstance(value, list | tuple) else [value]
            # Tables have empty cells where a row has fewer negatives than others.
            texts += [_text(name, one, raw.source) for one in several if not _is_empty(one)]
    return EmbeddingRow(tuple(texts), score, raw.source)


def _is_empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _text(name: str, value: Any, source: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {describe(value)}, not text", where=source)
    if not value.strip():
        raise DataError(f"{name} is empty", where=source, next_step="fill it in, or remove the row")
    return value


def _score(name: str, value: Any, source: str) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(
            f"{name} is {describe(value)}, not a number",
            where=source,
            next_step="give the similarity of both texts as a number; a higher one means more similar",
        )
    return score
