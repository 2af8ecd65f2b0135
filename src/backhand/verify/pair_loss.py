"""The loss of pairs on a user's own model: DPO by its op, and as its paper's formula for autograd to differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.nn.batch import TokenLoss
from backhand.ops.dpo import DPORule, dpo_reference
from backhand.training.objectives.objective import token_owners
from backhand.training.objectives.options import ObjectiveOptions
from backhand.training.objectives.pairs import PairObjective

_BETA = 0.1


@dataclass(frozen=True)
class PairLoss:
    """Σ of the losses of pairs, on both sides of the proof.

    Attributes:
        token_loss: by hand, see `Decoder.loss_and_gradients`.
        owners: whose document's each supervised token is, (supervised,).
        reference: what the sums of log-probabilities are measured against, (documents,).
    """

    token_loss: TokenLoss
    owners: Tensor
    reference: Tensor

    def formula(self, nats: Tensor) -> Tensor:
        """The same loss of the tokens' nats, (supervised,), 0-d."""
        sums = nats.new_zeros(len(self.reference)).index_add(0, self.owners.to(nats.device), -nats)
        chosen, rejected = (sums - self.reference.to(sums)).view(-1, 2).unbind(1)
        return dpo_reference(chosen, rejected, DPORule(beta=_BETA)).sum()


def pair_loss(pairs: Sequence[Example]) -> PairLoss:
    """The loss of these pairs, packed together, against a reference that says something else of each side."""
    packer, rows = RowPacker(pairs, share_prefixes=False), range(len(pairs))
    of_tokens, counts = token_owners(packer, rows)
    reference = -counts - torch.arange(2 * len(pairs), dtype=torch.float64) / 3
    objective = PairObjective(packer, reference, options=ObjectiveOptions("dpo", _BETA))
    return PairLoss(objective.token_loss(0, rows), of_tokens, reference)
