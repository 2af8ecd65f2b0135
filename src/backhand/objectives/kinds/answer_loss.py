"""Objectives other than cross-entropy. Most are a closed formula of the log-probabilities of each row's answers.

    s_d = Σ log p(token) over the supervised tokens of document d,   L = (1 / rows) Σ_rows ℓ(s_d of the row's documents)

Every formula depends on a row only through these sums and their numbers of tokens. The gradient of the network is
therefore that of a cross-entropy with one weight per token. The weight is the same for all tokens of a document:

    ∂ℓ/∂log p(token) = ∂ℓ/∂s_d

`AnswerObjective` maps tokens to documents and back, and each of these objectives implements `losses`. The interface of
all losses is in `loop.objective`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from backhand.distributed.communicator import Communicator, sequential_sum
from backhand.engines.engine import Trainable
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.measuring import HeldOut
from backhand.loop.objective import MicroBatch, Objective, RowLosses, means
from backhand.loop.row_passes import document_sums, token_owners
from backhand.loop.step import StepWork
from backhand.nn.batch import TokenLoss


class Documents(NamedTuple):
    """Documents of some rows, in the order of the rows, the chosen side of a pair before the rejected one."""

    sums: Tensor  # s, (documents,) float64
    counts: Tensor  # number of supervised tokens of each, (documents,) float64
    reference: Tensor | None  # s of the model that the run starts from, (documents,) float64; None without a reference


@dataclass
class AnswerObjective(Objective):
    """A loss of the log-probabilities of the rows' answers."""

    # True if a row's documents are compared with each other, so that their log-probabilities must not be rounded alike
    compares_documents: ClassVar[bool] = False
    # s of every document of the rows under the model that the run starts from; None without a reference
    reference: Tensor | None = None

    @abstractmethod
    def losses(self, rows: Sequence[int], documents: Documents) -> RowLosses:
        """Compute the losses of these rows and their gradient in closed form."""

    def prepare_step(
        self,
        model: Trainable,
        rows: Sequence[int],
        processes: Communicator,
        work: StepWork,
        parts: Sequence[Sequence[int]],
    ) -> None:
        self.prepare(model, rows, processes, max(map(len, parts)))

    def prepare(self, model: Trainable, rows: Sequence[int], processes: Communicator, micro_batch_rows: int) -> None:
        """Prepare the losses of these rows, for objectives in which the loss of a row depends on other rows."""

    def evaluated(self, rows: Sequence[int], sums: Tensor, losses: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Receive s of all documents of held-out rows after an evaluation.

        Args:
            losses: of the rows, as in training.

        Returns:
            the losses that choose the best step, (rows,) float64, and further metrics of these rows.
        """
        return losses, {}

    def gradients(self, model: Trainable, rows: Sequence[int], part: MicroBatch) -> Tensor:
        return model.loss_and_gradients(
            part.batch, part.loss_scaling, part.dropout_seed, self.token_loss(part.number, rows)
        )

    def token_loss(self, number: int, rows: Sequence[int]) -> TokenLoss:
        """Return the loss of micro-batch `number`, Σ ℓ of its rows, as a function of its tokens' log-probabilities."""
        owners, counts = token_owners(self.packer, rows)

        def loss(log_p: Tensor) -> tuple[Tensor, Tensor]:
            owner = owners.to(log_p.device)
            sums = torch.zeros(len(counts), dtype=torch.float64, device=log_p.device)
            sums.index_add_(0, owner, log_p.double())
            result = self.of_sums(rows, sums.cpu())
            self._measured[number] = result.measured
            return result.losses.sum(), result.d_sums.to(log_p.device)[owner].to(log_p.dtype)

        return loss

    def of_sums(self, rows: Sequence[int], sums: Tensor) -> RowLosses:
        """Compute the losses of some rows from s of all their documents, (documents,)."""
        _, counts = token_owners(self.packer, rows)
        reference = None if self.reference is None else self.reference[self.packer.documents(rows)]
        return self.losses(rows, Documents(sums, counts, reference))


Answered = TypeVar("Answered", bound=AnswerObjective)


class HeldOutObjective(HeldOut, Generic[Answered]):
    """Held-out rows under an objective of answers.

    Args:
        objective: the objective of these rows.
        micro_batch_rows: rows per forward pass.
        hidden_states: cache of the rows' hidden states, used by every call of `loss`.
    """

    def __init__(
        self, objective: Answered, micro_batch_rows: int, hidden_states: HiddenStateCache | None = None
    ) -> None:
        super().__init__(objective.packer.examples, micro_batch_rows, hidden_states)
        self.objective = objective

    def loss(self, model: Trainable, processes: Communicator, *, interruptible: bool = True) -> float | None:
        """Return the mean loss of a row, or None if the evaluation was interrupted."""
        objective, rows = self.objective, range(len(self._examples))
        objective.prepare(model, rows, processes, self._micro_batch_rows)
        sums = document_sums(
            model,
            objective.packer,
            rows,
            self._micro_batch_rows,
            processes,
            hidden_states=self._hidden_states,
            exact=objective.compares_documents,
            interruptible=interruptible,
        )
        if sums is None:
            return None
        result = objective.of_sums(rows, sums)
        losses, further = objective.evaluated(rows, sums, result.losses)
        self.measured = {f"eval_{name}": value for name, value in {**means([result.measured]), **further}.items()}
        self.by_row = {name: values.tolist() for name, values in result.by_row.items()}
        return sequential_sum(losses.tolist()) / len(rows)
