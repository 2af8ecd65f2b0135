"""The part of an objective in a run: what it needs, the losses of its rows, and the scores at the end.

    called by         method        moment
    run, plan         resources     before the model is read
    inputs            with_model    the model is known, and no row is read
                      assumed_rows  instead of rows, for a plan without data
                      with_rows     the rows are known
                      packing       the same, after all checks
    plan, forecast    work          before the weights are read
    trainer           begin         before the first step
                      losses        the same, with the caches of hidden states
                      scores        after the last step

`Training` does all of it for tokens that the model predicts. An objective overrides what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from backhand.data.context import TeacherPrompts
from backhand.data.data_report import DataReport
from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.data.row_encoder import TextFormat
from backhand.data.stored_examples import PreparedData, with_totals
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import BoundModel, Engine
from backhand.errors import not_none
from backhand.loop.guards import tensor_digest
from backhand.loop.hidden_state_cache import HiddenStateCaches
from backhand.loop.loop import SampledSteps
from backhand.loop.measuring import HeldOut
from backhand.loop.objective import Objective
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout
from backhand.objective.registry import objective, part
from backhand.options.config import TrainConfig
from backhand.runs.directory import ProofLog, RunDirectory
from backhand.runs.summary import RunSummary
from backhand.training.identity import Identity
from backhand.training.run_inputs import RunInputs
from backhand.training.starting_adapter import StartingAdapter
from backhand.training.work import Work


@dataclass(frozen=True)
class KnownModel:
    """A run whose model is open. `Training.with_model` fills in the fields after `notes`."""

    config: TrainConfig  # with the configuration of the adapter
    source: ModelSource
    engine: Engine
    layout: AdapterLayout
    start: StartingAdapter | None  # the adapter that the run starts from
    typed: frozenset[str]  # names of the options that the user gave explicitly
    trains_head: bool  # a head on hidden states is trained with the adapter
    notes: tuple[str, ...] = ()  # messages for the user
    _: KW_ONLY
    text_format: TextFormat | None = None  # the way from texts to tokens; None for answers
    teacher: TeacherPrompts | None = None  # prompts of a teacher, in a second document of each row
    outputs: int = 1  # number of outputs of the head, which may follow from the rows


@dataclass(frozen=True)
class KnownRows(KnownModel):
    """A run whose rows are read. `Training.with_rows` fills in the fields after `are_sample`."""

    _: KW_ONLY
    train: PreparedData
    held_out: PreparedData | None
    are_sample: bool  # the rows are a sample of those of the run
    unlearned_rows: int = 0  # held-out rows with labels that no training row has

    def with_data_note(self, note: str) -> KnownRows:
        """Return a copy with one more note on the training rows."""
        return replace(self, train=self.train.with_note(note))

    @property
    def has_dropout(self) -> bool:
        """True if passes with gradients have dropout."""
        return any(slot.dropout > 0 for slot in self.layout.slots)

    @property
    def shares_in_steps(self) -> bool:
        """True if rows of a step may share a prefix. Dropout is drawn for each row."""
        return self.engine.shares_prefixes and not self.has_dropout


class Packing(NamedTuple):
    """The rows of a run with their packers."""

    train: PreparedData
    held_out: PreparedData | None
    packer: RowPacker  # of the training rows
    held_out_packer: RowPacker | None


class Start(NamedTuple):
    """The model that a run starts from: the base, with the adapter of `--from-adapter` if there is one."""

    frozen_digest: str  # SHA-256 of the frozen tensors
    values: Tensor | None = None  # the values of that adapter, (elements,) float32; None without one

    @property
    def adapter_digest(self) -> str | None:
        """SHA-256 of the adapter's values in hexadecimal, or None without one."""
        return None if self.values is None else tensor_digest(self.values).hex()


@dataclass(frozen=True)
class RunContext:
    """A loaded run, as an objective sees it before its first step and after its last one."""

    config: TrainConfig  # with every automatic choice filled in
    inputs: RunInputs
    bound: BoundModel  # the model with its adapter
    identity: Identity
    directory: RunDirectory
    processes: Communicator
    start: Start  # the model that the run starts from
    log: ProofLog  # receives proofs
    notify: Callable[[str], None]  # receives messages for the user
    resources: ExitStack  # closes files at the end of the run
    caches: HiddenStateCaches = field(default_factory=HiddenStateCaches)

    @property
    def micro_batch_rows(self) -> int:
        """Number of rows per forward and backward pass."""
        return not_none(self.config.optimization.micro_batch_rows)


class Losses(NamedTuple):
    """The losses of a run."""

    train: Objective | None = None  # of the training rows; None for cross-entropy
    held_out: HeldOut | None = None  # of the held-out rows; None without them
    sampled: SampledSteps | None = None  # steps on answers that the model samples; None if the rows contain them
    not_learned: tuple[str, ...] = ()  # names of trained tensors on which the loss does not depend


class Training:
    """The part of an objective in one run."""

    def resources(self, config: TrainConfig, processes: Communicator) -> AbstractContextManager[object]:  # noqa: ARG002
        """Open what the whole run needs, such as other processes."""
        return nullcontext()

    def with_model(self, model: KnownModel) -> KnownModel:
        """Choose options by the model, and the way from rows to tokens. Raises UsageError for what does not fit."""
        return model

    def assumed_rows(self, model: KnownModel, row: Example, count: int) -> PreparedData:  # noqa: ARG002
        """Return rows that need the most memory, made of a document of the largest length, all supervised."""
        return with_totals([row] * count, DataReport())

    def with_rows(self, rows: KnownRows) -> KnownRows:
        """Choose options by the rows. Raises DataError for rows, and UsageError for options, that do not fit."""
        return rows

    def packing(self, rows: KnownRows) -> Packing:
        """Return the packers of the rows, which may be `assumed_rows`."""
        # A step of thousands of rows has micro-batches of far more and far fewer tokens than the mean.
        even = rows.config.objective.traits.compares_rows
        packer = RowPacker(rows.train.of_all_epochs, share_prefixes=rows.shares_in_steps, even_tokens=even)
        held_out, shares = rows.held_out, rows.engine.shares_prefixes
        if held_out is None:
            return Packing(rows.train, None, packer, None)
        of_held_out = RowPacker(held_out.of_all_epochs, share_prefixes=shares, even_tokens=even)
        return Packing(rows.train, held_out, packer, of_held_out)

    def work(self, inputs: RunInputs, rows_per_process: int) -> Work:  # noqa: ARG002
        """Return the work of a run in addition to the passes of its steps.

        Args:
            rows_per_process: number of rows of a step that each process computes.
        """
        return Work(end_evaluations=2.0)  # scores of the model before the run and of the adapted one

    def begin(self, run: RunContext) -> RunInputs:
        """Compute what precedes the first step. Returns the inputs, whose rows may have become complete."""
        return run.inputs

    def losses(self, run: RunContext) -> Losses:
        """Return the losses of the rows."""
        rows = run.inputs.held_out_examples
        cache, packer = run.caches.held_out, run.inputs.held_out_packer
        return Losses(held_out=HeldOut(rows, run.micro_batch_rows, cache, packer) if rows else None)

    def scores(self, run: RunContext, losses: Losses, summary: RunSummary) -> dict[str, Any] | None:  # noqa: ARG002
        """Return fields of summary.json on the held-out rows, before the run and of the adapter, which is attached.

        Called in the main process, and only with held-out rows. Returns None if a signal stopped the measurement.
        """
        return {}


def training_of(config: TrainConfig) -> Training:
    """Return the part of the run's objective for one run."""
    made: Training = part(objective(config.objective.objective).training)()
    return made
