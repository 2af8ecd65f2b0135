"""Held-out rows of vectors: their loss in batches of a fixed size, and their scores over all rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from backhand.data.embedding_examples import EmbeddingFormat
from backhand.data.text_encoder import TextEncoder
from backhand.distributed.communicator import Communicator, sequential_sum
from backhand.engines.engine import BoundModel, Trainable, computing_with
from backhand.errors import CheckError, not_none
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.measuring import HeldOut
from backhand.loop.retrieval_scores import VectorScores, score_vectors, summary_scores
from backhand.loop.row_passes import embed_rows
from backhand.nn.decoder.decoder import Decoder
from backhand.objectives.vectors.changes import (
    SHOWN_LETTERS,
    cosine_histogram,
    drift,
    first_documents,
    nearest_texts,
    neutral_packer,
)
from backhand.objectives.vectors.loss import EmbedObjective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NEUTRAL_TOKENS = 128

EVALUATED_ROWS = 64
"""Largest number of held-out rows whose texts are negatives of each other in the loss.

It is the same for every run. With more negatives the loss is higher, so that the losses of runs that differ in
`batch_rows` could not be compared.
"""

COLLAPSED = 0.9999
"""Mean cosine of different texts from which their vectors are useless, because all of them are the same."""


class HeldOutEmbeddings(HeldOut):
    """Held-out rows under a loss of vectors.

    Args:
        objective: the objective of these rows.
        micro_batch_rows: number of rows per forward pass.
        hidden_states: cache of the rows' hidden states.
    """

    def __init__(
        self,
        objective: EmbedObjective,
        micro_batch_rows: int,
        hidden_states: HiddenStateCache | None = None,
    ) -> None:
        super().__init__(objective.packer.examples, micro_batch_rows, hidden_states)
        self.objective = objective
        self._was_apart = False

    def loss(self, model: Trainable, processes: Communicator, *, interruptible: bool = True) -> float | None:
        """Return the mean loss of a row, or None if the evaluation was interrupted.

        Raises:
            CheckError: the vectors have collapsed since the first evaluation.
        """
        embeddings = embed_rows(
            model,
            self.objective.packer,
            self.objective.pooling,
            self._micro_batch_rows,
            processes,
            hidden_states=self._hidden_states,
            interruptible=interruptible,
        )
        if embeddings is None:
            return None
        # As in training, no batch is much smaller than the others: a row needs other rows as negatives.
        batches = np.array_split(np.arange(len(self._examples)), -(-len(self._examples) // EVALUATED_ROWS))
        losses = [loss for rows in batches for loss in self._losses(rows.tolist(), embeddings)]
        scores = self._scores(embeddings)
        self._check(scores.mean_cosine)
        self.measured = {f"eval_{name}": value for name, value in scores.values.items()}
        self.measured["eval_cosine/all"] = scores.mean_cosine
        return sequential_sum(losses) / len(self._examples)

    def scores(
        self, bound: BoundModel, tokenizer: PreTrainedTokenizerFast, shown: int, start: Tensor | None = None
    ) -> dict[str, Any]:
        """Return the fields of summary.json on these rows, before the run and of the adapted model.

        Args:
            bound: the model with the adapter to measure, which is attached again afterwards.
            tokenizer: of the model.
            shown: number of anchors whose nearest texts are listed.
            start: values of the adapter that the run started from; None for the base model.
        """
        examples, identities = self._examples, self.objective.identities(range(len(self._examples)))
        counts = [len(row.texts) for row in identities]
        texts = [
            tokenizer.decode(document.input_ids[:-1].tolist(), skip_special_tokens=True)
            for example in examples
            for document in example.documents
        ]
        options = self.objective.options
        text_format = EmbeddingFormat(self.objective.pooling, "", options.document_prompt or "")
        assert isinstance(bound.model, Decoder), "other engines are refused before"
        longest = min(_NEUTRAL_TOKENS, bound.model.config.max_position_embeddings)
        neutral = neutral_packer(TextEncoder(tokenizer), text_format, longest)
        of_rows = [*dict.fromkeys(np.linspace(0, len(examples) - 1, max(1, shown)).astype(int).tolist())][:shown]
        scores, histograms, nearest, of_neutral = {}, [], [], []
        for name in ("base", "adapted"):
            objective, rows = self.objective, self._micro_batch_rows
            with computing_with(bound.model, start) if name == "base" else nullcontext():
                embeddings, neutral_vectors = (
                    not_none(embed_rows(bound.model, packer, objective.pooling, rows, Communicator()))
                    for packer in (objective.packer, neutral)
                )
            scores[name] = self._scores(embeddings)
            histograms.append(cosine_histogram(embeddings, counts))
            nearest.append(nearest_texts(identities, embeddings, texts, of_rows))
            of_neutral.append(neutral_vectors)
        result = summary_scores(scores)
        for name, histogram in zip(scores, histograms, strict=True):
            result[f"{name}_retrieval"]["histogram"] = histogram
        first = first_documents(counts).tolist()
        result["neighbours"] = [
            {"anchor": texts[first[row]][:SHOWN_LETTERS], "base": of_base, "adapted": of_adapted}
            for row, of_base, of_adapted in zip(of_rows, *nearest, strict=True)
        ]
        return {**result, "neutral_drift": drift(*of_neutral)}

    def _losses(self, rows: Sequence[int], embeddings: Tensor) -> list[float]:
        documents = torch.tensor(self.objective.packer.documents(rows))
        of_rows: list[float] = self.objective.losses(rows, embeddings[documents]).losses.tolist()
        return of_rows

    def _scores(self, embeddings: Tensor) -> VectorScores:
        return score_vectors(self.objective.identities(range(len(self._examples))), embeddings)

    def _check(self, cosine: float) -> None:
        if self._was_apart and not cosine <= COLLAPSED:
            raise CheckError(
                f"the vectors have collapsed: the mean cosine of different held-out texts is {cosine:.6f}",
                why="the learning rate is too high, or the rows contradict each other",
                next_step="start again with a lower --learning-rate, or with more rows per step (--batch-rows)",
            )
        self._was_apart = self._was_apart or cosine <= COLLAPSED
