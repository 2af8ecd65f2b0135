"""Which rows to train on and how they become tokens.

This file imports no torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from backhand.bounds import BaseModel, Bound, Check, Count, CountFromZero, Options, Seed, Share, Text, Words
from backhand.errors import UsageError
from backhand.printing import visible

RESERVED_TEMPLATE_ARGS = frozenset(
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages"),
        *("padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens"),
        *("tokenize", "tokenizer_kwargs", "tools", "truncation"),
    )
)
"""Names that the renderer itself fills in."""


def check_sources(where: str, sources: object) -> None:
    """Raise UsageError unless `sources` is a tuple or list of non-empty strings."""
    if not isinstance(sources, tuple | list) or any(
        not isinstance(name, str) or not name.strip() or "\0" in name for name in sources
    ):
        raise UsageError(
            f"{sources!r} is not a list of file names or hub ids",
            where=where,
            next_step='write ["rows.jsonl"] in a TOML file, or name the files on the command line',
        )


def parse_template_args(values: str | Iterable[str]) -> dict[str, Any]:
    """What a command line gives for `template_args`: one JSON object, or `NAME=VALUE` with JSON or plain values.

    Raises:
        UsageError: a value of neither form.
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
    """NAME=VALUE as name and value, read as JSON, or else as it stands."""
    name, _, value = text.partition("=")
    try:
        return name.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return name.strip(), value


def _check_names(where: str, args: Any) -> None:
    """Raise UsageError for a name that the renderer itself fills in."""
    for name in RESERVED_TEMPLATE_ARGS.intersection(args if isinstance(args, Mapping) else ()):
        raise UsageError(f"{name!r} is given to the template by the data, not by {where}", where=where)


PIECES = re.compile(r"\{\{|\}\}|\\[nt]|\{([^{}]*)\}")
"""What is more than text in a text with columns: doubled braces, a line break, a tab, a column in braces."""
WRITTEN = {"{{": "{", "}}": "}", r"\n": "\n", r"\t": "\t"}
"""What stands for those of them that are no column."""


def has_places(text: str) -> bool:
    """Whether a text has the name of a column in braces."""
    return any(match[1] is not None for match in PIECES.finditer(text))


def columns_named(text: str) -> list[str]:
    """The columns that a text names: those in braces; without any the text is a column's name."""
    return [match[1] for match in PIECES.finditer(text) if match[1] is not None] or [text] * bool(text)


def as_typed(text: str) -> str:
    """A text for a shell, on one line and with nothing in it that a terminal would not show as it is.

    It may come from rows. No sign in it ends the quotes, also where a shell does not know $'…' and takes it as it is.
    """
    if visible(text) == text:
        return shlex.quote(text)
    written = {"\\": r"\\", "'": r"\047", "\n": r"\n", "\t": r"\t"}
    octal = {sign: "".join(f"\\{byte:03o}" for byte in sign.encode()) for sign in text if visible(sign) != sign}
    return "$'" + "".join((octal | written).get(sign, sign) for sign in text) + "'"


def reading_options(data: DataOptions) -> str:
    """The options, each after a blank, without which other files of the same columns would be read otherwise."""
    given = {name: getattr(data, name) for name in ("prompt", "completion", "messages", "system", "chat_template")}
    return "".join(f" --{name.replace('_', '-')} {as_typed(text)}" for name, text in given.items() if text is not None)


LONGEST_TYPED = 500
"""Characters of a system message that is part of a command to type."""


def system_option(system: str | None) -> str:
    """The option, after a blank, that asks with this system message; nothing where there is none to type."""
    typed = None if system is None else as_typed(system)
    return "" if typed is None or len(typed) > LONGEST_TYPED else f" --system {typed}"


def asking_options(data: DataOptions, system: str | None = None) -> str:
    """The same for one prompt that is typed, and what the prompts of the rows look like.

    Args:
        system: the system message that all rows have.
    """
    template = data.prompt if data.prompt is not None and has_places(data.prompt) else "…"
    prompt = PIECES.sub(lambda piece: f"{piece[1]} …" if piece[1] is not None else WRITTEN[piece[0]], template)
    if system is None:
        system = None if data.system is None or has_places(data.system) else data.system
    elif not system_option(system):
        system = None
    alone = replace(data, prompt=prompt, completion=None, messages=None, system=system)
    return reading_options(alone)


Sources = Annotated[tuple[str, ...], Check(check_sources)]


@dataclass(frozen=True)
class RowSources:
    """Which rows to read."""

    data: Sources = ()
    """The rows: files (.jsonl, .json, .csv, .tsv, .parquet, each also .gz), folders of them, or a hub data set as
    `owner/name`, `owner/name:split` or `owner/name@config:split` (needs `pip install 'backhand[datasets]'`); or the
    tasks of `reasoning_gym:TASK:size=200,seed=1` (`backhand[rewards]`)."""

    max_rows: Count | None = None
    """Read no more than this many rows, the first ones."""

    skip_bad: bool = False
    """Leave malformed rows out and count them, instead of stopping at the first one."""


@dataclass(frozen=True)
class NamedColumns:
    """Which columns are what, where their names do not say it."""

    prompt: Text | None = None
    """The column that holds the prompt, or a text with columns in braces: `'{subject}\\n{body}'`, where `\\n` is a line
    break and `{{` a brace."""

    completion: Text | None = None
    """The column that holds the completion, or a text with columns in braces as for `prompt`."""

    messages: Text | None = None
    """The column that holds a conversation as a list of messages."""


@dataclass(frozen=True)
class TemplateOptions:
    """How a conversation becomes text."""

    chat_template: Text | None = None
    """A Jinja chat template to use in place of the tokenizer's own: a file, or the template itself; or `none` for rows
    that are rendered already: prompt and completion are then joined as they stand, control tokens included."""

    template_args: Annotated[Mapping[str, Any], Check(_check_names), Words(parse_template_args)] = field(
        default_factory=dict
    )
    """Variables for the chat template, as a JSON object or as `NAME=VALUE`: for example `enable_thinking=false`."""

    system: Text | None = None
    """A system message put before every conversation that does not begin with one of its own. Where `prompt`,
    `completion` or `messages` names a column, columns in braces are filled in as there, for rows without a `system`
    column of their own."""


@dataclass(frozen=True)
class DataOptions(TemplateOptions, NamedColumns, RowSources, Options):
    """The rows, and how they become token ids with some of them supervised.

    Raises:
        UsageError: from `validate`, never from the constructor, so that every value can be shown before it is judged.
    """

    eval_data: Sources = ()
    """Held-out rows, named as in `data`. They are never trained on."""

    eval_fraction: Share | None = None
    """Share of the rows of `data` to hold out, drawn from the seed, when there is no `eval_data`; with 0 only a
    `valid.*` beside a `train.*` is held out. Not given: a tenth, at most 500, of 50 rows or more; none where answers
    are rewarded."""

    max_length: Annotated[int, Bound(at_least=2)] = 2048
    """Longest document in tokens. What is longer is treated as `long_rows` says, and counted."""

    long_rows: Literal["truncate", "drop"] = "truncate"
    """A document longer than `max_length`: `truncate` keeps its first `max_length` tokens, `drop` leaves it out."""

    train_on: Literal["completions", "all"] = "completions"
    """What carries loss: `completions` (assistant turns, completions and outputs) or `all` (every token of the row).
    Plain `text` rows are always supervised as a whole."""

    def _check_together(self) -> None:
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            raise UsageError(
                "messages hold prompt and completion already",
                where="messages",
                next_step="give --messages COLUMN, or --prompt and --completion",
            )
        if self.eval_data and self.eval_fraction:
            raise UsageError(
                f"eval_data is given, and eval_fraction {self.eval_fraction!r} would hold out rows of data as well",
                where="eval_fraction",
                next_step="give one of them",
            )


@dataclass(frozen=True)
class LintRunOptions:
    """What to look with, and what to print."""

    model: BaseModel = "smollm2-135m"
    """The base model whose tokenizer and chat template read the rows: a Hugging Face directory, a GGUF file, a hub id,
    or `smollm2-135m`. Its weights are not read."""

    seed: Seed = 0
    """Draws the rows that `eval_fraction` holds out, as in training."""

    labels: bool = False
    """The rows are answers with a label, `prompt`, `completion` and `label`, for `--objective kto`; pairs are known by
    their columns."""

    prompts: bool = False
    """The rows are prompts for `--objective grpo`: the model answers them itself."""

    show: CountFromZero = 0
    """Also print the first so many training documents token by token, a `*` before each token that carries loss."""

    json: bool = False
    """Print one JSON object in place of the tables."""


@dataclass(frozen=True)
class LintOptions(Options):
    """One look at rows.

    Attributes:
        lint: the model that reads them, and what to print.
        data: the rows, as for training.
    """

    lint: LintRunOptions = field(default_factory=LintRunOptions)
    data: DataOptions = field(default_factory=DataOptions)

    def _check_together(self) -> None:
        if not self.data.data:
            raise UsageError("there is no data", where="data", next_step="give --data FILE")
