"""Which rows to train on and how they become tokens.

This file imports no torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from backhand.errors import UsageError

LONG_ROWS = ("truncate", "drop")
TRAIN_ON = ("completions", "all")
RESERVED_TEMPLATE_ARGS = frozenset(
    (
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    )
)
"""Names that the renderer itself fills in."""


@dataclass(frozen=True)
class RowSources:
    """Which rows to read."""

    data: tuple[str, ...] = ()
    """The rows: files (.jsonl, .json, .csv, .tsv, .parquet, each also .gz), folders of them, or a hub data set as
    `owner/name`, `owner/name:split` or `owner/name@config:split` (needs `pip install 'backhand[datasets]'`)."""

    max_rows: int | None = None
    """Read no more than this many rows, the first ones; at least 1."""

    skip_bad: bool = False
    """Leave malformed rows out and count them, instead of stopping at the first one."""

    def check_rows(self) -> None:
        """Raise UsageError for a field that is out of range."""
        check_sources("data", self.data)
        if self.max_rows is not None:
            check_count("max_rows", self.max_rows, at_least=1)
        if not isinstance(self.skip_bad, bool):
            raise UsageError(f"skip_bad {self.skip_bad!r} is neither true nor false", where="skip_bad")


@dataclass(frozen=True)
class TemplateOptions:
    """How a conversation becomes text."""

    chat_template: str | None = None
    """A Jinja chat template to use in place of the tokenizer's own: a file, or the template itself; or `none` for rows
    that are rendered already: prompt and completion are then joined as they stand, control tokens included."""

    template_args: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat template, as a JSON object or as `NAME=VALUE`: for example `enable_thinking=false`."""

    system: str | None = None
    """A system message put before every conversation that does not begin with one of its own."""

    def check_template(self) -> None:
        """Raise UsageError for a field of the wrong type; the template itself is checked when it is read."""
        check_text("chat_template", self.chat_template)
        check_text("system", self.system)
        check_table("template_args", self.template_args)
        for name in RESERVED_TEMPLATE_ARGS.intersection(self.template_args):
            raise UsageError(
                f"{name!r} is given to the template by the data, not by template_args", where="template_args"
            )


@dataclass(frozen=True)
class DataOptions(TemplateOptions, RowSources):
    """The rows, and how they become token ids with some of them supervised.

    Raises:
        UsageError: from `validate`, never from the constructor, so that every value can be shown before it is judged.
    """

    eval_data: tuple[str, ...] = ()
    """Held-out rows, named as in `data`. They are never trained on."""

    eval_fraction: float = 0.0
    """Share of the rows of `data` to hold out, drawn from the seed, when there is no `eval_data`. In [0, 1)."""

    max_length: int = 2048
    """Longest document in tokens, at least 2. What is longer is treated as `long_rows` says, and counted."""

    long_rows: Literal["truncate", "drop"] = "truncate"
    """A document longer than `max_length`: `truncate` keeps its first `max_length` tokens, `drop` leaves it out."""

    train_on: Literal["completions", "all"] = "completions"
    """What carries loss: `completions` (assistant turns, completions and outputs) or `all` (every token of the row).
    Plain `text` rows are always supervised as a whole."""

    def validate(self) -> DataOptions:
        """Check every field by itself and against the others; files are checked when they are read.

        Returns:
            self, so that calls chain.

        Raises:
            UsageError: names the field, its value and the range it must lie in.
        """
        self.check_rows()
        self.check_template()
        check_sources("eval_data", self.eval_data)
        check_fraction("eval_fraction", self.eval_fraction)
        if self.eval_data and self.eval_fraction:
            raise UsageError(
                f"eval_data is given, and eval_fraction {self.eval_fraction!r} would hold out rows of data as well",
                where="eval_fraction",
                next_step="give one of them",
            )
        check_count("max_length", self.max_length, at_least=2)
        check_choice("long_rows", self.long_rows, LONG_ROWS)
        check_choice("train_on", self.train_on, TRAIN_ON)
        return self


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


def check_fraction(where: str, fraction: object) -> None:
    """Raise UsageError unless `fraction` is a number in [0, 1)."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
        raise UsageError(f"{where} {fraction!r} is not a number in [0, 1)", where=where)


def check_count(where: str, count: object, *, at_least: int) -> None:
    """Raise UsageError unless `count` is an integer of at least `at_least`."""
    if isinstance(count, bool) or not isinstance(count, int) or count < at_least:
        raise UsageError(f"{where} {count!r} is not an integer of at least {at_least}", where=where)


def check_choice(where: str, value: object, choices: Iterable[str]) -> None:
    """Raise UsageError unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise UsageError(f"{where} {value!r} is not one of {', '.join(choices)}", where=where)


def check_table(where: str, table: object) -> None:
    """Raise UsageError unless `table` maps names to values."""
    if not isinstance(table, Mapping) or any(not isinstance(key, str) for key in table):
        raise UsageError(f"{table!r} is not a table of names and values", where=where)


def check_text(where: str, text: object) -> None:
    """Raise UsageError unless `text` is None or a string that can be written as UTF-8."""
    if text is None:
        return
    if not isinstance(text, str):
        raise UsageError(f"{where} {text!r} is not text", where=where)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{where} holds half of a surrogate pair, which no tokenizer can read", where=where)


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
        name, equals, text = value.partition("=")
        if not equals or not name.strip():
            raise UsageError(
                f"{value!r} is neither a JSON object nor of the form NAME=VALUE",
                where="template_args",
                next_step="for example enable_thinking=false",
            )
        try:
            parsed[name.strip()] = json.loads(text)
        except (ValueError, RecursionError):
            parsed[name.strip()] = text
    return parsed
