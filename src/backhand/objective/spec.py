"""The description of an objective: its facts, and where its parts are.

An objective is a folder `backhand/objectives/NAME/`, or a module of another package. Each part implements the protocol
of one layer, and the layer reaches it through `registry.part`, so that the core imports no objective:

    part        protocol                      contains
    row_kinds   data.row_kind.RowKind         forms, readers, encoders and checks of rows; no torch
    options     options.objectives            the options of the loss; no torch
    results     runs.results.Results          the result of a run, and its words; no torch
    training    training.hooks.Training       losses, and what a run prepares for them
    use         generation.use.Use            the record of an adapter, its command, its exports

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from backhand.errors import UsageError

AnswersFrom = Literal["teacher", "student", "rows"]


class Traits(NamedTuple):
    """Facts of an objective under its options."""

    rows: str = "answers"  # its kind of rows, a key of `Spec.row_kinds`
    predicts_tokens: bool = True  # the loss is one of tokens, so that the model answers texts afterwards
    has_targets: bool = True  # tokens of the rows are targets; False if the loss is one of vectors or scores of texts
    head: Literal["always", "encoders"] | None = None  # the models that get a head on hidden states with the adapter
    has_reference: bool = False  # the loss compares with the model that the run starts from
    has_teacher: bool = False  # the loss is a distance from a teacher's distributions
    answers_from: AnswersFrom | None = None  # origin of the answers of a distilled run
    samples: bool = False  # the model samples answers
    trains_on_samples: bool = False  # the adapted model samples the answers of each step
    compares_rows: bool = False  # the loss of a row depends on the other rows of its step
    rate_rule: bool = False  # the rule of `loop.step_plan` chooses its learning rate, else it is a fixed one
    short_run_factor: float = 1.0  # largest factor of that rate in short runs, see `loop.step_plan`
    fewest_steps: int = 0  # steps that the default number of epochs makes, see `TrainConfig.epochs_of`
    average_share: float = 0.0  # default of `average_share` in long runs

    @property
    def unit(self) -> str:
        """Name of one text that is trained on."""
        return "text" if not self.predicts_tokens else "prompt" if self.trains_on_samples else "document"


class Spec:
    """One objective. A part that is not given is that of answers to learn.

    Attributes:
        name: value of `--objective`.
        row_kinds: kinds of rows that this objective defines, by name, each the text `module:name` of its `RowKind`.
        page: text `module:name` of its `objective.page.Page`; "" if the studio does not offer it.
        options: text `module:name` of the class of its options; "" without any.
        has_rewards: the options of rewards are read.
        reads: names of the options that it reads, of those that not all objectives read.
        results, training, use: texts `module:name`, see the module docstring.
    """

    name: str
    row_kinds: Mapping[str, str] = MappingProxyType({})
    page: str = ""
    options: str = ""
    has_rewards = False
    reads: tuple[str, ...] = ()
    results: str = "backhand.objectives.answers.results:AnswerResults"
    training: str = "backhand.objectives.answers.training:AnswerTraining"
    use: str = "backhand.objectives.answers.use:AnswerUse"

    def traits(self, options: Any) -> Traits:  # noqa: ARG002
        """Return the facts of the objective under these options, which have the defaults filled in."""
        return Traits()

    def defaults(self, options: Any) -> dict[str, Any]:  # noqa: ARG002
        """Return the options whose default follows from other options, with their values."""
        return {}

    def check_options(self, options: Any) -> None:
        """Raise UsageError if options of the loss contradict one another."""

    def check(self, config: Any) -> None:
        """Raise UsageError if the options of a run, a `TrainConfig`, do not fit the objective."""
        if config.data.train_on != "completions":
            raise UsageError(
                f"train_on {config.data.train_on!r} would compare prompts, and {self.name} compares answers",
                where="train_on",
                next_step="leave out --train-on, or give --objective sft",
            )
