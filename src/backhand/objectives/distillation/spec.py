"""Answers as a teacher gives them, which is the model with a longer prompt.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.errors import UsageError
from backhand.objective.spec import AnswersFrom, Spec, Traits
from backhand.objectives.distillation.options import (
    DEMONSTRATION_TEMPLATE,
    check_context,
    check_divergence,
    check_template,
)
from backhand.objectives.kinds.checks import check_sampling

_OF_DIVERGENCE = ("divergence", "divergence_share", "divergence_temperature")


class _Distilled(Spec):
    options = "backhand.objectives.distillation.options:DistillationOptions"

    def check_options(self, options: Any) -> None:
        check_divergence(options)


class _Bake(_Distilled):
    name = "bake"
    training = "backhand.objectives.distillation.training:DistilledTraining"
    page = "backhand.objectives.distillation.page:PAGE"
    reads = ("context", "context_column", "answers_from", *_OF_DIVERGENCE)

    def traits(self, options: Any) -> Traits:
        origin: AnswersFrom = options.answers_from or "teacher"
        samples, own = origin != "rows", origin == "student"
        return Traits(has_teacher=True, answers_from=origin, samples=samples, trains_on_samples=own, rate_rule=True)

    def defaults(self, options: Any) -> dict[str, Any]:
        return {
            "divergence": options.divergence or "forward",
            "answers_from": options.answers_from or "teacher",
        }

    def check_options(self, options: Any) -> None:
        check_context(options)
        super().check_options(options)

    def check(self, config: Any) -> None:
        super().check(config)
        check_sampling(config)


class _SDFT(_Distilled):
    name = "sdft"
    training = "backhand.objectives.distillation.training:DistilledTraining"
    reads = ("teacher_prompt_template", "teacher_update_rate", *_OF_DIVERGENCE)

    def traits(self, options: Any) -> Traits:
        return Traits(has_teacher=True, answers_from="student", samples=True, trains_on_samples=True, rate_rule=True)

    def defaults(self, options: Any) -> dict[str, Any]:
        template = options.teacher_prompt_template or DEMONSTRATION_TEMPLATE
        return {"divergence": options.divergence or "reverse", "teacher_prompt_template": template}

    def check_options(self, options: Any) -> None:
        check_template(options.teacher_prompt_template)
        super().check_options(options)

    def check(self, config: Any) -> None:
        super().check(config)
        check_sampling(config)
        if config.objective.teacher_update_rate and config.optimization.average_share:
            raise UsageError(
                "average_share is given together with teacher_update_rate, which averages the values of the teacher",
                where="average_share",
                next_step="leave one of them out",
            )


BAKE, SDFT = _Bake(), _SDFT()
