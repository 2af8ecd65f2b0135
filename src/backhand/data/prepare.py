"""From the options to examples: `prepare` for training and evaluation, `prepare_prompts` for generation."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from backhand.bounds import check_fields
from backhand.data import kept_rows
from backhand.data.chat import Document
from backhand.data.columns import ColumnReader
from backhand.data.documents import RowRenderer
from backhand.data.examples import CutRows, DataReport, Example, SourceForm, cut, encode_document
from backhand.data.forms import FormReader
from backhand.data.options import DataOptions, NamedColumns, RowSources, TemplateOptions
from backhand.data.rows import (
    Asked,
    BadRows,
    Conversation,
    Labelled,
    Pair,
    Purpose,
    Row,
    empty_answers,
    system_of,
    texts_of,
)
from backhand.data.sources import expand, held_out_beside, read_rows
from backhand.data.stored_examples import ExampleWriter, PreparedData, overlap, split, summed, usual_share
from backhand.data.text_encoder import TextEncoder, TokenIds
from backhand.errors import DataError, UsageError
from backhand.words import count_of, name_list, shorten


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, and what it should say.

    Attributes:
        input_ids: (tokens,) int32, up to where the reply begins.
        text: the same, as it was rendered, with control tokens.
        reply: what a model should say then, without control tokens: the last reply as the chat template writes it,
            or the completion as it stands; None if the row only asks, or is plain text.
        source: where the row stands.
    """

    input_ids: TokenIds
    text: str
    reply: str | None
    source: str


def prepare(
    options: DataOptions,
    tokenizer: Any,
    *,
    seed: int = 0,
    purpose: Purpose | None = "answers",
    bad: BadRows | None = None,
    cut_rows: CutRows | None = None,
    prompts: list[Prompt] | None = None,
) -> tuple[PreparedData, PreparedData | None]:
    """Training examples, and held-out ones if there are any.

    Held out are, in this order: `eval_data`; a share `eval_fraction` of `data`; the `valid.*` beside a `train.*` when
    `data` names their folder; where no share is given, the usual one, unless answers are rewarded.

    Args:
        purpose: what the rows are for; None where their columns say it, see `forms.detect`.
        bad: gets the malformed rows; made from `skip_bad` if not given.
        prompts: gets the rows of `data` that are in use as prompts, so that a pipe need not be read twice.

    Raises:
        UsageError: an option is out of range, or a package is missing.
        DataError: a file or a row is not as it should be, or nothing in them carries loss.
    """
    options.validate()
    if not options.data:
        raise UsageError("there is no data", where="data", next_step="give --data FILE")
    examples_of = partial(read_examples, options, tokenizer=tokenizer, purpose=purpose, bad=bad, cut_rows=cut_rows)

    def read(names: Sequence[str], *, held_out: bool = False, prompts: list[Prompt] | None = None) -> PreparedData:
        make = partial(examples_of, names, held_out=held_out, prompts=prompts)
        if prompts is not None or bad is not None or cut_rows is not None:
            return make()  # more than examples is wanted
        return kept_rows.kept(make, options, expand(names), tokenizer, names, purpose)

    train = read(options.data, prompts=prompts)
    held_out: PreparedData | None = None
    if options.eval_data:
        held_out = read(options.eval_data, held_out=True)
    elif options.eval_fraction:
        train, held_out = split(train, options.eval_fraction, seed)
    elif beside := held_out_beside(options.data):
        held_out = read(beside, held_out=True)
    elif options.eval_fraction is None and purpose != "prompts" and (share := usual_share(train)):
        train, held_out = split(train, share, seed)
        said = "drawn from the seed; --eval-fraction 0 trains on these as well"
        held_out = held_out.noted(said)
    if held_out is not None:
        shared = overlap(train.examples, held_out.examples)
        if shared:
            held_out = held_out.noted(
                f"warning: {len(shared):,} of {len(held_out.examples):,} held-out documents also stand in the training "
                f"data, for example {shared[0].source}; the held-out loss will look too good"
            )
    return train, held_out


def read_examples(
    options: DataOptions,
    names: Sequence[str],
    tokenizer: Any,
    *,
    held_out: bool = False,
    purpose: Purpose | None = "answers",
    bad: BadRows | None = None,
    cut_rows: CutRows | None = None,
    prompts: list[Prompt] | None = None,
) -> PreparedData:
    """Examples from the files and hub data sets in `names`.

    Args:
        held_out: a hub name without a split means its validation split.

    Raises:
        UsageError, DataError: as `prepare`.
    """
    asked_of = None if prompts is None else RowRenderer(tokenizer, options)
    renderer = RowRenderer(tokenizer, options, train_on_all=options.train_on == "all")
    writer = ExampleWriter()
    bad = BadRows(options.skip_bad) if bad is None else bad
    cut_here = CutRows()

    def kept(made: list[Example], source: str) -> list[Example]:
        if not made:
            cut_here.dropped_unsupervised.append(source)
        return [example for example in (cut(example, options, cut_here) for example in made) if example is not None]

    def asking_for(row: Asked, ids: TokenIds) -> list[Example]:
        if not len(ids):
            raise DataError("the prompt is empty", where=row.source)
        if len(ids) >= options.max_length:
            cut_here.dropped_long.append(row.source)
            return []
        stands_for_answers = np.append(ids, ids[-1]), np.append(np.zeros(len(ids), dtype=np.bool_), True)
        return [Example(*stands_for_answers, row.source, asked=row)]

    def made_of(row: Row, parts: list[list[Example]]) -> list[Example]:
        if isinstance(row, Asked):
            return asking_for(row, parts[0][0].input_ids)
        if not isinstance(row, Pair | Labelled):
            return kept(parts[0], row.source)
        first, *others = (_only(kept(part, row.source), row) for part in parts)
        if first is None or None in others:
            return []
        if isinstance(row, Labelled):
            return [replace(first, desirable=row.desirable)]
        return [replace(first, rejected=others[0])]

    def begin(row: Row) -> Begun:
        texts = texts_of(row)
        if isinstance(row, Asked):
            each = [[renderer.prompt(row.question)[0]]]
        else:
            each = [renderer.documents(text) for text in texts]

        def finish(encoded: list[Example]) -> None:
            left = iter(encoded)
            made = made_of(row, [list(islice(left, len(documents))) for documents in each])
            for example in made:
                writer.add(example)
            if prompts is not None and asked_of is not None and made:
                document, reply = asked_of.prompt(texts[0])
                ids = encode_document(document, asked_of.encoder).input_ids
                prompts.append(_as_prompt(document, ids, reply))

        return [document for documents in each for document in documents], finish

    teaches = options.train_on == "completions" and purpose != "prompts"
    reading = _Reading(options, options, options.system, bad, purpose, held_out=held_out, teaches=teaches)
    report = reading.read_into(begin, renderer.encoder, names)
    notes = list(renderer.notes())
    if report.empty_answers:
        count = f"{count_of(report.empty_answers, 'row')} of {report.rows:,}"
        said = "with an empty answer, which teaches the model to say nothing: fill it in, or take the row out"
        notes.append(f"{count} {said}")
    report = replace(
        report,
        truncated=len(cut_here.truncated),
        dropped_long=len(cut_here.dropped_long),
        dropped_unsupervised=len(cut_here.dropped_unsupervised),
        first_cut=cut_here.firsts,
        system=report.system if renderer.has_template else None,
        notes=(*notes, *report.notes),
    )
    if cut_rows is not None:
        cut_rows.add(cut_here)
    examples = writer.stored()
    if not examples:
        raise _nothing_left(report, names, options)
    return summed(examples, report)


def _only(made: list[Example], row: Pair | Labelled) -> Example | None:
    """The one document of an answer that is compared as a whole; None where it was left out."""
    if len(made) > 1:
        raise DataError(
            "an answer of this row becomes several documents",
            where=row.source,
            why="the chat template rewrites earlier replies, and several of them carry loss",
            next_step="give the earlier turns as the prompt, and the last reply as the answer",
        )
    return made[0] if made else None


def check_first_rows(options: DataOptions) -> None:
    """Raise DataError where the first row of a file has no form that is known: before a model is read for it."""
    reading = _Reading(options, options, options.system, BadRows(options.skip_bad), None)
    for name in filter(os.path.isfile, expand(options.data)):  # a pipe can be read once
        next(reading.of_file(name)[2], None)


def prepare_prompts(
    rows: RowSources, template: TemplateOptions, tokenizer: Any, named: NamedColumns | None = None
) -> tuple[tuple[Prompt, ...], DataReport]:
    """The rows of `data` as prompts with the replies they should get; rows without an answer are welcome.

    Args:
        named: columns by name.

    Raises:
        UsageError, DataError: as `prepare`.
    """
    check_fields(rows)
    check_fields(template)
    renderer = RowRenderer(tokenizer, template)
    prompts: list[Prompt] = []

    def begin(row: Row) -> Begun:
        assert not isinstance(row, Pair | Labelled | Asked)  # of these nothing is asked
        document, reply = renderer.prompt(row)
        return [document], lambda encoded: prompts.append(_as_prompt(document, encoded[0].input_ids, reply))

    bad = BadRows(rows.skip_bad)
    reading = _Reading(rows, named or NamedColumns(), template.system, bad, may_ask=True)
    report = reading.read_into(begin, renderer.encoder, rows.data)
    return tuple(prompts), replace(report, notes=(*renderer.notes(), *report.notes))


def _as_prompt(document: Document, input_ids: TokenIds, reply: str | None) -> Prompt:
    text = document.text if document.mark is None else document.text.replace(document.mark, "")
    return Prompt(input_ids, text, reply, document.source)


_FEW_EMPTY_LINES = 1000


Begun = tuple[list[Document], Callable[[list[Example]], None]]
"""The documents of a row, and what takes them once they are encoded."""

_BATCH_ROWS, _BATCH_CHARACTERS = 512, 2**17
"""Encoded at once, on all cores; a tokenizer takes some three hundred bytes a character."""


def _in_batches(
    rows: Iterator[Row], most: int | None, begin: Callable[[Row], Begun], encoder: TextEncoder, bad: BadRows
) -> Iterator[Row]:
    """The first `most` good rows, each after its documents were given to what takes them.

    Errors come in the order of the rows where the first one ends the reading.
    """
    failure: DataError | None = None
    done, more = 0, True
    while more and failure is None and done != most:
        waiting: list[tuple[Row, Begun]] = []
        characters = 0
        try:
            for _ in range(_BATCH_ROWS if most is None else min(_BATCH_ROWS, most - done)):
                if characters > _BATCH_CHARACTERS or not (more := (row := next(rows, None)) is not None):
                    break
                assert row is not None
                try:
                    waiting.append((row, begin(row)))
                    characters += sum(len(document.text) for document in waiting[-1][1][0])
                except DataError as error:
                    bad.add(error)
        except DataError as error:
            failure = error  # of a row behind those that wait
        encoded = iter(encoder.encode_plain([document for _, (documents, _) in waiting for document in documents]))
        for row, (documents, finish) in waiting:
            pairs = zip(documents, list(islice(encoded, len(documents))), strict=True)
            try:
                finish([encode_document(document, encoder, encoding) for document, encoding in pairs])
            except DataError as error:
                bad.add(error)
                continue
            done += 1
            yield row
    if failure is not None:
        raise failure


@dataclass(frozen=True)
class _Reading:
    """How rows are read, whatever is made of them."""

    sources: RowSources
    named: NamedColumns
    system: str | None
    bad: BadRows
    purpose: Purpose | None = "answers"
    held_out: bool = False
    may_ask: bool = False
    teaches: bool = False  # only answers are learnt, so a file without any is an error

    def of_file(self, name: str) -> tuple[ColumnReader, FormReader, Iterator[Row]]:
        """What reads the columns of a file, what reads its form, and its good rows."""
        named = ColumnReader(self.named, self.system, guess=self.purpose in ("answers", None))
        reader = FormReader(may_ask=self.may_ask, purpose=self.purpose, named=named.given)
        raws = read_rows(name, self.bad, held_out=self.held_out)
        return named, reader, reader.read_all(named.rows(raws, self.bad), self.bad)

    def read_into(self, begin: Callable[[Row], Begun], encoder: TextEncoder, names: Sequence[str]) -> DataReport:
        """Give every good row's documents to what takes them; a DataError counts as a bad row. What was found."""
        bad, most = self.bad, self.sources.max_rows
        forms: list[SourceForm] = []
        total = empty = 0
        unread: dict[str, None] = {}
        classes: set[str] = set()
        systems: set[str | None] = set()
        notes: list[str] = []
        skipped_before, kept_before, empty_lines_before = bad.count, len(bad.errors), bad.empty_lines
        for name in expand(names):
            if total == most:
                break
            rows = answered = 0
            empty_sides: set[int] = set()
            bad_before, bad.first_of_file = bad.count, None
            conversation = rewarded = False
            named, reader, read = self.of_file(name)
            for row in _in_batches(read, None if most is None else most - total, begin, encoder, bad):
                rows += 1
                answered += not (sides := empty_answers(row))
                empty_sides.update(sides)
                if len(systems) < 2:
                    systems.add(system_of(row, self.system))
                rewarded |= isinstance(row, Asked)
                conversation |= isinstance(texts_of(row)[0], Conversation)
            if reader.form is None:
                raise _no_rows(name, bad, bad.count - bad_before)
            if self.teaches and rows and not answered:
                raise _no_answers(name, reader, rows, empty_sides)
            empty += rows - answered
            if not rewarded:  # reward functions are given every column
                others = [column for column in reader.columns if column not in named.used]
                unread |= dict.fromkeys(reader.form.unread(others, conversation=conversation))
                classes.update(reader.beside_text.names(rows))
            if named.note is not None:
                notes.append(named.note)
            forms.append(SourceForm(name, reader.form.name, rows))
            total += rows
        if unread:
            columns = list(unread)
            taught = ""
            labels = [column for column in columns if column in classes]
            if {form.form for form in forms} == {"text"} and len(labels) == 1:
                it = "it" if len(columns) == 1 else labels[0]
                taught = f"; to learn {it} as the answer: --prompt text --completion {shlex.quote(labels[0])}"
            several = "s" if len(columns) > 1 else ""
            notes.append(f"not read: the column{several} {name_list(map(shorten, columns))}{taught}")
        empty_lines = bad.empty_lines - empty_lines_before
        if empty_lines > max(_FEW_EMPTY_LINES, total):
            notes.append(f"{empty_lines:,} empty lines were passed over")
        return DataReport(
            tuple(forms),
            rows=total,
            empty_answers=empty,
            skipped_bad=bad.count - skipped_before,
            bad_rows=tuple(bad.errors[kept_before:]),
            system=systems.pop() if len(systems) == 1 else None,
            notes=tuple(notes),
        )


def _no_answers(name: str, reader: FormReader, rows: int, empty_sides: Collection[int]) -> DataError:
    form = reader.form
    assert form is not None
    conversation = form.kind == "conversation"
    others = form.unread(reader.columns, conversation=conversation)
    columns = " and ".join(form.answer_columns)
    what, next_step = f"every answer is empty, in {count_of(rows, 'row')}", "fill the answers in, or leave the file out"
    if form.kind == "pair":
        sides = [form.answer_columns[side] for side in sorted(empty_sides)]
        what = f"{' or '.join(sides)} is empty in every pair, in {count_of(rows, 'row')}"
    elif not conversation:
        next_step = f"rename the column that holds the answers to {columns}, or leave the file out"
    return DataError(
        what,
        where=name,
        why=f"answers are taken from {'the replies in ' if conversation else ''}{columns}, since the columns have "
        f"the form {form.name}; other columns: {', '.join(others) or 'none'}",
        next_step=next_step,
    )


def _no_rows(name: str, bad: BadRows, count: int) -> DataError:
    first = bad.first_of_file
    if first is None:
        return DataError(
            "there is no row in the file",
            where=name,
            why=f"{bad.empty_lines:,} empty lines were passed over" if bad.empty_lines else None,
            next_step="give a file with a row on each line, or leave it out",
        )
    return DataError(
        f"no row can be used: {count:,} malformed",
        where=name,
        why="; ".join(part for part in (f"the first: {first.where}: {first.what}", first.why) if part),
        next_step=first.next_step or "correct the file; --skip-bad is for a few bad rows among good ones",
    )


def _nothing_left(report: DataReport, names: Sequence[str], options: DataOptions) -> DataError:
    facts = (
        (report.skipped_bad, f"malformed row{'' if report.skipped_bad == 1 else 's'}"),
        (report.dropped_long, "documents longer than max_length"),
        (report.dropped_unsupervised, "without a supervised token"),
        (report.truncated, f"truncated to {options.max_length} tokens"),
    )
    reasons = [f"{count:,} {what}" for count, what in facts if count]
    reasons += [f"the first malformed: {error.where}: {error.what}" for error in report.bad_rows[:1]]
    reasons += report.notes
    if report.truncated or report.dropped_long:
        remedy = "raise --max-length: the replies begin behind it"
    elif report.skipped_bad and not report.dropped_unsupervised:
        remedy = report.bad_rows[0].next_step or "correct the rows"
    else:
        remedy = "the rows need assistant turns (with a weight other than 0), completions, outputs or text"
    return DataError(
        "nothing in the data carries loss", where=", ".join(names), why=", ".join(reasons) or None, next_step=remedy
    )
