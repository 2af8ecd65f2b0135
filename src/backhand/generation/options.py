"""Options of `backhand generate` and `backhand chat`.

This file imports no torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from backhand.adapters.config import parse_names
from backhand.bounds import Bound, Check, Convert, Count, NotNegative, Options, Seed, Text, Words, given
from backhand.data.label_names import as_labels
from backhand.data.options import RowSources, TemplateOptions
from backhand.errors import UsageError
from backhand.nn.model_options import BaseModelOptions
from backhand.words import shorten, shown

LOWEST_TEMPERATURE = 1e-6


def _check_temperature(where: str, value: object) -> None:
    if isinstance(value, float) and 0 < value < LOWEST_TEMPERATURE:
        raise UsageError(
            f"temperature {value!r} is too near to 0",
            where=where,
            why=f"logits divided by less than {LOWEST_TEMPERATURE:f} are infinite",
            next_step="give 0, which always takes the likeliest token",
        )


MOST_NAMED_LABELS, LONGEST_NAMED_LABEL = 1000, 1000


def _check_labels(where: str, names: object) -> None:
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise UsageError(
            f"{shown(names)} is not a list of labels", where=where, next_step=f"give texts, such as --{where} yes,no"
        )
    if len(names) > MOST_NAMED_LABELS:
        raise UsageError(f"{len(names):,} labels are more than {MOST_NAMED_LABELS:,}", where=where)
    if (longest := max(names, key=len, default="")) and len(longest) > LONGEST_NAMED_LABEL:
        what = f"the label {shorten(longest)!r} has {len(longest):,} characters, more than {LONGEST_NAMED_LABEL:,}"
        raise UsageError(what, where=where, next_step="give a shorter one, or answer freely: leave --labels out")
    if len(set(names)) < len(names) or (len(names) == 1 and names[0] not in ("auto", "none")):
        what = f"{names[0]!r} is the only label" if len(names) == 1 else "a label is given twice"
        raise UsageError(what, where=where, next_step="give two or more different ones, such as yes,no")


LabelNames = Annotated[
    tuple[Text, ...],
    Convert(as_labels),
    Check(_check_labels, "At most 1,000 of 1,000 characters."),
    Words(parse_names),
]


@dataclass(frozen=True)
class SamplingOptions(Options):
    """Sampling, and the end of an answer."""

    greedy: bool = False
    """Always choose the most probable token."""

    temperature: Annotated[NotNegative, Check(_check_temperature)] = 0.7
    """Divide the logits by this before drawing: below 1 probable tokens become more probable; 0 is `greedy`."""

    top_p: Annotated[float, Bound(above=0, at_most=1)] = 0.95
    """Draw only from the most probable tokens that together reach this probability; 1 draws from all tokens."""

    top_k: Count | None = None
    """Draw only from this number of most probable tokens; not given: from all tokens."""

    seed: Seed = 0
    """Seed of the random numbers. The same seed, model and prompt give the same answer on the same machine;
    prompts that are answered together may round differently from one alone."""

    max_new_tokens: Count = 512
    """Longest answer, in tokens."""

    stop: tuple[Annotated[Text, given("a stop string is empty", "leave it out")], ...] = ()
    """Strings that end the answer, in addition to the model's own end-of-turn tokens; they are not part of it."""


@dataclass(frozen=True)
class AdapterOptions(Options):
    """Adapter and comparison."""

    adapter: Path | None = None
    """Adapter on the base model: the directory that training or PEFT wrote, or a GGUF file."""

    compare: bool = False
    """Answer with the base model and with the adapter, both labelled."""

    def check_compare(self) -> None:
        """Raise UsageError if `compare` is given without an adapter."""
        if self.compare and self.adapter is None:
            raise UsageError(
                "there is nothing to compare the base model with", where="compare", next_step="give --adapter as well"
            )


def compared_labels(adapter: Path | None) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """Return the headings of two compared answers, each with True if the adapter gives the answer."""
    return ("base model", False), (f"with {adapter}", True)


@dataclass(frozen=True)
class AnswerOptions(AdapterOptions):
    """Prompt, labels and output."""

    prompt: Text | None = None
    """The prompt; `-` reads it from standard input. A model without a chat template continues the text itself. With
    `data`, a column or a text with columns in braces, such as `'{subject}\\n{body}'`, is the prompt of each row."""

    output: Path | None = None
    """With `data`: JSON Lines file for the answers, one line per row in the order of the rows; not given: standard
    output."""

    labels: LabelNames = ()
    """Answer with the most probable of these labels, such as `yes,no`, and print its probability; nothing is sampled.
    `auto` takes the labels that the adapter was trained on."""

    context: Text | None = None
    """With `data`: a prompt in front of every row, as for the objective `bake`: a file, or the text itself."""

    as_rows: bool = False
    """With `data`: write each row with its answer as a row to train on, instead of the prompt as rendered. `context` is
    not part of it: the objective `bake` takes such rows."""

    overwrite: bool = False
    """Replace the file `output` if it exists."""

    batch_rows: Count = 64
    """With `data`: number of rows answered at once; fewer if their keys and values would exceed a gigabyte."""

    quiet: bool = False
    """Print answers and errors only."""


@dataclass(frozen=True)
class GenerateOptions(Options):
    """Options of one answer, or of a file of answers.

    Attributes:
        model: the base model, device and dtype.
        answer: adapter, prompt, labels and output.
        rows: a file of prompts.
        template: chat template and system message.
        sampling: sampling of tokens, and the end of an answer.
    """

    answer: AnswerOptions = field(default_factory=AnswerOptions)
    rows: RowSources = field(default_factory=RowSources)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    template: TemplateOptions = field(default_factory=TemplateOptions)
    model: BaseModelOptions = field(default_factory=BaseModelOptions)

    def _check_together(self) -> None:
        self.answer.check_compare()
        prompt, data = self.answer.prompt, self.rows.data
        if prompt is None and not data:
            raise UsageError(
                "there is nothing to answer",
                where="prompt",
                next_step="give --prompt TEXT (or - for standard input), or --data FILE, whose "
                "prompts --prompt COLUMN may name",
            )
        if self.answer.context is not None and not data:
            raise UsageError("context is given, but there are no rows", where="context", next_step="give --data FILE")
        if self.answer.as_rows and (not data or self.answer.compare):
            raise UsageError(
                "as_rows is given, but there are no rows"
                if not data
                else "a row has one answer, and compare gives two",
                where="as_rows",
                next_step="give --data FILE" if not data else "leave out --compare or --as-rows",
            )
        if data and self.answer.output is None and self.answer.overwrite:
            raise UsageError("overwrite is given without output", where="overwrite", next_step="give --output FILE")
        if not data and self.answer.output is not None:
            raise UsageError(
                "output is for the answers to the rows of data",
                where="output",
                next_step="give --data FILE, or redirect standard output",
            )


@dataclass(frozen=True)
class TalkOptions(AdapterOptions):
    """Adapter and first message."""

    prompt: Text | None = None
    """The first message; the conversation continues from its answer."""


@dataclass(frozen=True)
class ChatOptions(Options):
    """Options of a conversation.

    Attributes:
        model: the base model, device and dtype.
        chat: the adapter, the comparison with the base model, and the first message.
        template: chat template and system message.
        sampling: sampling of tokens, and the end of an answer.
    """

    chat: TalkOptions = field(default_factory=TalkOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    template: TemplateOptions = field(default_factory=TemplateOptions)
    model: BaseModelOptions = field(default_factory=BaseModelOptions)

    def _check_together(self) -> None:
        if self.chat.prompt is not None and not self.chat.prompt.strip():
            raise UsageError("the first message is empty", where="prompt", next_step="leave out --prompt")
        self.chat.check_compare()
