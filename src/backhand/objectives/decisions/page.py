"""Decisions on the studio's page."""

from __future__ import annotations

from collections.abc import Sequence

from backhand.data.column_hints import class_of
from backhand.objective.page import Fields, FirstColumns, Fit, Page, chosen
from backhand.objectives.kinds.first_rows import state_of
from backhand.words import shorten

_QUESTIONS = 3


class _Decisions(Page):
    title = "Decisions: the model chooses between fixed answers, with a probability for each"
    fields = "fields_decisions.html.j2"
    reads = ("option_order", "option_rows")
    text_option = "state"
    document_note = " (each option of a question is one)"
    command = "decide"
    asked = ("state", "--state=state")
    answering = ("The adapter decides.", "Decide")

    def fits(self, first: FirstColumns) -> Fit | None:
        if not first.classes or not first.others:
            return None
        return Fit(10, {"state": state_of(first), "question": class_of(first.classes)})

    def column_words(self, fields: Fields) -> list[str]:
        state = chosen(fields, "state")
        return [*([f"--state={state}"] if state else []), *self._questions(fields)]

    def _questions(self, fields: Fields) -> list[str]:
        words = []
        for number in range(_QUESTIONS):
            column, asked = fields.get(f"question{number}"), fields.get(f"asked{number}")
            if asked and not column:
                step = "choose the column with its answers, or remove the question"
                raise fields.refused(f"asked{number}", f"the question “{shorten(asked)}” has no answers", step)
            if column:
                words.append(f"--question={column}={asked}" if asked else f"--question={column}")
        return words

    def column_fields(self) -> list[str]:
        return ["state", *(f"question{number}" for number in range(_QUESTIONS))]

    def asking(self, words: Sequence[str], prompt: str) -> list[str]:
        return ["decide", *words, f"--state={prompt}"]


PAGE = _Decisions()
