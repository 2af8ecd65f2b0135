"""Rows of queries with documents of known relevance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backhand.data.embedding_rows import read_ranking
from backhand.data.forms import LISTED_SCORES, NAMED, SCORES
from backhand.data.lint_rows import Check, LintFindings, LintRows
from backhand.data.pair_examples import PairFormat
from backhand.data.ranking_examples import RankingFormat, documents_of_texts
from backhand.data.ranking_lint import problems_of_rankings, target_fault
from backhand.data.raw_rows import RawRow
from backhand.data.row_kind import Form, RowKind
from backhand.data.rows import RankedTexts, Row
from backhand.errors import DataError

_DOCUMENTS = ("documents", "docs")


def _form(*columns: str, negatives: bool = True) -> Form:
    return Form(columns, "ranking", reads_system=False, has_negatives=negatives)


class _Rankings(RowKind):
    name = "rankings"
    # A document with a score, a list of documents with their scores, or a positive.
    forms = (
        *(
            _form(query, document, score, negatives=False)
            for query, document in (("query", "document"), ("query", "passage"), NAMED, ("sentence1", "sentence2"))
            for score in SCORES
        ),
        *(_form("query", documents, scores, negatives=False) for documents in _DOCUMENTS for scores in LISTED_SCORES),
        _form("anchor", "positive"),
        _form("query", "positive"),
        _form("question", "answer"),
        _form("query", "answer"),
        _form(*NAMED),
    )
    needed = (
        "a row has query, positive and negatives, or query, document and score",
        "name the columns of queries and documents: --prompt COLUMN --completion COLUMN",
    )
    is_rendered = False
    checks = {
        "relevant_negative": Check(
            "negatives that are relevant",
            "with a negative that is relevant for the same query in some row",
            "remove the negative",
        ),
        "twice": Check("documents given twice for a query", "with the same document twice", "remove one of them"),
        "one_score": Check(
            "one score for all documents",
            "whose documents have the same score as all others: there is nothing to rank",
            "add negatives (backhand mine finds them)",
        ),
    }
    has_positives = True  # documents without a score are relevant

    def read(self, form: Form, raw: RawRow, questions: Mapping[str, Any]) -> Row:
        return read_ranking(form, raw, has_positives=self.has_positives)

    def lint_format(self, settings: Mapping[str, Any]) -> RankingFormat | PairFormat:
        # A model that attends in both directions scores documents with a head.
        return RankingFormat() if settings.get("causal", True) else PairFormat("cls")

    def lint(self, rows: LintRows) -> LintFindings:
        held_out = () if rows.held_out is None else rows.held_out.examples
        for one in (*rows.train.examples, *held_out):
            if fault := target_fault(rows.settings.get("ranking_loss", "pointwise"), one.facts_as(RankedTexts)):
                rows.unusable.add(DataError(fault[0], where=one.source, why=fault[1], next_step=fault[2]))
        note = documents_of_texts(head=not rows.settings.get("causal", True))
        return LintFindings(problems_of_rankings(rows.train.examples), notes=[note])


class _Candidates(_Rankings):
    """Queries with documents to score."""

    name = "candidates"
    forms = (*(_form("query", documents) for documents in ("document", "passage", *_DOCUMENTS)), _form(*NAMED))
    needed = (
        "a row has query and document, or query and a list of documents",
        "name the columns of queries and documents: --prompt COLUMN --completion COLUMN",
    )
    has_positives = False


RANKINGS, CANDIDATES = _Rankings(), _Candidates()
