"""Read rows from sources, encode their documents in batches, and collect statistics."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from backhand.data.column_hints import ClassColumns, class_of, suggestion
from backhand.data.columns import ColumnReader
from backhand.data.data_report import DataReport, SourceForm
from backhand.data.decisions import Question
from backhand.data.form_reader import FormReader
from backhand.data.forms import check_options
from backhand.data.mojibake import find_mojibake
from backhand.data.options import NamedColumns, RowSources
from backhand.data.raw_rows import IN_MEMORY, RowErrors
from backhand.data.row_encoder import EncodedRows, RowEncoder
from backhand.data.row_kind import row_kind
from backhand.data.rows import (
    Conversation,
    PlainText,
    Purpose,
    Row,
    characters_of,
    system_of,
)
from backhand.data.sources import expand, read_rows
from backhand.data.workers import WorkerEndedError, parallel_map
from backhand.errors import DataError
from backhand.words import count_of, label_text, name_list, shorten

_FEW_EMPTY_LINES = 1000


_BATCH_ROWS, _BATCH_CHARACTERS = 256, 2**19
"""Limits of a batch that is sent to a worker."""


@dataclass(frozen=True)
class RowPipeline:
    """Read rows from sources: columns, forms and statistics. The caller makes examples or prompts of them."""

    sources: RowSources
    named: NamedColumns
    system: str | None
    bad: RowErrors
    purpose: Purpose | None = "answers"
    held_out: bool = False
    allow_prompts: bool = False
    answers_only: bool = False  # only answers are learned, so a file without answers is an error
    questions: Mapping[str, Question] | None = None  # the questions of rows of decisions, see `FormReader`
    refuses_classes: bool = False  # whole texts next to a column of classes are an error
    texts_only: bool = False  # any other form than whole texts is an error
    recorded: NamedColumns | None = None  # columns that an adapter was trained on, see `ColumnReader`
    context_column: str | None = None  # column in which rows name the context of the teacher

    def open_file(self, name: str) -> tuple[ColumnReader, FormReader, Iterator[Row]]:
        """Return the readers of a file's columns and form, and its valid rows."""
        evaluation = f"an evaluation of {self.purpose or 'answers'}"  # training checks its options before
        kind = row_kind(self.purpose)
        check_options(self.named, kind, evaluation, "use an adapter of --objective {}".format)
        named = ColumnReader(
            self.named,
            self.system,
            guess=kind.by_document,
            recorded=self.recorded,
            answers=not self.allow_prompts and kind.has_answers,
            may_be_equal=kind.may_be_equal,
        )
        reader = FormReader(
            allow_prompts=self.allow_prompts,
            purpose=self.purpose,
            named=named.given,
            questions=self.questions,
            context_column=self.context_column,
            columns=self.named.columns,
            not_as_trained=named.not_as_trained,
            name_columns=named.name_columns,
        )
        prompts = self.allow_prompts or not kind.has_answers
        raws = read_rows(name, self.bad, held_out=self.held_out, prompts=prompts)
        return named, reader, reader.read_all(named.rows(raws, self.bad), self.bad)

    def run(self, encoder: RowEncoder, take: Callable[[EncodedRows], object], names: Sequence[str]) -> DataReport:
        """Encode all rows, pass them on in batches, count a DataError as a malformed row, and return the statistics."""
        bad, most = self.bad, self.sources.max_rows
        forms: list[SourceForm] = []
        total = empty = 0
        unread: dict[str, None] = {}
        classes: dict[str, None] = {}
        systems: set[str | None] = set()
        notes: list[str] = []
        skipped_before, kept_before, empty_lines_before = bad.count, len(bad.errors), bad.empty_lines
        empty_rows_before = bad.empty_rows
        for name in expand(names):
            if total == most:
                break
            rows = answered = 0
            empty_sides: set[int] = set()
            bad_before, bad.first_of_file = bad.count, None
            conversation = reads_all = False
            named, reader, read = self.open_file(name)
            for row in self._encode(read, None if most is None else most - total, encoder, take):
                rows += 1
                if bad.garbled is not None and (excerpt := find_mojibake(_text_of(row))):
                    bad.garbled.setdefault(row.source, excerpt)
                answered += not (sides := row.empty_answers)
                empty_sides.update(sides)
                if len(systems) < 2:
                    systems.add(system_of(row, self.system))
                reads_all |= row.reads_all_columns
                conversation |= isinstance(row.parts[0], Conversation)
            if reader.form is None:
                raise _no_rows(name, bad, bad.count - bad_before, reader.explained(bad.first_of_file))
            if self.texts_only and reader.form.reader != "text":
                raise DataError(
                    f"the rows have the form {reader.form.name}, and train_on 'text' reads texts",
                    where=name,
                    next_step="leave out --train-on",
                )
            if self.answers_only and rows and not answered:
                raise _no_answers(name, reader, rows, empty_sides)
            empty += rows - answered
            if not reads_all:
                others = [column for column in reader.columns if column not in (*named.used, self.context_column)]
                unread |= dict.fromkeys(reader.form.unread(others, conversation=conversation))
                classes |= dict.fromkeys(reader.class_columns.names(rows))
            notes += named.notes()
            forms.append(SourceForm(name, reader.form.name, rows))
            total += rows
        if unread:
            labels = [column for column in classes if column in unread]
            if self.refuses_classes and {form.form for form in forms} == {"text"} and labels:
                label, useless = class_of(labels), reader.class_columns.uninformative(rows)
                filled = filter(reader.class_columns.filled, reader.columns)
                if options := suggestion((), filled, {"completion": label}, useless):
                    values = reader.class_columns
                    raise _class_next_to_text(names, label, values, options, prompts=self.allow_prompts)
            several = "s" if len(unread) > 1 else ""
            notes.append(f"not read: the column{several} {name_list(map(shorten, unread))}")
        empty_lines = bad.empty_lines - empty_lines_before
        if empty_lines > max(_FEW_EMPTY_LINES, total):
            notes.append(f"{empty_lines:,} empty lines were skipped")
        return DataReport(
            tuple(forms),
            rows=total,
            empty_answers=empty,
            skipped_bad=bad.count - skipped_before,
            bad_rows=tuple(bad.errors[kept_before:]),
            empty_rows=bad.empty_rows - empty_rows_before,
            system=systems.pop() if len(systems) == 1 else None,
            notes=tuple(notes),
        )

    def _encode(
        self, rows: Iterator[Row], most: int | None, encoder: RowEncoder, take: Callable[[EncodedRows], object]
    ) -> Iterator[Row]:
        """Yield the first `most` valid rows, each after its batch was passed on.

        Errors are raised or counted in the order of the rows.
        """
        bad, done = self.bad, 0
        encoding: deque[list[Row | DataError]] = deque()  # batches that workers encode
        failure: DataError | None = None
        more = True

        def batches() -> Iterator[list[Row]]:
            """Read batches. An error is raised after the rows before it."""
            nonlocal failure, more
            while more and failure is None:
                room = _BATCH_ROWS
                if most is not None:
                    room = min(room, most - done - sum(map(len, encoding)))
                batch: list[Row | DataError] = []
                bad.waiting, characters = batch, 0
                try:
                    while len(batch) < room and characters < _BATCH_CHARACTERS and more:
                        row = next(rows, None)
                        more = row is not None
                        if row is not None:
                            batch.append(row)
                            characters += sum(map(characters_of, row.parts))
                except DataError as error:
                    failure = error
                bad.waiting = None
                if not batch:
                    return
                encoding.append(batch)
                yield [row for row in batch if not isinstance(row, DataError)]

        while more and failure is None and done != most:
            try:
                for result in parallel_map(encoder.encode, batches()):
                    take(result)
                    errors = iter(result.errors)
                    for row in encoding.popleft():
                        error = row if isinstance(row, DataError) else next(errors, result.stopped)
                        if isinstance(error, DataError):
                            bad.add(error)
                        elif error is not None:
                            raise error
                        else:
                            done += 1
                            assert not isinstance(row, DataError)
                            yield row
            except WorkerEndedError as ended:
                raise encoder.renderer.worker_error(ended) from None
        if failure is not None:
            raise failure


def _text_of(row: Row) -> str:
    """Return all texts of a row as one."""
    return "\n".join(
        text.text
        if isinstance(text, PlainText)
        else "\n".join(message["content"] for message in text.messages)
        if isinstance(text, Conversation)
        else f"{text.prompt}\n{text.completion or ''}"
        for text in row.parts
    )


def _no_answers(name: str, reader: FormReader, rows: int, empty_sides: Collection[int]) -> DataError:
    form = reader.form
    assert form is not None
    conversation = form.reader == "conversation"
    others = form.unread(reader.columns, conversation=conversation)
    columns = " and ".join(form.answer_columns)
    what, next_step = f"every answer is empty, in {count_of(rows, 'row')}", "fill in the answers, or leave out the file"
    if len(form.answer_columns) > 1:
        sides = [form.answer_columns[side] for side in sorted(empty_sides)]
        what = f"{' or '.join(sides)} is empty in every pair, in {count_of(rows, 'row')}"
    elif not conversation:
        next_step = f"rename the column of the answers to {columns}, or leave out the file"
    return DataError(
        what,
        where=name,
        why=f"answers are read from {'the replies in ' if conversation else ''}{columns}, since the columns have "
        f"the form {form.name}; other columns: {', '.join(others) or 'none'}",
        next_step=next_step,
    )


def _class_next_to_text(
    names: Sequence[str], label: str, columns: ClassColumns, options: str, *, prompts: bool
) -> DataError:
    """Return the error with the options to add, which are the same for all commands that read answers.

    Args:
        prompts: only prompts are read, so no option names the answer.
    """
    if prompts:
        choices = {
            "to answer about each text": options.rpartition(" --completion ")[0],
            "to continue whole texts": "--prompt '{text}' --chat-template none",
        }
    else:
        choices = {f"if {shorten(label)} is the answer": options}
        if columns.has_decimals(label):
            of_numbers = f"--objective classify {options}"
            choices = {f"to learn the number {shorten(label)}": of_numbers, "to learn its digits as text": options}
        choices |= {"if whole texts are meant": "--train-on text"}
    values = [*map(label_text, columns.values(label))]
    return DataError(
        f"the column text would be read as it is, and {shorten(label)} would not be read",
        where=", ".join(names),
        why=f"{shorten(label)} has few, short values, as a class has: {name_list(values, limit=4)}"
        if columns.has_few(label)
        else f"{shorten(label)} has the name of an answer, and values such as {name_list(values[:4])}",
        next_step="".join(f"\n    - {case}, add: {added}" for case, added in choices.items()),
    )


def _no_rows(name: str, bad: RowErrors, count: int, first: DataError | None) -> DataError:
    in_memory = name.startswith(IN_MEMORY)
    if first is None:
        return DataError(
            "there is no row in the data" if in_memory else "there is no row in the file",
            where=name,
            why=f"{bad.empty_lines:,} empty lines were skipped" if bad.empty_lines else None,
            next_step="give a list of dicts or a data frame with at least one row"
            if in_memory
            else "give a file with one row per line, or leave out the file",
        )
    return DataError(
        f"no row is usable: {count:,} malformed",
        where=name,
        why="; ".join(part for part in (f"the first: {first.where}: {first.what}", first.why) if part),
        next_step=first.next_step or "correct the file; --skip-bad is for a few bad rows among good ones",
    )
