"""The forms rows come in: told apart by their columns, per file, and made into one of three kinds of row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from backhand.data.messages import Conversation, read_conversation, read_turns
from backhand.data.rows import BadRows, RawRow, describe
from backhand.errors import DataError
from backhand.words import name_list


@dataclass(frozen=True)
class Completion:
    """A prompt and what is to follow it.

    Attributes:
        prompt, completion: as the row has them; completion is None where the row only asks.
        separator: stands between them where no chat template does.
        system: a system message of the row's own.
        source: where the row stands.
    """

    prompt: str
    completion: str | None
    separator: str
    system: str | None
    source: str


@dataclass(frozen=True)
class PlainText:
    """A whole document, every token of which is supervised."""

    text: str
    source: str


Row = Conversation | Completion | PlainText


@dataclass(frozen=True)
class Form:
    """One form of row.

    Attributes:
        columns: all of these must be there.
        kind: how they are read.
        optional: further columns that belong to the form.
        system: a column of the form's own for what `system` holds beside the others.
    """

    columns: tuple[str, ...]
    kind: str
    optional: tuple[str, ...] = ()
    system: str | None = None

    @property
    def name(self) -> str:
        """How it is called aloud, for example `prompt/completion`."""
        return "/".join((self.columns[0], *self.optional, *self.columns[1:]))

    @property
    def answers(self) -> str:
        """The column that holds what a model should say."""
        return self.columns[-1]

    def unread(self, columns: Iterable[str], *, conversation: bool) -> list[str]:
        """Those of a row's columns that nothing is taken from.

        Args:
            conversation: whether rows of this form hold lists of messages.
        """
        beside = _BESIDE_MESSAGES if conversation else () if self.kind == "text" else _BESIDE_MESSAGES[:1]
        read = (*self.columns, *self.optional, self.system, *beside)
        return [column for column in columns if column not in read]


_BESIDE_MESSAGES = ("system", "tools", "functions")
"""Columns that are read beside a conversation, the first one beside a question as well."""

FORMS = (
    Form(("messages",), "conversation"),
    Form(("conversations",), "conversation"),
    Form(("conversation",), "conversation"),
    Form(("prompt", "completion"), "completion"),
    Form(("prompt", "response"), "completion"),
    Form(("instruction", "output"), "instruction", ("input",)),
    Form(("instruction", "response"), "instruction", ("context",)),
    Form(("question", "answer"), "completion"),
    Form(("question", "response"), "completion", system="system_prompt"),
    Form(("query", "response"), "completion"),
    Form(("input", "output"), "completion"),
    Form(("text",), "text"),
)
"""In order of precedence: a row with the columns of several forms has the first."""

ASKING_FORMS = (
    Form(("prompt",), "completion"),
    Form(("instruction",), "instruction", ("input",)),
    Form(("question",), "completion"),
)
"""Rows without an answer: there is something to generate from them, and nothing to train on."""

_PREFERENCE = ("chosen", "rejected")


def detect(raw: RawRow, *, may_ask: bool = False) -> Form:
    """The form of a row, by the names of its columns that are not null. Raises DataError: its columns fit no form."""
    present = {name for name, value in raw.values.items() if value is not None}
    for form in FORMS + ASKING_FORMS if may_ask else FORMS:
        if present.issuperset(form.columns):
            if len(form.columns) == 1 and present.issuperset(_PREFERENCE):
                break
            return form
    if present.issuperset(_PREFERENCE):
        alone = "prompt" not in present and isinstance(raw.values["chosen"], list)
        raise DataError(
            "these are preference pairs (chosen, rejected), which this training has no loss for",
            where=raw.source,
            next_step="to train on the chosen answers, keep chosen alone, and call it messages"
            if alone
            else "to train on the chosen answers, keep prompt and chosen, and call the latter completion",
        )
    asking = next((form for form in ASKING_FORMS if present.issuperset(form.columns)), None)
    if asking is not None:
        answer = next(form.columns[1] for form in FORMS if form.columns[0] == asking.columns[0])
        meant_so = sorted(present & ({form.answers for form in FORMS if len(form.columns) > 1} - {answer}))
        raise DataError(
            f"the row has {asking.columns[0]}, but {'an empty' if answer in raw.values else 'no'} {answer}",
            where=raw.source,
            why=f"its other columns: {name_list(others)}" if (others := sorted(present - {*asking.columns})) else None,
            next_step=f"call the column {meant_so[0]} {answer}" if meant_so else None,
        )
    for form in FORMS:
        empty = [name for name in form.columns if name in raw.values and name not in present]
        if empty and present.union(empty).issuperset(form.columns):
            raise DataError(f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} null", where=raw.source)
    columns = ", ".join(sorted(raw.values)) or "none"
    small = {name.strip().lower() for name in present}
    meant = next((form for form in FORMS if small.issuperset(form.columns)), None)
    raise DataError(
        f"the columns fit no form of row: {columns}",
        where=raw.source,
        next_step=f"write {' and '.join(meant.columns)} in small letters"
        if meant is not None
        else "a row has messages, or prompt and completion, or instruction, input and output, or text",
    )


class FormReader:
    """Reads the rows of one file, which must all have the form of its first good row.

    Attributes:
        form: that form, or None before the first good row.
        columns: the names of all columns so far, in their order.
    """

    def __init__(self, *, may_ask: bool = False) -> None:
        self._may_ask = may_ask
        self.form: Form | None = None
        self.columns: dict[str, None] = {}
        self._first_source = ""

    def read(self, raw: RawRow) -> Row:
        """One row.

        Raises:
            DataError: another form than the rows before it, a missing column, or a value of the wrong type.
        """
        form = self.form or detect(raw, may_ask=self._may_ask)
        if self.form is not None:
            self._check_same(raw)
        row = _read(form, raw)
        if self.form is None:
            self.form, self._first_source = form, raw.source
        if not self.columns.keys() >= raw.values.keys():
            self.columns |= dict.fromkeys(raw.values)
        return row

    def read_all(self, raws: Iterable[RawRow], bad: BadRows) -> Iterator[Row]:
        """Every good row; `bad` raises or counts the others."""
        for raw in raws:
            try:
                row = self.read(raw)
            except DataError as error:
                bad.add(error)
                continue
            yield row

    def _check_same(self, raw: RawRow) -> None:
        assert self.form is not None
        missing = [column for column in self.form.columns if raw.values.get(column) is None]
        if not missing:
            return
        try:
            other = detect(raw, may_ask=self._may_ask)
        except DataError:
            other = None
        if other is not None and other != self.form:
            raise DataError(
                f"this row has the form {other.name}, but {self._first_source} has the form {self.form.name}",
                where=raw.source,
                next_step="keep one form in a file; several files may each have their own",
            )
        found = "null" if missing[0] in raw.values else "not there"
        raise DataError(
            f"{missing[0]} is {found}, in a file of the form {self.form.name}",
            where=raw.source,
        )


def has_empty_answer(row: Row) -> bool:
    """Whether a row that should teach an answer teaches none: nothing but white space in whatever would carry loss."""
    if isinstance(row, PlainText):
        return False
    if isinstance(row, Completion):
        return row.completion is not None and not row.completion.strip()
    replies = [message for message, carries in zip(row.messages, row.supervised, strict=True) if carries]
    return bool(replies) and not any(
        message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content", "").strip()
        for message in replies
    )


def _read(form: Form, raw: RawRow) -> Row:
    values, source = _under_usual_names(form, raw), raw.source
    if form.kind == "conversation":
        return read_conversation(form.columns[0], values[form.columns[0]], values, source)
    if form.kind == "text":
        text = _text(values, "text", source)
        if not text.strip():
            raise DataError("text is empty", where=source)
        return PlainText(text, source)
    if form.kind == "instruction":
        return _read_instruction(form, values, source)
    prompt_column, *completion_column = form.columns
    if isinstance(values[prompt_column], list):
        return _read_message_lists(prompt_column, completion_column, values, source)
    completion = _text(values, completion_column[0], source) if completion_column else None
    return Completion(_text(values, prompt_column, source), completion, "", _optional(values, "system", source), source)


def _under_usual_names(form: Form, raw: RawRow) -> Mapping[str, Any]:
    """A row's columns, the form's own for a system message as `system`."""
    own = None if form.system is None else _optional(raw.values, form.system, raw.source)
    if own is None:
        return raw.values
    if raw.values.get("system") is not None:
        raise DataError(
            f"the row has two system messages, in system and in {form.system}",
            where=raw.source,
            next_step="keep one of these columns",
        )
    return {**raw.values, "system": own}


def _read_instruction(form: Form, values: Mapping[str, Any], source: str) -> Completion:
    prompt = _text(values, form.columns[0], source)
    extra = _optional(values, form.optional[0], source)
    if extra and extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    if not prompt.strip():
        raise DataError(f"{form.columns[0]} is empty", where=source)
    output = _text(values, form.columns[1], source) if len(form.columns) > 1 else None
    return Completion(prompt, output, "\n\n", _optional(values, "system", source), source)


def _read_message_lists(
    prompt_column: str, completion_column: list[str], values: Mapping[str, Any], source: str
) -> Conversation:
    """Prompt and completion as lists of messages, as TRL has them: the loss is on the completion alone."""
    conversation = read_conversation(prompt_column, values[prompt_column], values, source)
    messages, supervised = list(conversation.messages), [False] * len(conversation.messages)
    if completion_column:
        for message, carries_loss in read_turns(completion_column[0], values[completion_column[0]], source):
            messages.append(message)
            supervised.append(carries_loss)
    return Conversation(tuple(messages), tuple(supervised), conversation.tools, source)


def _text(values: Mapping[str, Any], column: str, source: str) -> str:
    value = values[column]
    if not isinstance(value, str):
        raise DataError(
            f"{column} is {describe(value)}, not text",
            where=source,
            next_step=f"write {column} in quotes" if isinstance(value, int | float) else None,
        )
    return value


def _optional(values: Mapping[str, Any], column: str, source: str) -> str | None:
    return None if values.get(column) is None else _text(values, column, source)
