"""Scores of documents for queries, with or without an adapter: `backhand rank` writes them.

A score of a decoder is the probability of `yes` against `no` at the end of the prompt, σ(log p(yes) - log p(no)), as
the code of Qwen3-Reranker, vLLM and llama.cpp compute it. The prompt is that of the adapter's training. A score of an
encoder is σ of its head's logit for the pair of query and document, as sentence-transformers computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from backhand.bounds import check_kind
from backhand.data.columns import column_of_texts
from backhand.data.data_report import TruncationStats
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example, check_vocabulary
from backhand.data.options import NamedColumns, RowSources, TemplateOptions, check_ranking_system
from backhand.data.packing import RowPacker
from backhand.data.pair_examples import PairEncoder
from backhand.data.ranking_examples import RankingEncoder, RankingFormat
from backhand.data.rows import INSTRUCTION, RankedTexts, RankingRow
from backhand.data.stored_examples import stored
from backhand.data.text_encoder import TextEncoder
from backhand.distributed.communicator import Communicator
from backhand.errors import DataError, UsageError, not_none
from backhand.generation.command import check_output, write_lines
from backhand.generation.completer import EngineCompleter, require_finite
from backhand.generation.loading import LoadedModel, loaded_model
from backhand.loop.embed import rows_of, texts_of
from backhand.loop.ranking_loss import RankingLoss, check_targets, pair_format, scores_of
from backhand.loop.retrieval_scores import with_changes
from backhand.loop.row_passes import document_sums, head_logits
from backhand.nn.decoder.class_head import has_score_head
from backhand.nn.decoder.decoder import Decoder
from backhand.options.command_options import RankOptions
from backhand.options.objectives import ObjectiveOptions
from backhand.printing import counting, in_rounds
from backhand.terminal import working
from backhand.words import count_of, show_notes

_DOCUMENTS_AT_ONCE = 1024


@dataclass(frozen=True)
class Reranker:
    """A model that scores documents for queries."""

    loaded: LoadedModel
    encoder: RankingEncoder | PairEncoder
    documents: int  # number of documents per forward pass

    @classmethod
    def of(
        cls, loaded: LoadedModel, template: TemplateOptions, documents: int, instruction: str | None = None
    ) -> Reranker:
        """Return the reranker of a loaded model.

        Args:
            instruction: the task; None for that of the adapter's training, or the usual one without an adapter.

        Raises:
            UsageError: the model gives no scores.
        """
        known, context = loaded.ranking, loaded.model.context_tokens
        longest = min(int(known.get("max_length", context)), context)
        if (decoder := _decoder_with_head(loaded)) is not None:
            if instruction is not None:
                raise no_instruction()
            text_format = pair_format(decoder.config, loaded.padding_id)
            return cls(loaded, PairEncoder(TextEncoder(loaded.tokenizer), text_format, longest), documents)
        task = known.get("instruction", INSTRUCTION) if instruction is None else instruction
        encoder = RankingEncoder(RowRenderer(loaded.tokenizer, template), RankingFormat(task), longest)
        return cls(loaded, encoder, documents)

    @property
    def is_blank(self) -> bool:
        """True if the scores are those of a head that the model, as it is now, does not have."""
        model = self.loaded.model
        if not isinstance(self.encoder, PairEncoder) or not isinstance(model, EngineCompleter):
            return False
        return model.decoder.lora is None and not has_score_head(model.decoder)

    def scores(self, rows: Sequence[RankingRow], what: str = "rankings") -> list[list[float]]:
        """Return the scores of the documents of each row before the sigmoid, in nats.

        Args:
            what: name of the scores in the progress line.

        Raises:
            DataError: a query is too long, or a row cannot be rendered.
            CheckError: the model computes NaN or infinity.
        """
        pieces = [
            (number, replace(row, documents=row.documents[start : start + self.documents], targets=()))
            for number, row in enumerate(rows)
            for start in range(0, len(row.documents), self.documents)
        ]
        scores: list[list[float]] = [[] for _ in rows]
        stats = TruncationStats()
        with counting(what, sum(len(row.documents) for row in rows), "texts") as done:
            for part in _parts(pieces):
                examples = self.encoded([row for _, row in part], stats)
                for (number, _), of_piece in zip(part, self._scores(examples, done), strict=True):
                    scores[number] += of_piece
        if stats.truncated:
            show_notes(
                [f"{count_of(len(stats.truncated), 'row')} with a document that was cut, because it is too long"]
            )
        return scores

    def encoded(self, rows: Sequence[RankingRow], stats: TruncationStats) -> list[Example]:
        """Return the examples of rows. Raises DataError as `scores`."""
        examples = []
        for row, example in zip(rows, self.encoder.encode(rows, stats), strict=True):
            if isinstance(example, DataError):
                raise example
            if example is None:
                raise DataError(
                    "the query with its instruction leaves no room for the document",
                    where=row.source,
                    next_step="shorten the query",
                )
            examples.append(example)
        return examples

    def _scores(self, examples: Sequence[Example], done: Callable[[], None]) -> Iterator[list[float]]:
        model, whole = self.loaded.model, stored(examples)
        check_vocabulary(whole.beyond(model.vocab_size), model.vocab_size, self.loaded.tokenizer)
        packer = RowPacker(whole, share_prefixes=model.shares_prefixes)
        counts = [len(example.facts_as(RankedTexts).documents) for example in examples]
        rows, left = max(1, self.documents // max(counts)), iter(counts)

        def on_row() -> None:
            for _ in range(next(left)):
                done()

        if isinstance(self.encoder, PairEncoder):
            assert isinstance(model, EngineCompleter), "other engines have no heads"
            found = not_none(head_logits(model.decoder, packer, rows, Communicator(), done=on_row)).squeeze(1)
        else:
            every = range(len(examples))
            sums = document_sums(model, packer, every, rows, Communicator(), exact=True, on_row=on_row)
            found = scores_of(not_none(sums))
        require_finite(found)
        return iter([part.tolist() for part in found.split(counts)])


def _decoder_with_head(loaded: LoadedModel) -> Decoder | None:
    """Return the model if a head gives its scores; None if its answers do.

    Raises:
        UsageError: the head gives labels, or there is no head on an encoder.
    """
    model, labels = loaded.model, loaded.classification.get("labels", ())
    if not isinstance(model, EngineCompleter) or (model.decoder.config.causal and not labels):
        return None
    if loaded.objective == "classify" or len(labels) > 1:
        raise UsageError(
            "the head of this adapter gives labels or a number, and no scores of documents",
            where="adapter",
            next_step="give an adapter of --objective rank, or use backhand classify",
        )
    if not labels and not has_score_head(model.decoder):
        raise UsageError(
            "this encoder has no score head",
            where="model",
            why="the scores of an encoder are the logits of a head with one output",
            next_step="give --adapter with an adapter of --objective rank, or a cross-encoder as --model",
        )
    return model.decoder


def no_instruction() -> UsageError:
    """Return the error for an instruction to a cross-encoder."""
    return UsageError(
        "an instruction is given, but an encoder reads query and document alone",
        where="instruction",
        next_step="leave it out, or write it into the queries",
    )


def _parts(pieces: Sequence[tuple[int, RankingRow]]) -> Iterator[list[tuple[int, RankingRow]]]:
    """Yield the pieces in parts that are encoded at once."""
    part: list[tuple[int, RankingRow]] = []
    documents = 0
    for piece in pieces:
        part.append(piece)
        documents += len(piece[1].documents)
        if documents >= _DOCUMENTS_AT_ONCE:
            yield part
            part, documents = [], 0
    if part:
        yield part


def evaluate_rankings(
    loaded: LoadedModel,
    data: RowSources,
    named: NamedColumns,
    template: TemplateOptions,
    documents: int,
    *,
    adapted: bool,
) -> tuple[int, list[tuple[float, int, dict[str, Any] | None]]]:
    """Score the rankings of the base model and, if an adapter is loaded, of the adapted one, on rows with targets.

    Args:
        adapted: True if an adapter is loaded.

    Returns:
        the number of rows; and per model the mean loss of a row, the number of documents, and the scores
        (`loop.ranking_scores`). An encoder without a head gives all documents the same score and has no such scores.

    Raises:
        UsageError, DataError: the rows cannot be read, or do not fit the loss of the adapter's training;
            or a system message is given.
    """
    check_ranking_system(template.system)
    rows = [row for row in rows_of(data, named, "rankings", loaded.columns) if isinstance(row, RankingRow)]
    options = ObjectiveOptions(
        "rank",
        ranking_loss=loaded.ranking.get("ranking_loss", "pointwise"),
        positive_weight=loaded.ranking.get("positive_weight", 1.0),
    )
    reranker = Reranker.of(loaded, template, documents)
    examples = stored(reranker.encoded(rows, TruncationStats()))
    check_targets(options, examples)
    ranking_loss, every, losses, scored = RankingLoss(examples, options), range(len(rows)), {}, {}
    with in_rounds((False, True) if adapted else (False,)) as models:
        for adapter in models:
            loaded.model.use_adapter(adapter)
            name = "adapted" if adapter else "base"
            scores = torch.zeros(sum(len(row.documents) for row in rows), dtype=torch.float64)
            if not reranker.is_blank:
                by_row = reranker.scores(rows, f"{name} model: rankings")
                scores = torch.tensor([score for row in by_row for score in row], dtype=torch.float64)
                scored[name] = ranking_loss.scored(every, scores)
            losses[name] = float(ranking_loss.of_scores(every, scores).losses.mean())
    figures = with_changes(scored)
    return len(rows), [(loss, len(scores), figures.get(name)) for name, loss in losses.items()]


def rank(options: RankOptions) -> list[dict[str, Any]]:
    """Score the documents of rows, or rank the texts of files for one query.

    Returns:
        per row `{"score": …}`, or `{"scores": […]}` for a list of documents. With a query, per text `index`,
        `relevance_score` and `document`, the most relevant first.

    Raises:
        UsageError, DataError, ArtifactError: an option, the rows, the model or the adapter cannot be used.
    """
    check_kind("options", options, RankOptions)
    options.validate()
    run = options.run
    named = NamedColumns(prompt=run.prompt, completion=run.completion)
    with loaded_model(options.model, run.adapter, template=options.template, takes_heads=True) as loaded:
        show_notes([*loaded.notes, *loaded.purpose_notes("rank")])
        reranker = Reranker.of(loaded, options.template, run.micro_batch_rows, run.instruction)
        if run.query is None:
            read = rows_of(options.data, named, "candidates", loaded.columns)
            rows = [row for row in read if isinstance(row, RankingRow)]
            return [
                {"scores": of_row} if row.listed else {"score": of_row[0]}
                for of_row, row in zip(map(_probabilities, reranker.scores(rows)), rows, strict=True)
            ]
        texts = [
            row.texts[0] for row in texts_of(options.data, named, "texts", column_of_texts(loaded.columns, second=True))
        ]
        (scores,) = reranker.scores([RankingRow(run.query, tuple(texts), (), "query")])
    order = sorted(range(len(texts)), key=lambda number: (-scores[number], number))
    probabilities = _probabilities(scores)
    return [
        {"index": number, "relevance_score": probabilities[number], "document": texts[number]}
        for number in order[: run.top]
    ]


def _probabilities(scores: Sequence[float]) -> list[float]:
    return [float(p) for p in torch.tensor(scores, dtype=torch.float64).sigmoid()]


def rank_command(options: RankOptions) -> list[dict[str, Any]]:
    """Run `rank`, and write one JSON object per line, to `output` or to standard output."""
    check_output(options.run.output, overwrite=options.run.overwrite)
    with working("ranking"):
        lines = rank(options)
    write_lines(lines, options.run.output, "line")
    return lines
