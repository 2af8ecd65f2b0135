"""Pairs: DPO in its forms, IPO, SimPO and ORPO, each from its op; what is shown of them has TRL's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from backhand.ops.dpo import AVERAGED, DPORule, dpo_backward, dpo_forward
from backhand.ops.orpo import orpo_backward, orpo_forward
from backhand.ops.simpo import SimPORule, simpo_backward, simpo_forward
from backhand.training.objectives.objective import Documents, Measured, Objective, RowLosses
from backhand.training.objectives.options import ObjectiveOptions


@dataclass
class PairObjective(Objective):
    """A loss of pairs.

    Attributes:
        options: which one, and its numbers.
    """

    options: ObjectiveOptions = field(default_factory=ObjectiveOptions)

    def losses(self, rows: Sequence[int], documents: Documents) -> RowLosses:  # noqa: ARG002 - told by their documents
        """See `Objective.losses`. Rewards are what each loss compares: β log ratios, or β mean log-probabilities."""
        options, (sums, counts, reference) = self.options, documents
        if options.objective in ("simpo", "orpo"):
            seen, divisor = sums / counts, counts
            shown = seen
        else:
            assert reference is not None
            ratios = sums - reference
            divisor = counts if options.form in AVERAGED else torch.ones_like(counts)
            seen, shown = ratios / divisor, sums
        losses, d_chosen, d_rejected = _loss(options, *_sides(seen))
        d_sums = torch.stack((d_chosen, d_rejected), dim=1).flatten() / divisor
        rewards = options.strength * (seen if reference is None else sums - reference)
        return RowLosses(losses, d_sums, _measured(rewards, shown) | _beside(options, seen))


def _sides(of_documents: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected, (pairs,) each."""
    chosen, rejected = of_documents.view(-1, 2).unbind(1)
    return chosen, rejected


def _loss(options: ObjectiveOptions, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of pairs and their slopes, (pairs,) each."""
    one = torch.ones_like(chosen)
    if options.objective == "orpo":
        losses, of_orpo = orpo_forward(chosen, rejected, options.strength)
        return losses, *orpo_backward(one, of_orpo)
    if options.objective == "simpo":
        margin = SimPORule(options.strength, options.simpo_gamma, options.label_smoothing)
        losses, of_simpo = simpo_forward(chosen, rejected, margin)
        return losses, *simpo_backward(one, of_simpo)
    rule = DPORule(options.form, options.strength, options.label_smoothing, options.discopop_tau)
    losses, of_dpo = dpo_forward(chosen, rejected, rule)
    return losses, *dpo_backward(one, of_dpo)


def _measured(rewards: Tensor, log_p: Tensor) -> Measured:
    (good, bad), (log_good, log_bad) = _sides(rewards), _sides(log_p)
    found = {
        "rewards/chosen": good,
        "rewards/rejected": bad,
        "rewards/accuracies": (good > bad).double(),
        "logps/chosen": log_good,
        "logps/rejected": log_bad,
    }
    return {name: (float(values.sum()), len(values)) for name, values in found.items()}


def _beside(options: ObjectiveOptions, seen: Tensor) -> Measured:
    """What ORPO shows beside."""
    if options.objective != "orpo":
        return {}
    chosen, rejected = _sides(seen)
    log_odds = (chosen - rejected) - ((-chosen.expm1()).log() - (-rejected.expm1()).log())
    found = {"nll_loss": -chosen, "log_odds_chosen": log_odds, "log_odds_ratio": logsigmoid(log_odds)}
    return {name: (float(values.sum()), len(values)) for name, values in found.items()}
