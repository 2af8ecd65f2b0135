"""Labels and numbers on the studio's page."""

from __future__ import annotations

from collections.abc import Sequence

from backhand.data.column_hints import class_of
from backhand.objective.page import FirstColumns, Fit, Page, Role
from backhand.objectives.kinds.first_rows import is_target, state_of


class _Classes(Page):
    title = "Labels or a number: a head on the model gives them, also on encoders such as BERT"
    roles = (Role("prompt", "Text"), Role("completion", "Label, or number to predict"))
    fits_encoders = True
    command = "classify"
    asked = ("text", "--prompt=text")
    answering = ("The head of the adapter answers.", "Classify")

    def fits(self, first: FirstColumns) -> Fit | None:
        target = next((name for name in first.columns if is_target(name, first)), None)
        others = [name for name in first.others if name != target]
        if target is not None and len({*others}) == 1:
            return Fit(20, {"prompt": others[0], "completion": target})
        if first.classes and first.others:  # of an encoder, which has no answers to compare
            return Fit(-5, {"prompt": state_of(first), "completion": class_of(first.classes)})
        return None

    def asking(self, words: Sequence[str], prompt: str) -> list[str]:
        return ["classify", *words, f"--text={prompt}"]


PAGE = _Classes()
