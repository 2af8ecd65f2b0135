"""Rankings on the studio's page."""

from __future__ import annotations

from backhand.objective.page import FirstColumns, Fit, Page, Role
from backhand.objectives.kinds.first_rows import known

_DOCUMENTS = ("document", "passage")


class _Rankings(Page):
    title = "Rankings: each document gets a score for a query"
    roles = (
        Role("prompt", "Query"),
        Role("completion", "Document"),
        Role("negative", "Document that does not fit", optional=True),
        Role("score", "How well the document fits (a number, or yes and no)", optional=True),
    )
    fits_encoders = True
    command = ""

    def fits(self, first: FirstColumns) -> Fit | None:
        scored = (
            {"query": "prompt", document: "completion", score: "score"}
            for document in _DOCUMENTS
            for score in ("score", "label")
        )
        if found := known(first, *scored):
            return found
        return Fit(70) if "query" in first.small and first.small.keys() & {"documents", "docs"} else None


PAGE = _Rankings()
