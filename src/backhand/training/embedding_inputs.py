"""Choices and checks of a run on vectors or rankings that depend on its model and its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from backhand.data.embedding_examples import EmbeddingFormat
from backhand.data.ranking_examples import RankingFormat
from backhand.data.ranking_lint import have_one_target
from backhand.data.row_encoder import TextFormat
from backhand.data.rows import PoolingName, RankedTexts, TextIdentities
from backhand.data.stored_examples import PreparedData
from backhand.engines.decoder_engine import DecoderEngine, with_hidden_states
from backhand.engines.engine import Engine
from backhand.errors import DataError, UsageError, not_none
from backhand.loop.objectives.embed import check_pooling
from backhand.loop.objectives.rank import check_targets
from backhand.nn.decoder.adapted_group import HEAD
from backhand.nn.loading.sentence_transformers import EmbeddingFiles, read_embedding_files
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout
from backhand.options.objectives import ObjectiveOptions


def with_pooling(
    options: ObjectiveOptions, source: ModelSource, engine: Engine, layout: AdapterLayout
) -> ObjectiveOptions:
    """Return the options with pooling and prompts filled in, from the files of the model if they are not given.

    Raises:
        UsageError: the model or the adapter cannot be trained on vectors.
        ArtifactError: the files cannot be read.
    """
    engine = with_hidden_states(engine, "vectors need the hidden states of the model")
    if any(name.startswith(HEAD) for name in layout.names):
        raise UsageError(
            f"the adapter trains {HEAD}, which vectors do not depend on",
            where="target_modules",
            next_step="leave it out of the adapter",
        )
    given = options.pooling, options.query_prompt, options.document_prompt
    files = read_embedding_files(source.path) if None in given else None
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


def check_positions(engine: Engine, longest: int) -> None:
    """Raise UsageError if the longest text has more tokens than an encoder has learned positions."""
    if not isinstance(engine, DecoderEngine) or engine.config.inputs is None:
        return
    positions = engine.config.max_position_embeddings
    if engine.config.inputs.positions is not None and longest > positions:
        raise UsageError(
            f"the longest text has {longest:,} tokens, and the model takes {positions:,}",
            where="max_length",
            next_step=f"give --max-length {positions} or lower",
        )


def check_scores_differ(train: PreparedData) -> None:
    """Raise DataError if the rows rank nothing."""
    if have_one_target(train.examples.facts(RankedTexts)):
        raise DataError(
            "all documents of the rows have the same score, so there is nothing to rank",
            why="a model that says yes to everything has a loss of 0",
            next_step="add negatives, which backhand mine --data FILE finds; or train vectors, which need none: "
            "--objective embed",
        )


def equal_text_notes(options: ObjectiveOptions, train: PreparedData, *, has_dropout: bool) -> tuple[str, ...]:
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


def format_of(options: ObjectiveOptions) -> TextFormat | None:
    """Return the way from texts to tokens of a run on vectors or rankings; None for other objectives."""
    if options.objective == "rank":
        return RankingFormat(options.instruction)
    if options.objective != "embed":
        return None
    prompts = not_none(options.query_prompt), not_none(options.document_prompt)
    return EmbeddingFormat(not_none(options.pooling), *prompts)


def with_loss(options: ObjectiveOptions, train: PreparedData, held_out: PreparedData | None) -> ObjectiveOptions:
    """Return the options with the loss filled in.

    Raises:
        UsageError: an option does not fit the loss.
        DataError: the rows do not fit the loss.
    """
    if options.objective == "rank":
        for data in (train, held_out):
            if data is not None:
                check_targets(options, data.examples)
        return options
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
