"""Vectors of texts on the studio's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from backhand.data.column_hints import ANSWERS
from backhand.objective.page import FirstColumns, Fit, Page, Role
from backhand.objectives.kinds.first_rows import compared, known

_KNOWN = (
    {"anchor": "prompt", "positive": "completion", "negative": "negative"},
    {"anchor": "prompt", "positive": "completion"},
    {"sentence1": "prompt", "sentence2": "completion", "score": "score"},
)
"""Columns with their roles."""
_OF_SCORED_TEXTS = {"prompt": "sentence1", "completion": "sentence2"}
"""Names of the texts of a row that has a score."""


class _Vectors(Page):
    title = "Vectors for search: texts that belong together get similar vectors"
    roles = (
        Role("prompt", "First text, such as a question"),
        Role("completion", "Text that belongs to it"),
        Role("negative", "Similar text that does not belong to it", optional=True),
        Role("score", "How much both belong together (a number, or yes and no)", optional=True),
    )
    fits_encoders = True
    command = "embed"
    asked = ("text", "--prompt=text")
    answering = ("The adapter computes a vector of each text, without the prompt of queries.", "Compare")
    compares = True

    def fits(self, first: FirstColumns) -> Fit | None:
        if found := known(first, *_KNOWN):
            return found
        small, others = first.small, first.others
        if "query" in small:
            document = next((small[name] for name in ("document", "passage") if name in small), None)
            if document is not None:
                return Fit(60, {"prompt": small["query"], "completion": document})
        if columns := compared(first):
            return Fit(40, columns)
        if "query" in small and len(others) == 2 and small["query"] == others[0] and others[1].lower() not in ANSWERS:
            return Fit(30, {"prompt": others[0], "completion": others[1]})
        return Fit(-10)

    def named(self, given: Mapping[str, str]) -> Mapping[str, str]:
        if not given["score"]:
            return given
        return {_OF_SCORED_TEXTS.get(name, name): text for name, text in given.items() if name != "negative"}

    def asking(self, words: Sequence[str], prompt: str) -> list[str]:
        return ["embed", *words, "--data=texts.jsonl"]


PAGE = _Vectors()
