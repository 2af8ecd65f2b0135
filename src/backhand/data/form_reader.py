"""Read the rows of a file, which all have one form, into conversations, completions, texts, pairs or prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from backhand.data.answer_rows import text_in
from backhand.data.column_hints import ClassColumns
from backhand.data.decisions import Question
from backhand.data.forms import detect, nearest_known
from backhand.data.raw_rows import RawRow, RowErrors
from backhand.data.row_kind import MOST_FOLLOWING, Form, row_kind
from backhand.data.rows import Completion, Conversation, Purpose, Row
from backhand.errors import DataError, UsageError
from backhand.words import name_list


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
        self._kind = row_kind(purpose)
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
            kind, form = self._detect(raw, following=following) if self.form is None else (self._kind, self.form)
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
        row = kind.read(form, raw, self._questions)
        if self._context_column is not None and isinstance(row, Conversation | Completion):
            row = replace(row, context=_context(self._context_column, raw))
        if self.form is None:
            self._kind, self.form, self._first_source = kind, form, raw.source
        if form.reader == "text":
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
            _, other = self._detect(raw)
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
    return text_in(raw.values, column, raw.source)
