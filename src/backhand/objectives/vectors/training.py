"""Training of vectors of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np

from backhand.data.data_report import DataReport
from backhand.data.embedding_examples import EmbeddingFormat
from backhand.data.examples import Example
from backhand.data.rows import PoolingName, TextIdentities
from backhand.data.stored_examples import PreparedData, with_totals
from backhand.engines.decoder_engine import with_hidden_states
from backhand.errors import DataError, UsageError, not_none
from backhand.loop.row_passes import check_pooling
from backhand.nn.decoder.adapted_group import HEAD
from backhand.nn.loading.sentence_transformers import EmbeddingFiles, read_embedding_files
from backhand.objectives.vectors.held_out import HeldOutEmbeddings
from backhand.objectives.vectors.loss import EmbedObjective
from backhand.options.objectives import ObjectiveOptions
from backhand.runs.summary import RunSummary
from backhand.training.hooks import KnownModel, KnownRows, Losses, RunContext, Training
from backhand.training.starting_adapter import StartingAdapter, shown_option

_OF_VECTORS = ("pooling", "query_prompt", "document_prompt", "matryoshka_dims")
"""Options of `embed` that the record of an adapter contains."""


class EmbedTraining(Training):
    """Training of vectors."""

    def with_model(self, model: KnownModel) -> KnownModel:
        options, notes = model.config.objective, model.notes
        if model.start is not None:
            options, said = _of_adapter(options, model.start, model.typed)
            notes = (*notes, *said)
        options = _with_pooling(options, model)
        prompts = not_none(options.query_prompt), not_none(options.document_prompt)
        text_format = EmbeddingFormat(not_none(options.pooling), *prompts)
        return replace(model, config=replace(model.config, objective=options), text_format=text_format, notes=notes)

    def assumed_rows(self, model: KnownModel, row: Example, count: int) -> PreparedData:
        options, length = model.config.objective, len(row)
        if options.pooling == "last":
            row = replace(row, supervised=np.arange(length) == length - 1)
        texts = 3 if options.embedding_loss == "triplet" else 2

        def text(number: int) -> Example:  # no two texts begin alike, so that none share a prefix
            return replace(row, input_ids=np.full(length, number, dtype=np.int32))

        identities = TextIdentities(tuple(range(texts)), None)
        rows = [[text(number * texts + place) for place in range(texts)] for number in range(count)]
        examples = [replace(first, others=tuple(others), facts=identities) for first, *others in rows]
        note = f"a row has {texts} texts, and each further negative adds one"
        return with_totals(examples, DataReport()).with_note(note)

    def with_rows(self, rows: KnownRows) -> KnownRows:
        options = _with_loss(rows.config.objective, rows.train, rows.held_out)
        notes = _equal_text_notes(options, rows.train, has_dropout=rows.has_dropout)
        config = replace(rows.config, objective=options)
        return replace(rows, config=config, notes=(*rows.notes, *notes))

    def losses(self, run: RunContext) -> Losses:
        options, packer = run.config.objective, run.inputs.held_out_packer
        train = EmbedObjective(run.inputs.packer, options=options)
        if packer is None:
            return Losses(train)
        held_out = EmbedObjective(packer, options=options)
        return Losses(train, HeldOutEmbeddings(held_out, run.micro_batch_rows, run.caches.held_out))

    def scores(self, run: RunContext, losses: Losses, summary: RunSummary) -> dict[str, Any]:
        assert isinstance(losses.held_out, HeldOutEmbeddings)
        tokenizer = run.inputs.source.tokenizer()
        return losses.held_out.scores(run.bound, tokenizer, run.config.run.answers, run.start.values)


def _of_adapter(
    given: ObjectiveOptions, start: StartingAdapter, typed: frozenset[str]
) -> tuple[ObjectiveOptions, tuple[str, ...]]:
    """Return the options with the adapter's own way from a text to its vector, and notes on what differs from it.

    Raises:
        UsageError: another pooling is given.
    """
    known: Mapping[str, Any] = {} if start.contents.record is None else start.contents.record.embedding
    if not known:
        return given, ()
    notes, taken = [], {name: value for name in _OF_VECTORS if (value := known.get(name)) is not None}
    if "matryoshka_dims" in taken:
        taken["matryoshka_dims"] = tuple(taken["matryoshka_dims"])
    for name, stored in list(taken.items()):
        value = getattr(given, name)
        if (not value and name not in typed) or value == stored:
            continue
        if name == "pooling":
            raise UsageError(
                f"{start.origin} differs from the options given: pooling: {stored!r} in the adapter, {value!r} given",
                where="from_adapter",
                why="its vectors are those of its own pooling",
                next_step="leave out --pooling, or leave out --from-adapter for a fresh adapter",
            )
        option = "--" + name.replace("_", "-")
        notes.append(
            f"the adapter was trained with {option} {shown_option(stored)}, and goes on with {shown_option(value)}"
        )
        taken[name] = value
    return replace(given, **taken), tuple(notes)


def _with_pooling(options: ObjectiveOptions, model: KnownModel) -> ObjectiveOptions:
    """Return the options with pooling and prompts filled in, from the files of the model if they are not given.

    Raises:
        UsageError: the model or the adapter cannot be trained on vectors.
        ArtifactError: the files cannot be read.
    """
    engine = with_hidden_states(model.engine, "vectors need the hidden states of the model")
    if any(name.startswith(HEAD) for name in model.layout.names):
        raise UsageError(
            f"the adapter trains {HEAD}, which vectors do not depend on",
            where="target_modules",
            next_step="leave it out of the adapter",
        )
    given = options.pooling, options.query_prompt, options.document_prompt
    files = read_embedding_files(model.source.path) if None in given else None
    files = files or EmbeddingFiles("last" if engine.config.causal else "mean", "", "")
    options = replace(
        options,
        pooling=options.pooling or cast("PoolingName", files.pooling),
        query_prompt=files.query_prompt if options.query_prompt is None else options.query_prompt,
        document_prompt=files.document_prompt if options.document_prompt is None else options.document_prompt,
    )
    check_pooling(not_none(options.pooling), causal=engine.config.causal)
    width = engine.config.hidden_size
    if any(size >= width for size in options.matryoshka_dims):
        raise UsageError(
            f"the vectors of this model have {width:,} numbers, and cannot be cut to {max(options.matryoshka_dims):,}",
            where="matryoshka_dims",
            next_step="give smaller lengths; the whole vector is always trained",
        )
    return options


def _equal_text_notes(options: ObjectiveOptions, train: PreparedData, *, has_dropout: bool) -> tuple[str, ...]:
    """Return a note if every positive is its anchor, whose vectors then differ by dropout alone.

    Args:
        options: with the prompts, which distinguish both if they differ.

    Raises:
        DataError: there is no dropout.
    """
    rows = train.examples.facts(TextIdentities)
    alike = all(row.score is None and row.texts[0] == row.texts[1] for row in rows)
    if not alike or options.query_prompt != options.document_prompt:
        return ()
    if not has_dropout:
        raise DataError(
            "every positive is its anchor",
            where=train.report.sources[0].source,
            why="without dropout both have the same vector, and nothing is learned from the pair",
            next_step="give --dropout 0.1, which draws other masks for the positive than for the anchor (SimCSE), "
            "or other positives",
        )
    return ("every positive is its anchor: their vectors differ by the masks of dropout, as in SimCSE",)


def _with_loss(options: ObjectiveOptions, train: PreparedData, held_out: PreparedData | None) -> ObjectiveOptions:
    """Return the options with the loss filled in.

    Raises:
        UsageError: an option does not fit the loss.
        DataError: the rows do not fit the loss.
    """
    sets = [data.examples for data in (train, held_out) if data is not None]
    rows = [row for examples in sets for row in examples.facts(TextIdentities)]
    scored = [row.score is not None for row in rows]
    loss = options.embedding_loss or ("cosent" if all(scored) else "infonce")
    if {*scored} != {loss == "cosent"}:
        raise DataError(
            f"{sum(scored):,} of {len(scored):,} rows have a score, and {loss} compares "
            + ("pairs with a score" if loss == "cosent" else "anchors with positives"),
            where=train.report.sources[0].source,
            next_step="give rows of one form, or another --embedding-loss",
        )
    if loss == "triplet" and any(len(row.texts) < 3 for row in rows):
        raise DataError(
            "a row has no negative, and triplet compares positives with negatives",
            where=train.report.sources[0].source,
            next_step="add a column negative, or give --embedding-loss infonce",
        )
    trained = rows[: len(train.examples)]
    labels = {row.label for row in trained}
    if labels != {None} and len(labels) == 1:
        raise DataError(
            "all texts have the same label, so that no text has a negative",
            where=train.report.sources[0].source,
            why="texts with the same label are no negatives of each other",
            next_step="add texts with other labels",
        )
    held_out_labels = {row.label for row in rows[len(trained) :]}
    if len(held_out_labels) == 1 and held_out_labels != {None}:
        raise DataError(
            "all held-out texts have the same label, so that no text has a negative",
            where=not_none(held_out).examples[0].source,
            why="their loss is 0 for every model, and chooses no step",
            next_step="give a larger --eval-fraction, or 0 for no held-out rows, or --eval-data with several labels",
        )
    if (None in labels) != any(row.label is None for row in rows):
        raise DataError(
            "training and held-out rows have different forms: texts with a label, and pairs",
            where=train.report.sources[0].source,
            next_step="give rows of one form",
        )
    if loss in ("infonce", "symmetric") and len({text for row in trained for text in row.texts[1:]}) == 1:
        raise DataError(
            "all rows have the same positive, so that no anchor has a negative",
            where=train.report.sources[0].source,
            why="loss and gradient are zero without negatives",
            next_step="add rows with other positives, or a column negative",
        )
    return replace(options, embedding_loss=loss).validate()
