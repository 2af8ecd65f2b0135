"""Answers as a teacher gives them, which is the model with a longer prompt.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.objective.spec import AnswersFrom, Spec, Traits


class _Bake(Spec):
    name = "bake"

    def traits(self, options: Any) -> Traits:
        origin: AnswersFrom = options.answers_from or "teacher"
        samples = origin != "rows"
        return Traits(
            has_teacher=True, answers_from=origin, samples=samples, trains_on_samples=samples and origin != "teacher"
        )


class _SDFT(Spec):
    name = "sdft"

    def traits(self, options: Any) -> Traits:
        return Traits(has_teacher=True, answers_from="student", samples=True, trains_on_samples=True)


BAKE, SDFT = _Bake(), _SDFT()
