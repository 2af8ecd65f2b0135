"""An objective that only a test knows: each answer has the weight 1, whatever its length.

L = (1 / rows) Σ_rows −s / n,   s = Σ log p(token) over the n tokens of the answer, and ∂L/∂s = −1 / (rows n)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from backhand.bounds import Bound, Options
from backhand.objective.page import QUESTION, Page, Role
from backhand.objective.spec import Spec, Traits


@dataclass(frozen=True)
class MeanOptions(Options):
    """The loss of answers of one weight."""

    shortest: Annotated[int, Bound(at_least=1)] = 1
    """Smallest number of tokens by which the loss of an answer is divided (`mean`)."""


class MeanPage(Page):
    title = "Means: each answer counts the same, whatever its length"
    roles = (QUESTION, Role("completion", "Answer"))


class Mean(Spec):
    name = "mean"
    options = "toy_objective:MeanOptions"
    reads = ("shortest",)
    training = "toy_objective:training"
    page = "toy_objective:PAGE"

    def traits(self, options: Any) -> Traits:
        return Traits(rate_rule=True)


MEAN, PAGE = Mean(), MeanPage()


def training() -> Any:
    """Return the part in a run, which needs torch."""
    import torch

    from backhand.loop.objective import RowLosses
    from backhand.objectives.kinds.answer_loss import AnswerObjective, Documents
    from backhand.objectives.kinds.answer_training import AnswerTraining, answer_losses
    from backhand.training.hooks import Losses, RunContext

    @dataclass
    class MeanObjective(AnswerObjective):
        shortest: int = 1

        def losses(self, rows: Sequence[int], documents: Documents) -> RowLosses:
            tokens = torch.clamp(documents.counts, min=self.shortest)
            return RowLosses(-documents.sums / tokens, -1 / tokens, {"mean": (float(tokens.sum()), len(rows))})

    class MeanTraining(AnswerTraining):
        def losses(self, run: RunContext) -> Losses:
            shortest = run.config.objective.shortest
            return answer_losses(run, lambda _, packer: MeanObjective(packer, shortest=shortest))

    return MeanTraining()
