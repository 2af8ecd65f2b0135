"""Pairs of answers, and answers with a label, on the studio's page."""

from __future__ import annotations

from backhand.objective.page import QUESTION, FirstColumns, Fit, Page, Role
from backhand.objectives.kinds.first_rows import known, named

_BETTER = ("chosen", "better", "preferred", "accepted", "good", "best")
_WORSE = ("rejected", "worse", "dispreferred", "refused", "bad", "worst")
"""Parts of the names of the columns of a pair of answers."""


class _Pairs(Page):
    roles = (QUESTION, Role("chosen", "Better answer"), Role("rejected", "Worse answer"))

    def __init__(self, title: str) -> None:
        self.title = title


class _DPO(_Pairs):
    def fits(self, first: FirstColumns) -> Fit | None:
        better, worse = named(first.columns, _BETTER), named(first.columns, _WORSE)
        if not better or not worse:
            return None
        if {"chosen", "rejected"} <= {*first.columns}:
            return Fit(90)
        asked = [column for column in first.texts if column not in (better, worse)]
        prompts = [first.small[name] for name in ("prompt", "question") if name in first.small] or asked[:1]
        return Fit(90, {"chosen": better, "rejected": worse} | ({"prompt": prompts[0]} if prompts else {}))


class _Labels(Page):
    title = "Good and bad answers: each answer has a label (KTO)"
    roles = (
        QUESTION,
        Role("completion", "Answer"),
        Role("label", "Is it good? (true or false, yes or no, 1 or 0)"),
    )

    def fits(self, first: FirstColumns) -> Fit | None:
        return known(first, {"prompt": "prompt", "completion": "completion", "label": "label"})


DPO = _DPO("Pairs (DPO): the model learns which of two answers is better")
ORPO = _Pairs("Pairs (ORPO): the model learns the better answers themselves, and which of two is better")
SIMPO = _Pairs("Pairs (SimPO): as DPO, without comparing with the base model")
KTO = _Labels()
