"""Read the rows of a file, which all have one form, into conversations, completions, texts, pairs or prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from backhand.data.class_rows import read_class
from backhand.data.column_hints import ClassColumns
from backhand.data.decision_rows import read_decision
from backhand.data.decisions import Question
from backhand.data.embedding_rows import read_embedding, read_ranking
from backhand.data.forms import MOST_FOLLOWING, PREFERENCE, Form, answers_at_once, detect, nearest_known
from backhand.data.messages import read_conversation, read_turns
from backhand.data.raw_rows import IN_MEMORY, TRUTH, RawRow, RowErrors, describe
from backhand.data.rows import Completion, Conversation, Pair, PlainText, PromptRow, Purpose, Row, UnpairedRow
from backhand.errors import DataError, UsageError
from backhand.words import begin_alike, name_list


class FormReader:
    """Read the rows of one file, which must all have the form of its first valid row.

    Args:
        allow_prompts, purpose, named, not_as_trained: see `detect`.
        questions: the questions of rows of decisions that do not contain their own.
        context_column: column in which rows name the context of the teacher; None without one.
        columns: names that `--columns` gives.
        name_columns: names a renamed column in an error as the file does, see `ColumnReader.name_columns`.

    Attributes:
        form: the form of the file, or None before the first valid row.
        columns: names of all columns so far, in order.
        class_columns: columns of plain-text rows that may contain classes.
    """

    def __init__(
        self,
        *,
        allow_prompts: bool = False,
        purpose: Purpose | None = "answers",
        named: Mapping[str, str] | None = None,
        questions: Mapping[str, Question] | None = None,
        context_column: str | None = None,
        columns: Iterable[str] = (),
        not_as_trained: Callable[[RawRow], DataError | None] | None = None,
        name_columns: Callable[[DataError], object] | None = None,
    ) -> None:
        columns = [*columns]
        self._name_columns = name_columns or (lambda _: None)
        if purpose is None and "label" in columns:
            purpose = "labelled"
        self._purpose: Purpose | None = purpose
        self._questions = questions or {}
        self._detect = partial(
            detect,
            allow_prompts=allow_prompts,
            purpose=purpose,
            named=named,
            renamed=columns,
            questions=[*self._questions],
            not_as_trained=not_as_trained,
        )
        self._context_column = context_column
        self._misspelt = [(name, near) for name in columns if (near := nearest_known(name)) != [name]]
        self.form: Form | None = None
        self.columns: dict[str, None] = {}
        self._first_source = ""
        self._refused: list[RawRow] = []  # rows before the first valid row, if malformed rows are counted
        self.class_columns = ClassColumns()

    def read(self, raw: RawRow, following: Iterable[RawRow] | None = None) -> Row:
        """Read one row.

        Args:
            following: see `detect`.

        Raises:
            DataError: the row has another form than the rows before it, a missing column, or a value of a wrong type.
            UsageError: the row has no form, and `--columns` gives a name of no form.
        """
        try:
            form = self.form or self._detect(raw, following=following)
        except DataError as error:
            if not self._misspelt:
                raise
            name, near = self._misspelt[0]
            raise UsageError(
                f"no form of rows reads {name}",
                where="columns",
                why=f"{raw.source}: {error.what}",
                next_step=f"did you mean {' or '.join(near)}?" if near else "docs/data.md lists the forms of rows",
            ) from None
        if self.form is not None:
            self._check_same(raw)
        if form.kind == "decision":
            row: Row = read_decision(form, raw, self._questions, unanswered=self._purpose == "states")
        elif form.kind == "embedding":
            row = read_embedding(form, raw)
        elif form.kind == "ranking":
            row = read_ranking(form, raw)
        elif form.kind == "class":
            row = read_class(form, raw)
        else:
            row = _prompt_row(form, raw) if self._purpose == "prompts" else _read(form, raw)
        if self._context_column is not None and isinstance(row, Conversation | Completion):
            row = replace(row, context=_context(self._context_column, raw))
        if self.form is None:
            self.form, self._first_source = form, raw.source
        if form.kind == "text":
            self.class_columns.add(raw.values)
        if not self.columns.keys() >= raw.values.keys():
            self.columns |= dict.fromkeys(raw.values)
        return row

    def read_all(self, raws: Iterable[RawRow], bad: RowErrors) -> Iterator[Row]:
        """Yield every valid row; `bad` raises or counts the errors of the others."""
        rows = iter(raws)
        for raw in rows:
            try:
                row = self.read(raw, None if bad.skip_bad else rows)
            except DataError as error:
                self._name_columns(error)
                if bad.skip_bad and self.form is None and len(self._refused) <= MOST_FOLLOWING:
                    self._refused.append(raw)
                bad.add(error)
                continue
            yield row

    def explained(self, error: DataError | None) -> DataError | None:
        """Return the first error of a file without a valid row, with advice from the values of the rows after it."""
        if error is not None and self._refused and error.where == self._refused[0].source:
            try:
                self._detect(self._refused[0], following=self._refused[1:])
            except DataError as explained:
                return explained
        return error

    def _check_same(self, raw: RawRow) -> None:
        assert self.form is not None
        missing = [column for column in self.form.columns if raw.values.get(column) is None]
        if not missing:
            return
        try:
            other = self._detect(raw)
        except DataError:
            other = None
        if other is not None and other != self.form:
            raise DataError(
                f"this row has the form {other.name}, but {self._first_source} has the form {self.form.name}",
                where=raw.source,
                next_step="keep one form per file; several files may have different forms",
            )
        state = "null" if missing[0] in raw.values else "missing"
        raise DataError(f"{missing[0]} is {state}, in a file of the form {self.form.name}", where=raw.source)


def _context(column: str, raw: RawRow) -> str:
    if raw.values.get(column) is None:
        raise DataError(
            f"the row names no context in the column {column}", where=raw.source, why=f"it has {name_list(raw.values)}"
        )
    return _text(raw.values, column, raw.source)


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
    if form.kind == "pair":
        return _read_pair(form, values, source)
    if form.kind == "labelled":
        answer = _read_completion(form.columns[:2], values, source)
        return UnpairedRow(answer, _label(values[form.columns[-1]], form.columns[-1], source), source)
    return _read_completion(form.columns, values, source)


def _prompt_row(form: Form, raw: RawRow) -> PromptRow:
    question = _read(form, raw)
    assert isinstance(question, Conversation | Completion)
    prompt = question.prompt if isinstance(question, Completion) else raw.values[form.columns[0]]
    columns = {name: value for name, value in raw.values.items() if name not in (form.columns[0], "prompt")}
    return PromptRow(question, prompt, columns, raw.source)


def _read_completion(columns: Sequence[str], values: Mapping[str, Any], source: str) -> Conversation | Completion:
    prompt, *completions = columns
    if isinstance(values[prompt], list):  # lists of messages as in TRL: only the completion carries loss
        conversation = read_conversation(prompt, values[prompt], values, source)
        turns = [(message, False) for message in conversation.messages]
        for column in completions:
            turns += read_turns(column, values[column], source)
        messages, supervised = zip(*turns, strict=True)
        return Conversation(messages, supervised, conversation.tools, source)
    completion = _text(values, completions[0], source) if completions else None
    return Completion(_text(values, prompt, source), completion, "", _optional(values, "system", source), source)


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
    prompt = _text(values, form.columns[0], source)
    extra = _optional(values, form.optional[0], source)
    if extra and extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    if not prompt.strip():
        raise DataError(f"{form.columns[0]} is empty", where=source)
    output = _text(values, form.columns[1], source) if len(form.columns) > 1 else None
    return Completion(prompt, output, "\n\n", _optional(values, "system", source), source)


def _read_pair(form: Form, values: Mapping[str, Any], source: str) -> Pair:
    """Read a pair. Its prompt is in a column of its own, or is the common beginning of both sides."""
    chosen, rejected = (values[column] for column in PREFERENCE)
    prompt = values[form.columns[0]] if len(form.columns) > len(PREFERENCE) else None
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise DataError("one of chosen and rejected is text, the other a list of messages", where=source)
    if not isinstance(chosen, list):
        chosen, rejected = (_text(values, column, source) for column in PREFERENCE)
        if prompt is None:
            begin = _common_text(chosen, rejected, source)
            values = {**values, "prompt": chosen[:begin], "chosen": chosen[begin:], "rejected": rejected[begin:]}
    elif isinstance(prompt, str) and answers_at_once(chosen) and answers_at_once(rejected):
        values = {**values, form.columns[0]: [{"role": "user", "content": prompt}]}
    elif not isinstance(prompt, list) or all(prompt and side[: len(prompt)] == prompt for side in (chosen, rejected)):
        # Both sides contain the whole conversation, so an additional prompt is not prepended.
        one, other = (read_conversation(column, values[column], values, source) for column in PREFERENCE)
        begin = _common_messages(one, other, source)
        return Pair(_supervised_from(one, begin), _supervised_from(other, begin), source)
    column = form.columns[0] if prompt is not None else "prompt"
    good, bad = (_read_completion((column, side), values, source) for side in PREFERENCE)
    return Pair(good, bad, source)


def _supervised_from(side: Conversation, begin: int) -> Conversation:
    return replace(side, supervised=tuple(carries and i >= begin for i, carries in enumerate(side.supervised)))


def _common_text(chosen: str, rejected: str, source: str) -> int:
    """Return the number of characters that both sides share. As in TRL, a space before the answers belongs to them."""
    common = begin_alike(chosen, rejected)
    if common and chosen[common - 1] == " ":
        common -= 1
    if chosen == rejected:
        raise DataError("chosen and rejected are the same text", where=source, next_step="remove the row")
    if not common:
        raise _no_prompt("nothing", source)
    if common in (len(chosen), len(rejected)):
        one, other = ("chosen", "rejected") if common == len(chosen) else ("rejected", "chosen")
        raise DataError(
            f"{one} is a prefix of {other}, so it contains no answer after the prompt",
            where=source,
            why="without a column prompt, the prompt is the common beginning of both sides",
            next_step="add the prompt in a column prompt",
        )
    return common


def _common_messages(chosen: Conversation, rejected: Conversation, source: str) -> int:
    """Return the number of messages that both sides share, not counting the last message of either."""
    both = list(zip(chosen.messages[:-1], rejected.messages[:-1], strict=False))
    common = next((i for i, (one, other) in enumerate(both) if one != other), len(both))
    if not any(message["role"] not in ("system", "assistant") for message in chosen.messages[:common]):
        raise _no_prompt("no question", source)
    return common


def _no_prompt(common: str, source: str) -> DataError:
    return DataError(
        f"chosen and rejected have no common prompt: they share {common} at their beginning",
        where=source,
        why="a pair is two answers to one prompt",
        next_step="add the prompt in a column prompt, or the same question at the beginning of both sides",
    )


def _label(value: object, column: str, source: str) -> bool:
    label = TRUTH.get(str(value).strip().lower())
    if label is None:
        raise DataError(
            f"{column} is {describe(value)}, neither true nor false",
            where=source,
            next_step="write true or yes for a desirable answer, false or no for an undesirable one",
        )
    return label


def _text(values: Mapping[str, Any], column: str, source: str) -> str:
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
    return None if values.get(column) is None else _text(values, column, source)
