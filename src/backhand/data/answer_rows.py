"""Read rows of answers and texts: conversations, completions, instructions and plain texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backhand.data.messages import read_conversation, read_turns
from backhand.data.raw_rows import IN_MEMORY, RawRow, describe
from backhand.data.row_kind import Form
from backhand.data.rows import Completion, Conversation, OneText, PlainText
from backhand.errors import DataError


def read_answer(form: Form, raw: RawRow) -> OneText:
    """Read a row of a form of `forms.FORMS` or `forms.PROMPT_FORMS`. Raises DataError."""
    values, source = _under_usual_names(form, raw), raw.source
    if form.reader == "conversation":
        return read_conversation(form.columns[0], values[form.columns[0]], values, source)
    if form.reader == "text":
        text = text_in(values, "text", source)
        if not text.strip():
            raise DataError("text is empty", where=source)
        return PlainText(text, source)
    if form.reader == "instruction":
        return _read_instruction(form, values, source)
    return read_completion(form.columns, values, source)


def read_completion(columns: Sequence[str], values: Mapping[str, Any], source: str) -> Conversation | Completion:
    """Read a prompt, which may be a list of messages, and what follows it in the other columns. Raises DataError."""
    prompt, *completions = columns
    if isinstance(values[prompt], list):  # lists of messages as in TRL: only the completion carries loss
        conversation = read_conversation(prompt, values[prompt], values, source)
        turns = [(message, False) for message in conversation.messages]
        for column in completions:
            turns += read_turns(column, values[column], source)
        messages, supervised = zip(*turns, strict=True)
        return Conversation(messages, supervised, conversation.tools, source)
    completion = text_in(values, completions[0], source) if completions else None
    return Completion(text_in(values, prompt, source), completion, "", _optional(values, "system", source), source)


def _under_usual_names(form: Form, raw: RawRow) -> Mapping[str, Any]:
    """Return a row's columns, with the form's own name of the system message replaced with `system`."""
    system = None if form.system is None else _optional(raw.values, form.system, raw.source)
    if system is None:
        return raw.values
    if raw.values.get("system") is not None:
        raise DataError(
            f"the row has two system messages, in system and in {form.system}",
            where=raw.source,
            next_step="keep one of these columns",
        )
    return {**raw.values, "system": system}


def _read_instruction(form: Form, values: Mapping[str, Any], source: str) -> Completion:
    prompt = text_in(values, form.columns[0], source)
    extra = _optional(values, form.optional[0], source)
    if extra and extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    if not prompt.strip():
        raise DataError(f"{form.columns[0]} is empty", where=source)
    output = text_in(values, form.columns[1], source) if len(form.columns) > 1 else None
    return Completion(prompt, output, "\n\n", _optional(values, "system", source), source)


def text_in(values: Mapping[str, Any], column: str, source: str) -> str:
    """Return the text in a column. Raises DataError if it is no text."""
    value = values[column]
    if not isinstance(value, str):
        how = f"write {column} in quotes"
        if source.startswith(IN_MEMORY):
            how = f"convert it to text: frame[{column!r}].astype(str) in a data frame, str(…) in a list of dicts"
        raise DataError(
            f"{column} is {describe(value)}, not text",
            where=source,
            next_step=None if value is None or isinstance(value, list | tuple | Mapping) else how,
        )
    return value


def _optional(values: Mapping[str, Any], column: str, source: str) -> str | None:
    return None if values.get(column) is None else text_in(values, column, source)
