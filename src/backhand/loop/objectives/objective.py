"""An objective: a loss that is a closed formula of the log-probabilities of each row's answers.

    s_d = Σ log p(token) over the supervised tokens of document d,   L = (1 / rows) Σ_rows ℓ(s_d of the row's documents)

Every formula sees nothing of a row but these sums (and how many tokens they have), so that the gradient of the whole
network is that of a cross-entropy with one weight a token: ∂ℓ/∂log p(token) = ∂ℓ/∂s_d, the same for all tokens of a
document. `Objective` maps tokens to documents and back; `losses` is what each objective adds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.data.packing import RowPacker, micro_batches
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import Trainable
from backhand.generate.completer import LanguageModel
from backhand.loop.hidden_state_cache import KeptStates
from backhand.loop.measuring import HeldOut
from backhand.loop.step import sequential_sum
from backhand.nn.batch import TokenLoss

Measured = dict[str, tuple[float, int]]
"""What is shown of rows, by TRL's names: a sum, and over how many."""


class RowLosses(NamedTuple):
    """Of some rows."""

    losses: Tensor  # (rows,) float64
    d_sums: Tensor  # ∂Σ losses / ∂s, (documents,) float64
    measured: Measured  # what is shown of them


class Documents(NamedTuple):
    """Some documents of rows, in the rows' order, the chosen side of a pair before the rejected one."""

    sums: Tensor  # s, (documents,) float64
    counts: Tensor  # supervised tokens of each, (documents,) float64
    reference: Tensor | None  # s of the model that the run starts from, (documents,) float64; None without a reference


@dataclass
class Objective(ABC):
    """A loss of one set of rows."""

    packer: RowPacker  # of the rows
    # s of every document of the rows under the model that the run starts from; None without a reference
    reference: Tensor | None = None
    _found: dict[int, Measured] = field(default_factory=dict)

    @abstractmethod
    def losses(self, rows: Sequence[int], documents: Documents) -> RowLosses:
        """The losses of these rows and their gradient, in closed form."""

    def before(  # noqa: B027 - most need nothing
        self, model: Trainable, rows: Sequence[int], processes: Communicator, micro_batch_rows: int
    ) -> None:
        """Compute what the losses of a step's rows need of one another."""

    def token_loss(self, number: int, rows: Sequence[int]) -> TokenLoss:
        """The loss of micro-batch `number`, Σ ℓ of its rows, as a function of its tokens' log-probabilities."""
        owners, counts = token_owners(self.packer, rows)

        def loss(log_p: Tensor) -> tuple[Tensor, Tensor]:
            owner = owners.to(log_p.device)
            sums = torch.zeros(len(counts), dtype=torch.float64, device=log_p.device)
            sums.index_add_(0, owner, log_p.double())
            found = self.of_sums(rows, sums.cpu())
            self._found[number] = found.measured
            return found.losses.sum(), found.d_sums.to(log_p.device)[owner].to(log_p.dtype)

        return loss

    def of_sums(self, rows: Sequence[int], sums: Tensor) -> RowLosses:
        """The same of all of some rows, from s of their documents, (documents,)."""
        _, counts = token_owners(self.packer, rows)
        reference = None if self.reference is None else self.reference[self.packer.documents(rows)]
        return self.losses(rows, Documents(sums, counts, reference))

    def measured(self, processes: Communicator) -> dict[str, float]:
        """What is shown of the step's rows, from all processes; told once."""
        mine, self._found = self._found, {}
        found = {int(number): one for part in processes.all_gather_object(mine) for number, one in part.items()}
        return means(found[number] for number in sorted(found))


def means(measured: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Sums over their counts; the margin of the mean rewards where both kinds of answers are there."""
    sums: dict[str, tuple[float, int]] = {}
    for one in measured:
        for name, (value, count) in one.items():
            total, counted = sums.get(name, (0.0, 0))
            sums[name] = (total + value, counted + int(count))
    shown = {name: total / count for name, (total, count) in sums.items() if count}
    if "rewards/chosen" in shown and "rewards/rejected" in shown:
        shown["rewards/margins"] = shown["rewards/chosen"] - shown["rewards/rejected"]
    return shown


class HeldOutObjective(HeldOut):
    """Held-out rows under an objective.

    Args:
        kept: keeps their hidden states from one `loss` to the next.
    """

    def __init__(self, objective: Objective, micro_batch_rows: int, kept: KeptStates | None = None) -> None:
        super().__init__(objective.packer.examples, micro_batch_rows, kept)
        self._objective = objective

    def loss(self, model: Trainable, processes: Communicator, *, interruptible: bool = True) -> float | None:
        """The mean loss of a row; see `HeldOut.loss`."""
        objective, rows = self._objective, range(len(self._examples))
        objective.before(model, rows, processes, self._micro_batch_rows)
        size, kept = self._micro_batch_rows, self._kept
        sums = document_sums(model, objective.packer, rows, size, processes, kept=kept, interruptible=interruptible)
        if sums is None:
            return None
        found = objective.of_sums(rows, sums)
        self.measured = {f"eval_{name}": value for name, value in means([found.measured]).items()}
        return sequential_sum(found.losses.tolist()) / len(rows)


def token_owners(packer: RowPacker, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Whose each supervised token of the rows' batch is, (supervised,), among their documents; tokens of each."""
    examples = packer.by_document.examples
    counts = torch.tensor([examples[place].supervised_tokens for place in packer.documents(rows)], dtype=torch.int64)
    return torch.arange(len(counts)).repeat_interleave(counts), counts.double()


def document_sums(
    model: LanguageModel,
    packer: RowPacker,
    rows: Sequence[int],
    micro_batch_rows: int,
    processes: Communicator,
    *,
    kept: KeptStates | None = None,
    interruptible: bool = False,
) -> Tensor | None:
    """s of every document of these rows, (documents,) float64, the same with any number of processes.

    Args:
        model: as it is, without gradients and without dropout.
        kept: keeps the rows' hidden states.
        interruptible: whether to come back with None where a process has been asked to stop.
    """
    groups = micro_batches(rows, packer.lengths, max_rows=micro_batch_rows)
    tokens = [packer.positions(group) for group in groups]
    mine = processes.assign(tokens)[processes.rank]

    def sums(number: int) -> list[float]:
        group = groups[number]
        later = (groups[own] for own in mine if own > number)
        batch = packer.packed(group, "cpu") if kept is None else kept.packed(group, later)
        losses = model.token_losses(batch.to(model.device)).double().cpu()
        owner, counts = token_owners(packer, group)
        found: list[float] = (-torch.zeros(len(counts), dtype=torch.float64).index_add_(0, owner, losses)).tolist()
        return found

    found = processes.parallel_map(tokens, sums, interruptible=interruptible)
    if found is None:
        return None
    place_of = {
        place: value
        for group, values in zip(groups, found, strict=True)
        for place, value in zip(packer.documents(group), values, strict=True)
    }
    return torch.tensor([place_of[place] for place in packer.documents(rows)], dtype=torch.float64)
