"""Kinds of rows: which columns they have, how they are read and encoded, and which problems they may have.

An objective names the kind of its rows (`Traits.rows`) and defines kinds (`Spec.row_kinds`). The files of this package
know no kind: they ask `row_kind` for it, and call its methods. This module imports no torch and no NumPy.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from backhand.data.column_hints import ClassColumns
from backhand.data.lint_rows import ANSWER_CHECKS, Check, LintFindings, LintRows
from backhand.data.options import NamedColumns
from backhand.data.raw_rows import RawRow
from backhand.data.rows import Row
from backhand.errors import DataError
from backhand.objective.registry import objectives, part

if TYPE_CHECKING:
    from backhand.data.document_encoder import DocumentEncoder
    from backhand.data.documents import RowRenderer
    from backhand.data.options import DataOptions
    from backhand.data.stored_examples import PreparedData

_SHARED_COLUMNS = ("system", "tools", "functions")
"""Columns that are read in addition to a conversation; only the first one in addition to a prompt."""
_NEGATIVE = re.compile(r"negatives?|negative_(\d+)")
MOST_FOLLOWING = 200
"""Largest number of following rows that are read for the values of columns."""


def negative_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns of hard negatives, in the order of their numbers."""
    found = [(int(match[1] or 0), name) for name in columns if (match := _NEGATIVE.fullmatch(name))]
    return [name for _, name in sorted(found)]


@dataclass(frozen=True)
class Form:
    """One form of row."""

    columns: tuple[str, ...]  # required columns
    reader: str  # selects among the readers of its kind
    optional: tuple[str, ...] = ()  # optional columns of the form
    system: str | None = None  # the form's own name of the column `system`
    answers: tuple[str, ...] = ()  # columns of answers; the last column if it is empty
    reads_system: bool = True  # a system message is read in addition to these columns
    has_negatives: bool = False  # columns of hard negatives are read as well

    @property
    def name(self) -> str:
        """The form in messages, for example `prompt/completion`."""
        return "/".join((self.columns[0], *self.optional, *self.columns[1:]))

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """Columns of answers: two for a pair, otherwise one."""
        return self.answers or self.columns[-1:]

    def unread(self, columns: Collection[str], *, conversation: bool) -> list[str]:
        """Return the columns that are not read.

        Args:
            conversation: True if rows of this form contain lists of messages.
        """
        shared = _SHARED_COLUMNS if conversation else _SHARED_COLUMNS[:1] if self.reads_system else ()
        read = (*self.columns, *self.optional, self.system, *shared)
        if self.has_negatives:
            read = (*read, *negative_columns(columns))
        return [column for column in columns if column not in read]


def known_columns(forms: Iterable[Form]) -> set[str]:
    """Return the names of all columns that some of these forms read."""
    known = {*_SHARED_COLUMNS, "negative"}.union(*({*form.columns, *form.optional, form.system} for form in forms))
    return {name for name in known if name is not None}


@dataclass(frozen=True)
class UnfitColumns:
    """The columns of a row that fits no form of its kind."""

    raw: RawRow
    present: frozenset[str]  # columns that are not null
    given: Mapping[str, str]  # columns or templates by option
    following: Iterable[RawRow] | None  # the rows after this one; None if they are not known
    answers: bool  # False if rows without an answer are accepted

    @cached_property
    def values(self) -> tuple[ClassColumns, int]:
        """The values of the columns, and the number of rows that were read for them: this and some following ones."""
        rows, values = [self.raw], ClassColumns()
        with suppress(DataError):  # the error about the first row is raised instead
            rows.extend(islice(self.following or (), MOST_FOLLOWING))
        for row in rows:
            values.add(row.values)
        return values, len(rows)


class SettleContext(NamedTuple):
    """Context in which the rows of a run are settled."""

    options: DataOptions
    tokenizer: Any
    seed: int
    epochs: int  # number of passes over the rows
    questions: Mapping[str, Any]  # shared by all rows, see `RowKind.find_questions`
    finds_questions: bool  # the rows are those that the questions were found in, so they are rows to train on
    text_format: Any  # from texts to tokens, or None


class RowKind:
    """One kind of rows. The methods of this class are those of answers to learn.

    Attributes:
        name: the kind, in options, records and digests.
        forms: in order of precedence: a row with the columns of several forms has the first one.
        needed: columns that the rows need, as a phrase for errors, and options of all commands that read them; None for
            answers, whose errors are more specific.
        by_document: each document counts by itself, so that rows may have several. It is False if the documents of a
            row are compared.
        has_answers: False for rows to answer.
        is_rendered: False if texts are encoded without a chat template.
        is_detected: rows of this kind are recognised by their columns if no kind is given.
        may_be_equal: two columns of a row may have the same text.
        checks: findings of `backhand lint`, in the order of its table.
        skip_option: option with which --skip-bad leaves out the rows of `LintRows.needs_option`.
    """

    name = "answers"
    forms: tuple[Form, ...] = ()
    needed: tuple[str, str] | None = None
    by_document = False
    has_answers = True
    is_rendered = True
    is_detected = False
    may_be_equal = False
    checks: Mapping[str, Check] = ANSWER_CHECKS
    skip_option = ""

    def of(
        self,
        raw: RawRow,  # noqa: ARG002
        present: Collection[str],  # noqa: ARG002
        given: Mapping[str, str],  # noqa: ARG002
        renamed: Collection[str],  # noqa: ARG002
    ) -> RowKind:
        """Return the kind of a row; only kinds for the evaluation of several others look at its columns.

        Args:
            present: columns that are not null.
            given: columns or templates by option.
            renamed: names that `--columns` gives.
        """
        return self

    def recognises(
        self,
        raw: RawRow,  # noqa: ARG002
        present: Collection[str],  # noqa: ARG002
        given: Mapping[str, str],  # noqa: ARG002
        renamed: Collection[str],  # noqa: ARG002
    ) -> bool:
        """Return True if a row whose kind is not given is of this kind. The arguments are those of `of`."""
        return False

    def read(self, form: Form, raw: RawRow, questions: Mapping[str, Any]) -> Row:
        """Read a row. Raises DataError.

        Args:
            questions: shared by all rows, see `find_questions`.
        """
        raise NotImplementedError

    def advice(self, columns: UnfitColumns, questions: Collection[str]) -> str | None:  # noqa: ARG002
        """Return the options that read the columns of a row of this kind, or None."""
        return None

    def encoder(self, renderer: RowRenderer, options: DataOptions) -> DocumentEncoder:
        """Return the encoder of rows whose documents are rendered separately."""
        from backhand.data.document_encoder import DocumentEncoder

        return DocumentEncoder(renderer, options)

    def template_options(self, options: Any, tokenizer: Any) -> Any:  # noqa: ARG002
        """Return the options with which the rows are rendered. Both are `TemplateOptions`."""
        return options

    def find_questions(self, options: DataOptions, recorded: NamedColumns | None) -> dict[str, Any]:  # noqa: ARG002
        """Return what all rows share and is found by a first reading, by name.

        Args:
            recorded: columns that an adapter was trained on, or None.
        """
        return {}

    def settle(
        self,
        train: PreparedData,
        held_out: PreparedData | None,
        context: SettleContext,  # noqa: ARG002
    ) -> tuple[PreparedData, PreparedData | None]:
        """Return the encoded rows after what all of them together decide. Raises DataError."""
        return train, held_out

    def lint_format(self, settings: Mapping[str, Any]) -> Any:  # noqa: ARG002
        """Return a format of texts of which no finding depends on the details; None if rows are rendered as chats."""
        return None

    def lint_options(self, options: DataOptions) -> DataOptions:
        """Return the options with which rows to check are prepared."""
        return options

    def lint(self, rows: LintRows) -> LintFindings:
        """Return the problems of prepared rows."""
        from backhand.data.answer_lint import lint_answers

        return lint_answers(rows)


class Detected(RowKind):
    """Rows whose kind their columns tell: pairs, answers with a label, or answers."""

    by_document = True

    @property
    def forms(self) -> tuple[Form, ...]:  # type: ignore[override]
        """The forms of all kinds that columns tell."""
        return tuple(form for kind in row_kinds() if kind.is_detected for form in kind.forms)

    def of(self, raw: RawRow, present: Collection[str], given: Mapping[str, str], renamed: Collection[str]) -> RowKind:
        """Return the kind of a row."""
        known = (kind for kind in row_kinds() if kind.recognises(raw, present, given, renamed))
        return next(known, row_kind("answers"))


_DETECTED = Detected()


def row_kinds() -> tuple[RowKind, ...]:
    """Return all kinds of rows in the order of the objectives that define them."""
    return tuple(part(reference) for spec in objectives() for reference in spec.row_kinds.values())


def row_kind(name: str | None) -> RowKind:
    """Return a kind of rows by name. None is the kind of rows whose columns tell what they are."""
    if name is None:
        return _DETECTED
    references = {one: reference for spec in objectives() for one, reference in spec.row_kinds.items()}
    kind: RowKind = part(references[name])
    return kind
