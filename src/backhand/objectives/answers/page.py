"""Answers to learn on the studio's page."""

from __future__ import annotations

from backhand.data.column_hints import ANSWERS
from backhand.data.columns import common_names
from backhand.objective.page import QUESTION, FirstColumns, Fit, Page, Role


class _Answers(Page):
    title = "Answers: the model learns to answer as the rows do"
    roles = (QUESTION, Role("completion", "Answer"))

    def fits(self, first: FirstColumns) -> Fit | None:
        if first.small.keys() & {"messages", "conversations"} or {"prompt", "completion"} <= first.small.keys():
            return Fit(50)
        if first.classes:
            return Fit(0)
        if "text" in first.small or common_names(first.columns) or len(first.texts) < 2:
            return Fit(10)
        answers = [name for name in first.texts[1:] if name.lower() in ANSWERS] or first.texts[1:]
        # Of several answers, one may be the worse one of a pair.
        return Fit(10, {"prompt": first.texts[0]} | ({"completion": answers[0]} if len(answers) == 1 else {}))


PAGE = _Answers()
