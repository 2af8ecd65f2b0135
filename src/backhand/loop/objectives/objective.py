"""Objectives other than cross-entropy. Most are a closed formula of the log-probabilities of each row's answers.

    s_d = Σ log p(token) over the supervised tokens of document d,   L = (1 / rows) Σ_rows ℓ(s_d of the row's documents)

Every formula depends on a row only through these sums and their numbers of tokens. The gradient of the network is
therefore that of a cross-entropy with one weight per token. The weight is the same for all tokens of a document:

    ∂ℓ/∂log p(token) = ∂ℓ/∂s_d

`AnswerObjective` maps tokens to documents and back, and each of these objectives implements `losses`. The loss of
vectors is in `embed`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from backhand.data.packing import RowPacker
from backhand.distributed.communicator import Communicator, sequential_sum
from backhand.engines.engine import Trainable
from backhand.generation.completer import LanguageModel
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.measuring import HeldOut
from backhand.loop.step import StepWork
from backhand.nn.batch import PackedBatch, TokenLoss

Measured = dict[str, tuple[float, int]]
"""Metrics of rows under TRL's names: each a sum and the number of rows in it."""


class RowLosses(NamedTuple):
    """Losses of some rows, with their gradient and metrics."""

    losses: Tensor  # (rows,) float64
    d_sums: Tensor  # ∂Σ losses / ∂s, (documents,) float64
    measured: Measured
    by_row: Mapping[str, Tensor] = MappingProxyType({})  # values of the rows under names of metrics.jsonl


class Documents(NamedTuple):
    """Documents of some rows, in the order of the rows, the chosen side of a pair before the rejected one."""

    sums: Tensor  # s, (documents,) float64
    counts: Tensor  # number of supervised tokens of each, (documents,) float64
    reference: Tensor | None  # s of the model that the run starts from, (documents,) float64; None without a reference


@dataclass
class Objective(ABC):
    """The loss of one set of rows."""

    packer: RowPacker  # packs the rows
    _measured: dict[int, Measured] = field(default_factory=dict, kw_only=True)  # by micro-batch

    @abstractmethod
    def prepare_step(
        self,
        model: Trainable,
        rows: Sequence[int],
        processes: Communicator,
        work: StepWork,
        parts: Sequence[Sequence[int]],
    ) -> None:
        """Prepare the losses of a step, for objectives in which the loss of a row depends on other rows of the step.

        Args:
            rows: the rows of the step.
            work: their micro-batches.
            parts: the rows of each micro-batch.
        """

    @abstractmethod
    def gradients(
        self,
        parts: Sequence[Sequence[int]],
        model: Trainable,
        number: int,
        batch: PackedBatch,
        loss_scaling: float,
        dropout_seed: int | None,
    ) -> Tensor:
        """Add the gradients of a micro-batch to those of the model's adapter, and return its loss, Σ ℓ of its rows.

        Args:
            parts: the rows of each micro-batch.
            number: index of the micro-batch.
            batch: its packed rows.
            loss_scaling: factor of the gradient.
            dropout_seed: seed of the dropout masks, or None.
        """

    def measured(self, processes: Communicator) -> dict[str, float]:
        """Return the metrics of the step's rows over all processes, and forget them."""
        mine, self._measured = self._measured, {}
        parts = processes.all_gather_object(mine)
        by_batch = {int(number): measured for part in parts for number, measured in part.items()}
        return means(by_batch[number] for number in sorted(by_batch))


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
        work: StepWork,  # noqa: ARG002 - without gradients, the micro-batches may have any rows
        parts: Sequence[Sequence[int]],
    ) -> None:
        self.prepare(model, rows, processes, max(map(len, parts)))

    def prepare(self, model: Trainable, rows: Sequence[int], processes: Communicator, micro_batch_rows: int) -> None:
        """Prepare the losses of these rows, for objectives in which the loss of a row depends on other rows."""

    def evaluated(self, rows: Sequence[int], sums: Tensor, losses: Tensor) -> tuple[Tensor, Mapping[str, float]]:  # noqa: ARG002
        """Receive s of all documents of held-out rows after an evaluation.

        Args:
            losses: of the rows, as in training.

        Returns:
            the losses that choose the best step, (rows,) float64, and further metrics of these rows.
        """
        return losses, {}

    def gradients(
        self,
        parts: Sequence[Sequence[int]],
        model: Trainable,
        number: int,
        batch: PackedBatch,
        loss_scaling: float,
        dropout_seed: int | None,
    ) -> Tensor:
        return model.loss_and_gradients(batch, loss_scaling, dropout_seed, self.token_loss(number, parts[number]))

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


def means(measured: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Divide sums by their counts, and add the margin of the mean rewards if both kinds of answers occur."""
    sums: dict[str, tuple[float, int]] = {}
    for one in measured:
        for name, (value, count) in one.items():
            total, rows = sums.get(name, (0.0, 0))
            sums[name] = (total + value, rows + int(count))
    shown = {name: total / count for name, (total, count) in sums.items() if count}
    if "rewards/chosen" in shown and "rewards/rejected" in shown:
        shown["rewards/margins"] = shown["rewards/chosen"] - shown["rewards/rejected"]
    return shown


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


def token_owners(packer: RowPacker, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the document of each supervised token of the rows' batch, (supervised,), and the tokens per document."""
    examples = packer.by_document.examples
    counts = torch.tensor([examples[place].supervised_tokens for place in packer.documents(rows)], dtype=torch.int64)
    return torch.arange(len(counts)).repeat_interleave(counts), counts.double()


class RowPasses(NamedTuple):
    """Forward passes over rows, which are divided among the processes."""

    groups: list[list[int]]  # the rows of each pass
    tokens: list[int]  # number of tokens of each pass, in descending order
    batch: Callable[[int], PackedBatch]  # returns the batch of a pass of this process

    @classmethod
    def of(
        cls,
        packer: RowPacker,
        rows: Sequence[int],
        micro_batch_rows: int,
        processes: Communicator,
        hidden_states: HiddenStateCache | None,
    ) -> RowPasses:
        """Divide rows.

        Args:
            hidden_states: cache of the rows' hidden states, which may compute later passes of this process ahead.
        """
        groups = packer.micro_batches(rows, micro_batch_rows)
        tokens = [packer.packed_tokens(group) for group in groups]
        mine = processes.assign(tokens)[processes.rank]

        def batch(number: int) -> PackedBatch:
            if hidden_states is None:
                return packer.packed(groups[number], "cpu")
            return hidden_states.packed(groups[number], (groups[own] for own in mine if own > number))

        return cls(groups, tokens, batch)


def document_sums(
    model: LanguageModel,
    packer: RowPacker,
    rows: Sequence[int],
    micro_batch_rows: int,
    processes: Communicator,
    *,
    hidden_states: HiddenStateCache | None = None,
    exact: bool = False,
    interruptible: bool = False,
    on_row: Callable[[], None] = lambda: None,
) -> Tensor | None:
    """Compute s of every document of these rows, (documents,) float64, equal for any number of processes.

    Args:
        model: the model; it computes without gradients and without dropout.
        hidden_states: cache of the rows' hidden states.
        exact: as in `Decoder.token_losses`, for documents that are compared with each other.
        interruptible: return None if a process has been asked to stop.
        on_row: called once per row of this process as soon as its micro-batch is computed.
    """
    groups, tokens, batch = RowPasses.of(packer, rows, micro_batch_rows, processes, hidden_states)

    def sums(number: int) -> list[float]:
        group = groups[number]
        losses = model.token_losses(batch(number).to(model.device), exact=exact).double().cpu()
        owner, counts = token_owners(packer, group)
        result: list[float] = (-torch.zeros(len(counts), dtype=torch.float64).index_add_(0, owner, losses)).tolist()
        for _ in group:
            on_row()
        return result

    by_group = processes.parallel_map(tokens, sums, interruptible=interruptible)
    if by_group is None:
        return None
    place_of = {
        place: value
        for group, values in zip(groups, by_group, strict=True)
        for place, value in zip(packer.documents(group), values, strict=True)
    }
    return torch.tensor([place_of[place] for place in packer.documents(rows)], dtype=torch.float64)
