"""Options of rows and of their conversion to tokens.

This file imports no torch, because the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from backhand.bounds import (
    Bound,
    Check,
    Convert,
    Count,
    CountFromZero,
    GivenBaseModel,
    Options,
    Seed,
    Share,
    Text,
    Words,
)
from backhand.data.rows import ProblemType, RankingLossName
from backhand.errors import UsageError
from backhand.printing import visible
from backhand.words import shorten, shown

RESERVED_TEMPLATE_ARGS = frozenset(
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages"),
        *("padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens"),
        *("tokenize", "tokenizer_kwargs", "tools", "truncation"),
    )
)
"""Arguments of a template that the renderer itself sets."""


def no_data() -> UsageError:
    """Return the error if no data is given."""
    return UsageError("there is no data", where="data", next_step="give --data FILE")


def check_sources(where: str, sources: object) -> None:
    """Raise UsageError unless `sources` is a tuple or list of non-empty strings."""
    if isinstance(sources, tuple | list) and any(isinstance(one, Mapping) for one in sources):
        number, other = next((at, one) for at, one in enumerate(sources, 1) if not isinstance(one, Mapping))
        raise UsageError(
            f"row {number} is {shorten(repr(other))}, not a dict",
            where=where,
            next_step="give one dict per row; the names of files are given without rows",
        )
    if not isinstance(sources, tuple | list) or any(
        not isinstance(name, str) or not name.strip() or "\0" in name for name in sources
    ):
        raise UsageError(
            f"{shorten(repr(sources))} is not a list of file names or hub ids",
            where=where,
            next_step="give a list of dicts with one dict per row, or a data frame of these columns"
            if isinstance(sources, Mapping)
            else 'give file names, such as ["rows.jsonl"]; in Python also a path, a list of dicts or a data frame',
        )


def parse_template_args(values: str | Iterable[str]) -> dict[str, Any]:
    """Parse `template_args` of a command line: one JSON object, or `NAME=VALUE` with JSON or plain values.

    Raises:
        UsageError: a value has neither form.
    """
    parsed: dict[str, Any] = {}
    for value in [values] if isinstance(values, str) else values:
        if value.lstrip().startswith("{"):
            try:
                table = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{value!r} is not a JSON object", where="template_args", why=str(error)) from None
            parsed.update(table)
            continue
        name, equals, _ = value.partition("=")
        if not equals or not name.strip():
            raise UsageError(
                f"{value!r} is neither a JSON object nor of the form NAME=VALUE",
                where="template_args",
                next_step="for example enable_thinking=false",
            )
        parsed.update([named_value(value)])
    return parsed


def named_value(text: str) -> tuple[str, Any]:
    """Split NAME=VALUE; the value is parsed as JSON if it is valid JSON, else it stays text."""
    name, _, value = text.partition("=")
    try:
        return name.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return name.strip(), value


def _check_names(where: str, args: Any) -> None:
    """Raise UsageError for an argument that the renderer itself sets."""
    for name in RESERVED_TEMPLATE_ARGS.intersection(args if isinstance(args, Mapping) else ()):
        raise UsageError(f"{name!r} is set by the renderer, so {where} may not contain it", where=where)


PIECES = re.compile(r"\{\{|\}\}|\\[nt]|\{([^{}]*)\}")
"""Pieces of a template that are not plain text: doubled braces, a line break, a tab, a column in braces."""
WRITTEN = {"{{": "{", "}}": "}", r"\n": "\n", r"\t": "\t"}
"""Text of the pieces that are not columns."""


def has_columns(text: str) -> bool:
    """Return True if a text contains the name of a column in braces."""
    return any(match[1] is not None for match in PIECES.finditer(text))


def columns_named(text: str) -> list[str]:
    """Return the columns in braces of a text; a text without braces is itself a column's name."""
    return [match[1] for match in PIECES.finditer(text) if match[1] is not None] or [text] * bool(text)


def shell_quoted(text: str) -> str:
    """Quote a text for a shell, on one line and without characters that a terminal would interpret.

    The text may come from rows. No character of it ends the quotes, not even in a shell without $'…', which takes it
    literally.
    """
    if visible(text) == text:
        return shlex.quote(text)
    written = {"\\": r"\\", "'": r"\047", "\n": r"\n", "\t": r"\t"}
    octal = {sign: "".join(f"\\{byte:03o}" for byte in sign.encode()) for sign in text if visible(sign) != sign}
    return "$'" + "".join((octal | written).get(sign, sign) for sign in text) + "'"


def reading_options(data: DataOptions) -> str:
    """Return the options that determine how columns are read, each after a space, for commands on other files."""
    given = {name: getattr(data, name) for name in ("prompt", "completion", "messages", "system", "chat_template")}
    words = "".join(
        f" --{name.replace('_', '-')} {shell_quoted(text)}" for name, text in given.items() if text is not None
    )
    return words + "".join(f" --columns {shell_quoted(f'{name}={text}')}" for name, text in data.columns.items())


LONGEST_TYPED = 500
"""Largest number of characters of a system message in a suggested command."""


def system_option(system: str | None) -> str:
    """Return the option with this system message, after a space, or "" if there is none or it is too long."""
    typed = None if system is None else shell_quoted(system)
    return "" if typed is None or len(typed) > LONGEST_TYPED else f" --system {typed}"


def asking_options(data: DataOptions, system: str | None = None, *, plain_text: bool = False) -> str:
    """Return the options for a single typed prompt, with a placeholder in the form of the rows' prompts.

    Args:
        system: the system message that all rows have, or None.
        plain_text: True if the rows are texts without a chat template, which prompts then lack too.
    """
    if plain_text:
        return " --prompt '…' --chat-template none"
    template = data.prompt if data.prompt is not None and has_columns(data.prompt) else "…"
    prompt = PIECES.sub(lambda piece: f"<{piece[1]}>" if piece[1] is not None else WRITTEN[piece[0]], template)
    if system is None:
        system = None if data.system is None or has_columns(data.system) else data.system
    elif not system_option(system):
        system = None
    alone = replace(data, prompt=prompt, completion=None, messages=None, columns={}, system=system)
    return reading_options(alone)


if TYPE_CHECKING:
    from backhand.bounds import Given

    Sources = Given[tuple[str, ...], Any]  # what `data.given_rows.as_sources` takes
else:

    def _as_sources(value: Any) -> Any:
        from backhand.data.given_rows import as_sources

        return as_sources(value)

    Sources = Annotated[tuple[str, ...], Convert(_as_sources), Check(check_sources)]


@dataclass(frozen=True)
class RowSources(Options):
    """Rows to read."""

    data: Sources = ()  # type: ignore[assignment]
    """The rows: files (.jsonl, .json, .csv, .tsv, .parquet, each also .gz), folders of them, `-` for JSON lines from
    standard input, or a hub data set as
    `owner/name`, `owner/name:split` or `owner/name@config:split` (needs `pip install 'backhand[datasets]'`). Also the
    tasks of `reasoning_gym:TASK:size=200,seed=1` (`backhand[rewards]`)."""

    max_rows: Count | None = None
    """Read at most this many rows, the first ones."""

    skip_bad: bool = False
    """Leave out malformed rows and count them, instead of stopping at the first one."""


def parse_columns(values: str | Iterable[str]) -> dict[str, str]:
    """Parse `columns` of a command line: `NAME=COLUMN`.

    Raises:
        UsageError: a value has no name or no column, or a name has two columns.
    """
    pairs = [value.partition("=") for value in ([values] if isinstance(values, str) else values)]
    if any(not name.strip() or not column.strip() for name, _, column in pairs):
        raise UsageError("columns has no NAME=COLUMN", where="columns", next_step="for example chosen='better answer'")
    columns = {name.strip(): column.strip() for name, _, column in pairs}
    if len(columns) < len(pairs):
        raise UsageError("a name is given twice", where="columns", next_step="give each NAME=COLUMN once")
    return columns


def _table_of_texts(name: str, text: str) -> Check:
    """Return a rule that a value maps texts to texts. `name` and `text` say in an error what both of them are."""

    def check(where: str, texts: Any) -> None:
        if not isinstance(texts, Mapping) or not all(isinstance(one, str) for pair in texts.items() for one in pair):
            raise UsageError(
                f"{shown(texts)} is no table of texts",
                where=where,
                next_step=f"give --{where} {name}='{text}', or in a file {name} = '{text}' under [data.{where}]",
            )

    return Check(check)


@dataclass(frozen=True)
class NamedColumns:
    """Columns by name, where Backhand cannot recognize them."""

    prompt: Text | None = None
    """The column of the prompt, or a text with columns in braces: `'{subject}\\n{body}'`, where `\\n` is a line break
    and `{{` a brace."""

    completion: Text | None = None
    """The column of the completion, or a text with columns in braces as for `prompt`."""

    messages: Text | None = None
    """The column of a conversation as a list of messages."""

    columns: Annotated[Mapping[str, str], _table_of_texts("NAME", "COLUMN"), Words(parse_columns)] = field(
        default_factory=dict
    )
    """Columns of any other form of rows, as `NAME=COLUMN`: `chosen='better answer'` reads the column `better answer` as
    `chosen`. A text with columns in braces is allowed as for `prompt`. It can be given several times."""


def parse_questions(values: str | Iterable[str]) -> dict[str, str]:
    """Parse `question` of a command line: `COLUMN=INSTRUCTIONS`, or a column alone.

    Raises:
        UsageError: a value names no column, or two values name the same one.
    """
    pairs = [value.partition("=") for value in ([values] if isinstance(values, str) else values)]
    if any(not name.strip() for name, _, _ in pairs):
        raise UsageError("there is a question without a column", where="question", next_step="give COLUMN='QUESTION'")
    questions = {name.strip(): text.strip() for name, _, text in pairs}
    if len(questions) < len(pairs):
        name = next(name for name in questions if sum(other.strip() == name for other, _, _ in pairs) > 1)
        raise UsageError(f"the column {name!r} is named twice", where="question", next_step="name each column once")
    return questions


@dataclass(frozen=True)
class DecisionColumns:
    """Columns of rows of decisions."""

    state: Text | None = None
    """The column of the text to decide about, or a text with columns in braces as for `prompt` (`decide`)."""

    question: Annotated[Mapping[str, str], _table_of_texts("COLUMN", "QUESTION"), Words(parse_questions)] = field(
        default_factory=dict
    )
    """A column of answers with the question that they answer, as `COLUMN='QUESTION'` (`decide`). It can be given
    several times. The question is a choice between the answers that occur, yes or no, or a score."""

    option_order: Literal["canonical", "random"] = "canonical"
    """Order of the options of a choice in training rows (`decide`): sorted by name as `backhand decide` shows them, or
    drawn from seed, epoch and row. Random orders take a larger model or many more rows. They are for programs that show
    the options in other orders."""

    option_rows: CountFromZero = 6
    """Training rows that are added for each option of a choice (`decide`): the name of the option is the text, and
    this option is the answer. Together they are at most a quarter of the other rows. From them a small model learns
    sooner which letter each option has."""


def _check_no_file(where: str, text: object) -> None:
    """Raise UsageError if a message is the name of a file, whose contents are meant."""
    if isinstance(text, str) and len(text.split()) == 1 and len(text) <= _LONGEST_PATH and Path(text).is_file():
        raise UsageError(
            f"{shorten(text)!r} is a file, and the message is expected itself",
            where=where,
            next_step=f'give its contents: --{where} "$(cat {shell_quoted(text)})"',
        )


_LONGEST_PATH = 255
"""Largest number of characters of a message that is taken for the name of a file."""


@dataclass(frozen=True)
class TemplateOptions:
    """Rendering of conversations as text."""

    chat_template: Text | None = None
    """A Jinja chat template to use instead of the tokenizer's own: a file, or the template itself. `none` is for rows
    that are already rendered: prompt and completion are then joined unchanged, control tokens included. `default` is
    the tokenizer's own. Not given: the tokenizer's own, but none in `generate` and `evaluate` with an adapter that was
    trained on texts without one, unless `template_args` or `system` is given."""

    template_args: Annotated[Mapping[str, Any], Check(_check_names), Words(parse_template_args)] = field(
        default_factory=dict
    )
    """Variables for the chat template, as a JSON object or as `NAME=VALUE`: for example `enable_thinking=false`."""

    system: Annotated[Text, Check(_check_no_file)] | None = None
    """A system message for every conversation that does not start with its own. If `prompt`, `completion` or `messages`
    names a column, columns in braces are filled in here too, for rows without a `system` column."""


@dataclass(frozen=True)
class DataOptions(TemplateOptions, DecisionColumns, NamedColumns, RowSources, Options):
    """Rows, and their conversion to token ids with a mask of supervised tokens.

    Raises:
        UsageError: from `validate`, never from the constructor, so that invalid values can be displayed.
    """

    eval_data: Sources = ()  # type: ignore[assignment]
    """Held-out rows, in the form of `data`. They are never trained on."""

    eval_fraction: Share | None = None
    """Share of the rows of `data` to hold out, drawn with the seed, if there is no `eval_data`. With 0, only a
    `valid.*` next to a `train.*` is held out. Default: a tenth, at most 500, of 50 rows or more; none if answers are
    rewarded."""

    max_length: Annotated[int, Bound(at_least=2)] = 2048
    """Longest document in tokens. `long_rows` determines what happens to longer ones; they are counted."""

    long_rows: Literal["truncate", "drop"] = "truncate"
    """A document longer than `max_length`: `truncate` keeps its first `max_length` tokens, `drop` leaves it out. Of
    rankings, `truncate` cuts the end of the text instead. Decisions, and prompts that the model answers in training
    (`grpo`, `bake`, `sdft`), are never cut but left out."""

    train_on: Literal["completions", "all", "text"] = "completions"
    """Tokens that carry loss: `completions` (assistant turns, completions and outputs), `all` (every token of the row),
    or `text` (whole texts of a column `text`, even if another column looks like their class)."""

    def _check_together(self) -> None:
        options = ("prompt", "completion", "messages", "state")
        if twice := [name for name in options if name in self.columns and getattr(self, name) is not None]:
            raise UsageError(
                f"{twice[0]} is named twice, with --{twice[0]} and with --columns {twice[0]}=…",
                where="columns",
                next_step="give only one of them",
            )
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            raise UsageError(
                "messages already contain prompt and completion",
                where="messages",
                next_step="give --messages COLUMN, or --prompt and --completion",
            )
        if self.state is not None and (self.messages or self.prompt or self.completion):
            raise UsageError(
                "a state and a prompt are both given",
                where="state",
                next_step="give --state and --question for decisions, or --prompt and --completion",
            )
        if self.eval_data and self.eval_fraction:
            raise UsageError(
                f"eval_data and eval_fraction {self.eval_fraction!r} are both given",
                where="eval_fraction",
                next_step="give only one of them",
            )
        if self.train_on == "text" and (self.prompt, self.completion, self.messages) != (None, None, None):
            raise UsageError(
                "train_on 'text' reads the column text, and other columns are named",
                where="train_on",
                next_step="leave out --train-on, or --prompt, --completion and --messages",
            )


@dataclass(frozen=True)
class LintRunOptions:
    """Model and output of the check."""

    model: GivenBaseModel = "smollm2-135m"  # type: ignore[assignment]
    """The base model whose tokenizer and chat template read the rows: a Hugging Face directory, a GGUF file, a hub id,
    or `smollm2-135m`. Its weights are not read."""

    seed: Seed = 0
    """Seed of the random split of `eval_fraction`, as in training."""

    labels: bool = False
    """Read the rows as answers with a label, `prompt`, `completion` and `label`, for `--objective kto`."""

    pairs: bool = False
    """Read the rows as pairs of answers, for `--objective dpo`, `orpo` and `simpo`. Without it, their columns tell
    pairs from other rows."""

    prompts: bool = False
    """Read the rows as prompts for `--objective grpo`, which the model answers itself."""

    decisions: bool = False
    """Read the rows as questions with their answers, for `--objective decide`."""

    embeddings: bool = False
    """Read the rows as texts that are compared, for `--objective embed`."""

    rankings: bool = False
    """Read the rows as queries with documents, for `--objective rank`."""

    classes: bool = False
    """Read the rows as texts with a label, several labels or a number, for `--objective classify`."""

    problem_type: ProblemType | None = None
    """With `classes`, the kind of labels, as in training: `single_label_classification`,
    `multi_label_classification`, or `regression`, which reads integers as numbers. Not given: that of the labels."""

    ranking_loss: RankingLossName = "pointwise"
    """With `rankings`, the loss of training, which the scores must fit: `pointwise`, `listwise` or `listnet`."""

    show: CountFromZero = 0
    """Number of training documents to print token by token, with `*` before each token that carries loss."""

    json: bool = False
    """Print one JSON object instead of tables."""


@dataclass(frozen=True)
class LintOptions(Options):
    """Options of `backhand lint`.

    Attributes:
        lint: model and output.
        data: rows, as for training.
    """

    lint: LintRunOptions = field(default_factory=LintRunOptions)
    data: DataOptions = field(default_factory=DataOptions)

    def _check_together(self) -> None:
        if self.lint.problem_type is not None and not self.lint.classes:
            raise UsageError(
                "problem_type is for texts with a label or a number",
                where="problem_type",
                next_step="add --classes, or leave it out",
            )
        if self.lint.ranking_loss != "pointwise" and not self.lint.rankings:
            raise UsageError(
                "ranking_loss is for queries with documents",
                where="ranking_loss",
                next_step="add --rankings, or leave it out",
            )
        if not self.data.data:
            raise no_data()


def check_ranking_system(system: str | None) -> None:
    """Raise UsageError if a system message is given for rankings, which have their own."""
    if system is not None:
        raise UsageError(
            "a system message is given, but rank has its own",
            where="system",
            why="the prompt of rankings is the one that programs ask rerankers with",
            next_step="leave it out; --instruction describes the task",
        )
