"""Rows of texts whose vectors are compared, in sentence-transformers' forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backhand.data.embedding_examples import EmbeddingFormat
from backhand.data.embedding_lint import problems_of_embeddings
from backhand.data.embedding_rows import read_embedding
from backhand.data.forms import LABELLED_TEXT
from backhand.data.label_pairs import with_pairs
from backhand.data.lint_rows import Check, LintFindings, LintRows
from backhand.data.raw_rows import RawRow
from backhand.data.row_kind import Form, RowKind, SettleContext
from backhand.data.rows import Row
from backhand.data.stored_examples import PreparedData


def _form(*columns: str, negatives: bool = True) -> Form:
    return Form(columns, "embedding", reads_system=False, has_negatives=negatives)


class _Embeddings(RowKind):
    name = "embeddings"
    forms: tuple[Form, ...] = (
        _form("sentence1", "sentence2", "score", negatives=False),
        _form("sentence1", "sentence2", "label", negatives=False),
        _form("anchor", "positive"),
        _form("query", "positive"),
        _form("question", "answer"),
        _form("query", "answer"),
        _form("prompt", "completion"),
        _form(*LABELLED_TEXT, negatives=False),
    )
    needed = (
        "a pair has anchor and positive, a scored pair sentence1, sentence2 and score, a labelled text text and label",
        "name the columns of anchors and positives: --prompt COLUMN --completion COLUMN",
    )
    is_rendered = False
    may_be_equal = True  # the vectors of equal texts differ by dropout
    checks = {
        "equal_positive": Check(
            "positives equal to their anchor",
            "whose positive is the anchor, which teaches nothing without dropout",
            "remove the rows, or train with --dropout 0.1",
        ),
        "positive_negative": Check(
            "negatives that are positives",
            "with a negative that is a positive of the same anchor in some row",
            "remove the negative",
        ),
        "few_positives": Check(
            "few different positives",
            "of rows with {:,} different positives: most texts of a step are no negatives of each other",
            "train labels with --objective classify or decide, or give rows with more different positives",
        ),
        "few_anchors": Check(
            "few different anchors",
            "of rows with {:,} different anchors: many texts of a step belong to the same one, and are no negatives",
            "train labels with --objective classify or decide, or give rows with more different anchors",
        ),
    }

    def read(self, form: Form, raw: RawRow, questions: Mapping[str, Any]) -> Row:
        return read_embedding(form, raw)

    def settle(
        self, train: PreparedData, held_out: PreparedData | None, context: SettleContext
    ) -> tuple[PreparedData, PreparedData | None]:
        """Pair labelled texts with texts of the same label."""
        return with_pairs(train), None if held_out is None else with_pairs(held_out, held_out=True)

    def lint_format(self, settings: Mapping[str, Any]) -> EmbeddingFormat:
        return EmbeddingFormat("last")

    def lint(self, rows: LintRows) -> LintFindings:
        return LintFindings(problems_of_embeddings(rows.train.examples))


class _Texts(_Embeddings):
    """Texts whose vectors are computed."""

    name = "texts"
    forms = (_form("text"), _form("prompt"))
    needed = ("a text is in the column text", "name another column: --prompt COLUMN")
    may_be_equal = False
    checks = {}

    def settle(
        self, train: PreparedData, held_out: PreparedData | None, context: SettleContext
    ) -> tuple[PreparedData, PreparedData | None]:
        return train, held_out


EMBEDDINGS, TEXTS = _Embeddings(), _Texts()
