"""Vectors of texts, with or without an adapter: `backhand embed` writes them, `backhand mine` finds hard negatives.

A text becomes a vector as in training: prompt, pooling, and normalization to length 1. The adapter's record says how; a
model of sentence-transformers says it in its own files.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from backhand.bounds import check_kind
from backhand.data.columns import column_of_texts
from backhand.data.data_report import TruncationStats, rows_left_out
from backhand.data.embedding_examples import EmbeddingEncoder, EmbeddingFormat, identity
from backhand.data.examples import Example, check_vocabulary
from backhand.data.label_pairs import paired_rows
from backhand.data.options import DataOptions, NamedColumns, RowSources
from backhand.data.packing import RowPacker
from backhand.data.raw_rows import RowErrors
from backhand.data.row_pipeline import RowPipeline
from backhand.data.rows import EmbeddingRow, PoolingName, Purpose, Row, TextIdentities
from backhand.data.sources import expand
from backhand.data.stored_examples import ExampleWriter
from backhand.data.text_encoder import TextEncoder
from backhand.distributed.communicator import Communicator
from backhand.errors import DataError, UsageError, not_none
from backhand.generation.command import check_output, write_lines, write_output
from backhand.generation.completer import EngineCompleter, require_finite
from backhand.generation.loading import LoadedModel, loaded_model
from backhand.loop.retrieval_scores import score_vectors, with_changes
from backhand.loop.row_passes import check_pooling, embed_rows
from backhand.nn.loading.sentence_transformers import read_embedding_files
from backhand.ops.info_nce import BLOCK_SCORES
from backhand.ops.normalize import normalize_forward
from backhand.options.command_options import EmbedOptions, EvaluateRunOptions, MineOptions, VectorOptions
from backhand.printing import counting, in_rounds, say
from backhand.runs.row_changes import SCORE_NAMES, main_score, score_words
from backhand.terminal import console_for_tables, table_of, working
from backhand.words import count_of, shorten, show_notes

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Embedder:
    """A model that computes vectors of texts."""

    loaded: LoadedModel
    pooling: PoolingName
    query_prompt: str
    document_prompt: str
    max_length: int
    micro_batch_rows: int

    @classmethod
    def of(cls, loaded: LoadedModel, options: VectorOptions) -> Embedder:
        """Return the embedder of a loaded model: as the options say, else its adapter, else its own files.

        Raises:
            UsageError: the model cannot compute vectors, or nothing says how.
        """
        if not isinstance(loaded.model, EngineCompleter):
            raise UsageError(
                "vectors need the hidden states of the model, which the transformers engine does not give",
                where="model",
                next_step="choose a model that the backhand engine supports (backhand models)",
            )
        known: Mapping[str, Any] = loaded.embedding
        given = options.pooling, options.query_prompt, options.document_prompt
        if not known and loaded.path is not None and None in given:
            files = read_embedding_files(loaded.path)
            known = {} if files is None else files._asdict()
        if options.pooling is None and not known:
            raise UsageError(
                "neither the adapter nor the model says how a text becomes a vector",
                where="model",
                next_step="give --pooling last or --pooling mean, or --adapter with an adapter of --objective embed",
            )

        def prompt(name: str) -> str:
            value: str | None = getattr(options, name)
            return str(known.get(name, "")) if value is None else value

        pooling = cast("PoolingName", options.pooling or known["pooling"])
        check_pooling(pooling, causal=loaded.model.decoder.config.causal)
        show_notes(_other_than_trained(loaded, options))
        context = loaded.model.context_tokens
        return cls(
            loaded,
            pooling,
            prompt("query_prompt"),
            prompt("document_prompt"),
            min(int(known.get("max_length") or context), context),
            options.micro_batch_rows,
        )

    def vectors(self, texts: Sequence[str], *, queries: bool = False, what: str = "texts") -> Tensor:
        """Return the vectors of texts, (texts, hidden) float32 of length 1.

        Args:
            queries: put the query prompt in front of the texts, instead of the document prompt.
            what: name of the texts in the progress line and in errors.

        Raises:
            DataError: a text has no tokens, or a token that the model does not have.
            CheckError: the model computes NaN or infinity.
        """
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        assert isinstance(model, EngineCompleter)
        prompt = self.query_prompt if queries else self.document_prompt
        encoder = EmbeddingEncoder(TextEncoder(tokenizer), EmbeddingFormat(self.pooling, "", prompt), self.max_length)
        stats, writer = TruncationStats(), ExampleWriter()
        for start in range(0, len(texts), _ROWS_AT_ONCE):
            some = enumerate(texts[start : start + _ROWS_AT_ONCE], start + 1)
            encoded = encoder.encode([EmbeddingRow((text,), None, f"text {n}") for n, text in some], stats)
            for one in encoded:
                if isinstance(one, DataError):
                    raise one
            writer.add_all(one for one in encoded if isinstance(one, Example))
        if stats.truncated:
            show_notes([f"{count_of(len(stats.truncated), 'text')} cut to {self.max_length:,} tokens"])
        examples = writer.stored()
        check_vocabulary(examples.beyond(model.vocab_size), model.vocab_size, tokenizer)
        if not len(examples):
            return torch.zeros(0, model.decoder.config.hidden_size)
        packer = RowPacker(examples, share_prefixes=model.shares_prefixes)
        with counting(what, len(texts)) as done:
            vectors = not_none(
                embed_rows(model.decoder, packer, self.pooling, self.micro_batch_rows, Communicator(), done=done)
            )
        require_finite(vectors)
        return normalize_forward(vectors)[0].float()


def _other_than_trained(loaded: LoadedModel, options: VectorOptions) -> list[str]:
    """Return a note for each given option that differs from the training of the adapter."""
    notes = []
    for name in ("pooling", "query_prompt", "document_prompt"):
        value, trained = getattr(options, name), loaded.embedding.get(name)
        if None not in (value, trained) and value != trained:
            option = "--" + name.replace("_", "-")
            notes.append(
                f"the adapter was trained with {option} {shorten(repr(trained))}, not {option} {shorten(repr(value))}: "
                f"it did not learn these vectors; leave out {option} for those that it learned"
            )
    return notes


def _unused(loaded: LoadedModel, options: EmbedOptions) -> list[str]:
    """Return notes on a prompt that is not used, and on a length for which the adapter was not trained."""
    run, vectors, notes = options.run, options.vectors, []
    if vectors.query_prompt is not None and not run.queries:
        notes.append("--query-prompt is not used, because the texts are no queries: give --queries as well")
    if vectors.document_prompt is not None and run.queries:
        notes.append("--document-prompt is not used, because the texts are queries: leave out --queries")
    lengths = loaded.embedding.get("matryoshka_dims", ())
    if loaded.embedding and run.dims is not None and run.dims not in lengths:
        trained = f"with --matryoshka-dims {' '.join(map(str, lengths))}" if lengths else "without --matryoshka-dims"
        notes.append(f"the adapter was trained {trained}, so vectors cut to {run.dims:,} numbers may rank worse")
    return notes


def embed(options: EmbedOptions) -> Tensor:
    """Return the vectors of the texts of files, (texts, size) float32 of length 1, in the order of the rows.

    Raises:
        UsageError, DataError, ArtifactError: an option, the texts, the model or the adapter cannot be used.
    """
    check_kind("options", options, EmbedOptions)
    options.validate()
    run = options.run
    with loaded_model(options.model, run.adapter) as loaded:
        show_notes([*loaded.notes, *loaded.purpose_notes("embed")])
        embedder = Embedder.of(loaded, options.vectors)
        show_notes(_unused(loaded, options))
        recorded = column_of_texts(loaded.columns, second=not run.queries)
        texts = [row.texts[0] for row in texts_of(options.data, NamedColumns(prompt=run.prompt), "texts", recorded)]
        vectors = embedder.vectors(texts, queries=run.queries)
    if run.dims is None:
        return vectors
    if run.dims > vectors.shape[1]:
        raise UsageError(f"the vectors of this model have {vectors.shape[1]:,} numbers", where="dims")
    return normalize_forward(vectors[:, : run.dims])[0]


def embed_command(options: EmbedOptions) -> Tensor:
    """Run `embed`, and write an array or JSON lines."""
    output = options.run.output
    check_output(output, overwrite=options.run.overwrite)
    with working("embedding"):
        vectors = embed(options)
    if output is not None and output.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, vectors.numpy(), allow_pickle=False)
        write_output(output, buffer.getvalue())
        say(f"{count_of(len(vectors), 'vector')} written to {output}")
        return vectors
    write_lines([{"embedding": vector} for vector in vectors.tolist()], output, "vector")
    return vectors


def rows_of(data: RowSources, named: NamedColumns, purpose: Purpose, recorded: NamedColumns | None = None) -> list[Row]:
    """Return all valid rows of the files.

    Args:
        recorded: columns that an adapter was trained on, see `ColumnReader`.
    """
    bad = RowErrors(data.skip_bad)
    pipeline = RowPipeline(data, named, None, bad, purpose, recorded=recorded)
    rows: list[Row] = []
    for name in expand(data.data):
        columns, _, read = pipeline.open_file(name)
        for row in read:
            if len(rows) == data.max_rows:
                break
            rows.append(row)
        if columns.note is not None:
            show_notes([columns.note])
    show_notes(rows_left_out(bad.count, bad.errors, bad.empty_rows))
    if not rows:
        raise DataError("there is no row", where=", ".join(data.data))
    return rows


def texts_of(
    data: RowSources, named: NamedColumns, purpose: Purpose, recorded: NamedColumns | None = None
) -> list[EmbeddingRow]:
    """Return all valid rows of texts of the files. `recorded` is that of `rows_of`."""
    return [row for row in rows_of(data, named, purpose, recorded) if isinstance(row, EmbeddingRow)]


@dataclass(frozen=True)
class VectorEvaluation:
    """Scores of the vectors of the base model and of the adapted model on the same rows."""

    rows: int  # number of rows
    base: dict[str, Any]  # `retrieval`, see `loop.retrieval_scores`
    adapted: dict[str, Any] | None = None  # None without an adapter

    def as_dict(self) -> dict[str, Any]:
        """Return what `evaluate --vectors --json` prints."""
        return asdict(self)


def evaluate_vectors(loaded: LoadedModel, data: DataOptions, run: EvaluateRunOptions) -> VectorEvaluation:
    """Score the vectors of the base model and, if an adapter is given, of the adapted model on rows.

    Raises:
        UsageError, DataError: an option, the rows or the model cannot be used.
    """
    rows = paired_rows(texts_of(data, data, "embeddings", loaded.columns))
    if len(scored := [row for row in rows if row.score is not None]) not in (0, len(rows)):
        raise DataError(
            f"{len(scored):,} of {len(rows):,} rows have a score, and the others are pairs without one",
            where=scored[0].source,
            next_step="give rows of one form",
        )
    texts = list(dict.fromkeys(text for row in rows for text in row.texts))
    number_of = {text: number for number, text in enumerate(texts)}
    identities = [
        TextIdentities(
            tuple(number_of[text] for text in row.texts), row.score, None if row.label is None else identity(row.label)
        )
        for row in rows
    ]
    # An anchor has another prompt than the same text as a positive. Both texts of another pair are documents.
    asked = list(dict.fromkeys(row.texts[0] for row in rows if _has_query(row)))
    query_of = {text: number for number, text in enumerate(asked)}
    options = VectorOptions(run.pooling, run.query_prompt, run.document_prompt, run.micro_batch_rows)
    embedder = Embedder.of(loaded, options)
    scores = {}
    with in_rounds((False,) if run.adapter is None else (False, True)) as models:
        for adapter in models:
            loaded.model.use_adapter(adapter)
            name = "adapted" if adapter else "base"
            documents = embedder.vectors(texts, what=f"{name} model: texts")
            queries = embedder.vectors(asked, queries=True, what=f"{name} model: anchors")
            vectors = [
                queries[query_of[text]] if _has_query(row) and place == 0 else documents[number_of[text]]
                for row in rows
                for place, text in enumerate(row.texts)
            ]
            scores[name] = score_vectors(identities, torch.stack(vectors))
    return VectorEvaluation(len(rows), *({"retrieval": one} for one in with_changes(scores).values()))


def _has_query(row: EmbeddingRow) -> bool:
    """Return True if the first text of a row is a query, and not a document as the others."""
    return row.score is None and row.label is None


def print_vectors(result: VectorEvaluation) -> None:
    """Print a table of the scores."""
    measured = {"base": result.base["retrieval"]}
    if result.adapted is not None:
        measured["adapted"] = result.adapted["retrieval"]
    names = list(measured["base"]["intervals"])
    of_what = f"{count_of(measured['base']['queries'], 'pair')} with scores"
    if measured["base"]["candidates"]:
        of_what = (
            f"{count_of(measured['base']['queries'], 'anchor')} among {measured['base']['candidates']:,} candidates"
        )
    headings = [SCORE_NAMES[name] for name in names]
    shown = table_of("model", *headings, right=headings, title=f"{of_what}; 95 % intervals in brackets")
    for name, scores in measured.items():
        cells = []
        for score in names:
            low, high = scores["intervals"][score]
            cells.append(f"{scores[score]:.3f} ({low:.3f} to {high:.3f})")
        shown.add_row(name, *cells)
    if chance := measured["base"].get("chance"):
        shown.add_row("random order", *(f"{chance[score]:.3f}" for score in names))
    console_for_tables().print(shown)
    if "adapted" in measured and (main := main_score(measured["adapted"])) is not None:
        words = score_words(measured["base"], measured["adapted"], main)
        console_for_tables().print(words, soft_wrap=True)


def mine(options: MineOptions) -> list[dict[str, str]]:
    """Return the rows with the hardest negatives of each anchor.

    The candidates are all different positives, and the texts of `corpus`. The hardest are those with the highest
    cosine, except positives of the anchor, the anchor itself, and candidates that are nearly as near as the positive
    (`relative_margin`), which are often unlabelled positives [arXiv:2407.15831, §4.2].

    Returns:
        rows with anchor, positive and up to K negatives, in the order of the rows.

    Raises:
        UsageError, DataError, ArtifactError: an option, the rows, the model or the adapter cannot be used.
    """
    check_kind("options", options, MineOptions)
    options.validate()
    run = options.run
    named = NamedColumns(prompt=run.prompt, completion=run.completion)
    expand((*options.data.data, *run.corpus))  # a missing file is reported before the model is loaded
    with loaded_model(options.model, run.adapter) as loaded:
        show_notes([*loaded.notes, *loaded.purpose_notes("embed")])
        rows = texts_of(options.data, named, "embeddings", loaded.columns)
        candidates, anchors = _candidates(rows, run.corpus, loaded), list(dict.fromkeys(row.texts[0] for row in rows))
        embedder = Embedder.of(loaded, options.vectors)
        of_candidates = embedder.vectors(candidates, what="candidates")
        of_anchors = embedder.vectors(anchors, queries=True, what="anchors")
    place_of = {text: place for place, text in enumerate(candidates)}
    positives: dict[str, list[int]] = {}
    for row in rows:
        positives.setdefault(row.texts[0], []).append(place_of[row.texts[1]])
    mined = hardest(
        of_anchors,
        of_candidates,
        [positives[anchor] for anchor in anchors],
        [place_of.get(anchor) for anchor in anchors],
        run.negatives,
        run.relative_margin,
    )
    found = dict(zip(anchors, mined, strict=True))
    return [
        {
            "anchor": row.texts[0],
            "positive": row.texts[1],
            **{f"negative_{n}": candidates[place] for n, place in enumerate(found[row.texts[0]], 1)},
        }
        for row in rows
    ]


def _candidates(rows: Sequence[EmbeddingRow], corpus: Sequence[str], loaded: LoadedModel) -> list[str]:
    """Return the different texts that may be negatives. Raises DataError if rows have a score or a label."""
    if others := [row for row in rows if row.score is not None or row.label is not None]:
        what = "a text with a label" if others[0].score is None else "a pair with a score"
        raise DataError(
            f"{what} has no negatives", where=others[0].source, next_step="give rows of anchor and positive"
        )
    texts = [row.texts[1] for row in rows]
    if corpus:
        recorded = column_of_texts(loaded.columns, second=True)
        texts += [row.texts[0] for row in texts_of(RowSources(data=tuple(corpus)), NamedColumns(), "texts", recorded)]
    return list(dict.fromkeys(texts))


def hardest(
    anchors: Tensor,
    candidates: Tensor,
    positives: Sequence[Sequence[int]],
    own: Sequence[int | None],
    count: int,
    relative_margin: float,
) -> Iterator[list[int]]:
    """Yield the hardest negatives of each anchor, at most `count`, by exact search in blocks of anchors.

    Args:
        anchors, candidates: unit vectors, (anchors, size) and (candidates, size).
        positives: per anchor, its positives among the candidates.
        own: per anchor, the candidate with the same text, or None.
        relative_margin: leave out candidates with a cosine above (1 - margin) times that of the nearest positive.
    """
    size, count = max(1, BLOCK_SCORES // max(1, len(candidates))), min(count, len(candidates))
    for start in range(0, len(anchors), size):
        scores = anchors[start : start + size] @ candidates.T
        for number, of_anchor in enumerate(scores, start):
            right = list(positives[number])
            nearest = float(of_anchor[right].max())
            limit = nearest - relative_margin * abs(nearest)
            of_anchor[of_anchor > limit] = -torch.inf
            same = own[number]
            of_anchor[right if same is None else [*right, same]] = -torch.inf
        best, places = scores.topk(count, dim=1)
        for values, row in zip(best, places, strict=True):
            yield row[values > -torch.inf].tolist()


def mine_command(options: MineOptions) -> list[dict[str, str]]:
    """Run `mine`, and write one JSON object per row, to `output` or to standard output."""
    run = options.run
    check_output(run.output, overwrite=run.overwrite)
    with working("mining"):
        rows = mine(options)
    write_lines(rows, run.output, "row")
    full = sum(len(row) == 2 + run.negatives for row in rows)
    show_notes([f"{full:,} of {count_of(len(rows), 'row')} have {count_of(run.negatives, 'negative')}"])
    return rows
