"""Prepare rows: `prepare` makes examples for training and evaluation, `prepare_prompts` prompts for generation."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from backhand.bounds import check_fields
from backhand.data import prepared_cache
from backhand.data.context import TeacherPrompts
from backhand.data.data_report import DataReport, TruncationStats
from backhand.data.decisions import Question
from backhand.data.documents import RowRenderer
from backhand.data.held_out import default_held_out_share, overlap, split
from backhand.data.options import DataOptions, NamedColumns, RowSources, TemplateOptions, no_data
from backhand.data.raw_rows import RowErrors
from backhand.data.row_encoder import EncodedRows, Prompt, RowEncoder, TextFormat
from backhand.data.row_kind import SettleContext, row_kind
from backhand.data.row_pipeline import RowPipeline
from backhand.data.rows import Purpose
from backhand.data.sources import expand, neighbouring_held_out, read_rows
from backhand.data.stored_examples import ExampleWriter, PreparedData, count_sources, with_totals
from backhand.errors import DataError
from backhand.words import count_of


def prepare(
    options: DataOptions,
    tokenizer: Any,
    *,
    seed: int = 0,
    purpose: Purpose | None = "answers",
    bad: RowErrors | None = None,
    truncation: TruncationStats | None = None,
    prompts: list[Prompt] | None = None,
    questions: Mapping[str, Question] | None = None,
    text_format: TextFormat | None = None,
    teacher: TeacherPrompts | None = None,
    recorded: NamedColumns | None = None,
    epochs: int = 1,
) -> tuple[PreparedData, PreparedData | None]:
    """Return training examples, and held-out examples or None.

    The held-out examples are the first of these that exists:

    1. `eval_data`;
    2. a share `eval_fraction` of `data`;
    3. the `valid.*` next to a `train.*`, when `data` names their folder;
    4. the default share of `data`, unless `eval_fraction` is 0 or answers are rewarded.

    Args:
        purpose: use of the rows; None to detect it from their columns (`forms.detect`).
        bad: collects malformed rows; by default it follows `skip_bad`.
        truncation: collects the locations of truncated and dropped documents.
        prompts: collects the rows of `data` in use as prompts, so that a pipe is read only once.
        questions: the questions of decisions; None to find them in the rows of `data`, which are then rows to train on
            (`DecisionEncoder.for_training`).
        text_format: from texts to tokens, for rows of embeddings, rankings or classes; None for other rows.
        teacher: the prompts of the teacher in distillation. Each example then has a second document, `rejected`, with
            the teacher's prompt and the same answer, or with a placeholder for an answer that is sampled later.
        recorded: columns that an adapter was trained on, see `ColumnReader`.
        epochs: number of passes over the rows. Each shows the options of decisions in random orders of its own.

    Raises:
        UsageError: an option is out of range, or a package is missing.
        DataError: a file or a row is malformed, or no row carries loss.
    """
    options.validate()
    if not options.data:
        raise no_data()
    kind = row_kind(purpose)
    found = questions or kind.find_questions(options, recorded)
    examples_of = partial(
        read_examples,
        options,
        tokenizer=tokenizer,
        purpose=purpose,
        bad=bad,
        truncation=truncation,
        questions=found,
        text_format=text_format,
        teacher=teacher,
        recorded=recorded,
    )

    def read(names: Sequence[str], *, held_out: bool = False, prompts: list[Prompt] | None = None) -> PreparedData:
        make = partial(examples_of, names, held_out=held_out, prompts=prompts)
        if prompts is not None or bad is not None or truncation is not None:
            return make()  # the cache holds only examples
        further = names, purpose, teacher, text_format, recorded
        return prepared_cache.cached(make, options, expand(names), tokenizer, *further)

    train = read(options.data, prompts=prompts)
    held_out: PreparedData | None = None
    if options.eval_data:
        held_out = read(options.eval_data, held_out=True)
    elif options.eval_fraction:
        train, held_out = split(train, options.eval_fraction, seed)
    elif held_out_files := neighbouring_held_out(options.data):
        held_out = read(held_out_files, held_out=True)
    elif options.eval_fraction is None and kind.has_answers and (share := default_held_out_share(train)):
        train, held_out = split(train, share, seed)
        held_out = held_out.with_note("drawn at random with the seed; to train on these too, give --eval-fraction 0")
    if held_out is not None:
        shared = overlap(train.examples, held_out.examples)
        if shared:
            held_out = replace(held_out, report=replace(held_out.report, repeated=len(shared))).with_note(
                f"warning: {len(shared):,} of {len(held_out.examples):,} held-out documents also occur in the training "
                f"data, for example {shared[0].source}; the held-out loss will be too low"
            )
    context = SettleContext(options, tokenizer, seed, epochs, found, questions is None, text_format)
    return kind.settle(train, held_out, context)


def read_examples(
    options: DataOptions,
    names: Sequence[str],
    tokenizer: Any,
    *,
    held_out: bool = False,
    purpose: Purpose | None = "answers",
    bad: RowErrors | None = None,
    truncation: TruncationStats | None = None,
    prompts: list[Prompt] | None = None,
    questions: Mapping[str, Question] | None = None,
    text_format: TextFormat | None = None,
    teacher: TeacherPrompts | None = None,
    recorded: NamedColumns | None = None,
) -> PreparedData:
    """Return the examples of the files and hub data sets in `names`.

    Args:
        held_out: for a hub name without a split, read the validation split.
        questions: the questions of rows of decisions that do not contain their own.
        recorded: see `prepare`.

    Raises:
        UsageError, DataError: as `prepare`.
    """
    kind = row_kind(purpose)
    options = kind.template_options(options, tokenizer)
    renderer = RowRenderer(tokenizer, options, train_on_all=options.train_on == "all")
    encoder = RowEncoder(
        renderer, options, None if prompts is None else RowRenderer(tokenizer, options), teacher, text_format
    )
    writer = ExampleWriter()
    bad = RowErrors(options.skip_bad) if bad is None else bad
    stats = TruncationStats()

    def take(rows: EncodedRows) -> None:
        writer.add_all(rows.examples)
        stats.add(rows.truncation)
        renderer.add_counts(rows.counts)
        if prompts is not None:
            prompts.extend(rows.prompts)

    prompts_suffice = teacher is not None and teacher.sampled and teacher.context is not None
    answers_only = options.train_on == "completions" and kind.has_answers and not prompts_suffice
    pipeline = RowPipeline(
        options,
        options,
        options.system,
        bad,
        purpose,
        held_out=held_out,
        allow_prompts=prompts_suffice,
        answers_only=answers_only,
        questions=questions,
        refuses_classes=answers_only and kind.by_document,
        texts_only=options.train_on == "text",
        recorded=recorded,
        context_column=None if teacher is None else teacher.column,
    )
    report = pipeline.run(encoder, take, names)
    notes = list(renderer.notes())
    if report.empty_answers:
        count = f"{count_of(report.empty_answers, 'row')} of {report.rows:,}"
        notes.append(
            f"{count} with an empty answer, which teaches the model to answer nothing: fill it in, or remove the row"
        )
    stats = stats if kind.by_document else stats.of_rows()
    report = replace(
        report,
        cut_unit="document" if kind.by_document else "row",
        truncated=len(stats.truncated),
        dropped_long=len(stats.dropped_long),
        dropped_unsupervised=len(stats.dropped_unsupervised),
        first_cut=stats.firsts,
        system=report.system if renderer.has_template else None,
        bare=renderer.all_bare,
        notes=(*notes, *report.notes),
    )
    if truncation is not None:
        truncation.add(stats)
    examples = writer.stored()
    if not examples:
        raise _nothing_left(report, names, options, stats.needed)
    if stats.dropped_long or stats.dropped_unsupervised:
        report = replace(report, rows=count_sources(examples))
    train = with_totals(examples, report)
    if len(stats.dropped_long) > train.report.kept:
        keeps = f"--max-length {_keeping(stats.needed)} keeps at least {_MOST_KEPT:.0%} of them"
        note = f"warning: {train.report.too_long()}; {keeps}"
        return replace(train, report=replace(train.report, notes=(*train.report.notes, note)))
    return train


def check_first_rows(options: DataOptions, purpose: Purpose | None = None) -> None:
    """Raise DataError if the first row of a file has no known form. It runs before the model is loaded."""
    pipeline = RowPipeline(options, options, options.system, RowErrors(options.skip_bad), purpose)
    for name in filter(os.path.isfile, expand(options.data)):  # a pipe can be read only once
        next(pipeline.open_file(name)[2], None)


def check_readable(options: DataOptions) -> None:
    """Read the first rows of each file, so that a fault of them is reported before a refused output.

    Raises:
        UsageError, DataError: as `prepare`, except for the form of the rows.
    """
    if not options.data:
        raise no_data()
    for name in expand((*options.data, *options.eval_data)):
        if Path(name).is_file():
            for _ in islice(read_rows(name, RowErrors(options.skip_bad)), _READ_FIRST):
                pass


_READ_FIRST = 10_000


def prepare_prompts(
    rows: RowSources,
    template: TemplateOptions,
    tokenizer: Any,
    named: NamedColumns | None = None,
    teacher: TeacherPrompts | None = None,
    recorded: NamedColumns | None = None,
    purpose: Purpose = "answers",
) -> tuple[tuple[Prompt, ...], DataReport]:
    """Return the rows of `data` as prompts with their reference replies. Rows without an answer are allowed.

    Args:
        named: columns given by name.
        teacher, recorded: as in `prepare`.
        purpose: `labelled` for rows of `kto`, whose undesirable answers are no references.

    Raises:
        UsageError, DataError: as `prepare`.
    """
    check_fields(rows)
    check_fields(template)
    renderer = RowRenderer(tokenizer, template)
    prompts: list[Prompt] = []

    def take(encoded: EncodedRows) -> None:
        prompts.extend(encoded.prompts)
        renderer.add_counts(encoded.counts)

    bad = RowErrors(rows.skip_bad)
    pipeline = RowPipeline(
        *(rows, named or NamedColumns(), template.system, bad),
        purpose=purpose,
        allow_prompts=True,
        refuses_classes=True,
        recorded=recorded,
    )
    report = pipeline.run(RowEncoder(renderer, None, renderer, teacher), take, rows.data)
    return tuple(prompts), replace(report, notes=(*renderer.notes(), *report.notes))


_MOST_KEPT = 0.9
"""Share of the rows that the suggested `max_length` keeps, if all or most are too long."""


def _keeping(needed: Sequence[int]) -> int:
    """Return a `max_length` that keeps most of the documents that are too long."""
    return sorted(needed)[math.ceil(_MOST_KEPT * len(needed)) - 1]


def _nothing_left(report: DataReport, names: Sequence[str], options: DataOptions, needed: Sequence[int]) -> DataError:
    where = ", ".join(names)
    if report.dropped_long and not (report.skipped_bad or report.dropped_unsupervised or report.truncated):
        shortest, longest = min(needed), max(needed)
        cut = report.cut_unit == "document" and options.long_rows == "truncate"
        return DataError(
            f"all {report.cut_unit}s are longer than max_length {options.max_length}",
            where=where,
            why=("" if shortest == longest else f"{shortest:,} to ")
            + f"{longest:,} tokens"
            + "; cut at max_length, they have nothing left to learn" * cut,
            next_step=f"give --max-length {_keeping(needed)}, which keeps at least {_MOST_KEPT:.0%} of them",
        )
    facts = (
        (report.skipped_bad, f"malformed row{'' if report.skipped_bad == 1 else 's'}"),
        (report.dropped_long, f"{report.cut_unit}s longer than max_length"),
        (report.dropped_unsupervised, "without a supervised token"),
        (report.truncated, f"truncated to {options.max_length} tokens"),
    )
    reasons = [f"{count:,} {what}" for count, what in facts if count]
    reasons += [f"the first malformed: {error.where}: {error.what}" for error in report.bad_rows[:1]]
    reasons += report.notes
    if report.truncated or report.dropped_long:
        remedy = "raise --max-length"
    elif report.skipped_bad and not report.dropped_unsupervised:
        remedy = report.bad_rows[0].next_step or "correct the rows"
    else:
        remedy = "the rows need assistant turns (with a weight other than 0), completions, outputs or text"
    return DataError("nothing in the data carries loss", where=where, why=", ".join(reasons) or None, next_step=remedy)
