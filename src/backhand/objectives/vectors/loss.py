"""Embeddings: losses of vectors, with any number of rows per step in the memory of a micro-batch.

    H ─ pooling ─► E ─ prefixes ─► E[:, :k] ─ normalize ─► Ê ─ InfoNCE, triplet or CoSENT ─► Σ ℓ

The loss of a row depends on the vectors of all rows of the step, so the gradient is computed in three stages
(GradCache, arXiv:2101.06983):

1. E of every micro-batch, without saving activations;
2. the loss and ∂L/∂E of the whole step, once;
3. every micro-batch again, with its part of ∂L/∂E as the gradient of its hidden states.

Both passes have the same micro-batches and dropout masks, so the result is the gradient of one large batch. A step of
one micro-batch needs no first pass. Every process computes stages 1 and 3 of its micro-batches and stage 2 of the whole
step, so the bits do not depend on the number of processes.

Duplicates are no negatives of each other: a candidate is excluded for an anchor if its text is the anchor itself, or a
positive of any row with the same anchor. If rows have labels, neither are texts with the same label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.data.rows import TextIdentities
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import Trainable
from backhand.errors import not_none
from backhand.loop.objective import Measured, MicroBatch, Objective, means
from backhand.loop.retrieval_scores import mean_cosine
from backhand.loop.row_passes import embed_batch, gathered
from backhand.loop.step import StepWork
from backhand.nn.batch import PackedBatch, StateLoss
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.pooled_states import loss_of_states
from backhand.ops.cosent import cosent_backward, cosent_forward
from backhand.ops.info_nce import InfoNCERule, Labels, info_nce_backward, info_nce_forward
from backhand.ops.normalize import normalize_backward, normalize_forward
from backhand.ops.pooling import Pooling
from backhand.ops.triplet import triplet_backward, triplet_forward
from backhand.options.objectives import ObjectiveOptions


class RowGroup(NamedTuple):
    """The vectors of some rows by their use, as indices into the documents of these rows."""

    anchors: Tensor  # first document of each row, (rows,) int64
    positives: Tensor  # second document of each row, (rows,) int64
    negatives: Tensor  # all others, (negatives,) int64
    owners: Tensor  # row of each negative, (negatives,) int64

    @classmethod
    def of(cls, rows: Sequence[TextIdentities]) -> RowGroup:
        """Return the group of rows whose documents follow each other."""
        counts = torch.tensor([len(row.texts) for row in rows], dtype=torch.int64)
        first = counts.cumsum(0) - counts
        row_of = torch.arange(len(rows)).repeat_interleave(counts)
        negative = torch.arange(len(row_of)) - first[row_of] > 1
        return cls(first, first + 1, negative.nonzero().squeeze(1), row_of[negative])


class EmbeddingLosses(NamedTuple):
    """Losses of some rows, with their gradient and metrics."""

    losses: Tensor  # (rows,)
    d_embeddings: Tensor  # ∂Σ losses / ∂E, (documents, hidden)
    measured: Measured


@dataclass
class _Step:
    """Losses and gradients of the rows of a step, by row number and by document number."""

    losses: dict[int, float]
    place_of: dict[int, int]
    d_embeddings: Tensor


@dataclass
class EmbedObjective(Objective):
    """The loss of vectors."""

    options: ObjectiveOptions = field(default_factory=lambda: ObjectiveOptions("embed"))
    _step: _Step | None = None  # of the next step, if it has several micro-batches

    @property
    def pooling(self) -> Pooling:
        """The pooling of the rows."""
        return not_none(self.options.pooling)

    def identities(self, rows: Sequence[int]) -> list[TextIdentities]:
        """Return digests and scores of these rows."""
        return self.packer.examples.facts(TextIdentities, rows)

    def prepare_step(
        self,
        model: Trainable,
        rows: Sequence[int],
        processes: Communicator,
        work: StepWork,
        parts: Sequence[Sequence[int]],
    ) -> None:
        """Compute the vectors of all rows of the step, then their losses and gradients."""
        self._step = None
        if len(parts) == 1:
            return

        def embed(number: int) -> Tensor:
            return embed_batch(model, work.packed(number), self.pooling, work.dropout_seeds[number])

        in_order = [row for part in parts for row in part]
        places = {document: place for place, document in enumerate(self.packer.documents(in_order))}
        of_parts = [[places[document] for document in self.packer.documents(part)] for part in parts]
        embeddings = not_none(gathered(model, processes, work.packed_tokens, of_parts, embed))
        result = self.losses(in_order, embeddings)
        self._step = _Step(dict(zip(in_order, result.losses.tolist(), strict=True)), places, result.d_embeddings)
        self._measured = {0: result.measured}

    def gradients(self, model: Trainable, rows: Sequence[int], part: MicroBatch) -> Tensor:
        assert isinstance(model, Decoder), "other engines are refused before"
        loss, positions = self.state_loss(rows, part.batch, part.loss_scaling)
        return model.state_loss_and_gradients(part.batch, loss, positions, part.dropout_seed)

    def state_loss(
        self, rows: Sequence[int], batch: PackedBatch, loss_scaling: float
    ) -> tuple[StateLoss, Tensor | None]:
        """Return the loss of a micro-batch, Σ ℓ of its rows, as a function of hidden states, and their positions.

        Args:
            rows: the rows of the micro-batch.
            batch: the packed rows.
            loss_scaling: factor of the gradient.
        """

        def loss(vectors: Tensor) -> tuple[Tensor, Tensor]:
            if self._step is None:  # the micro-batch is the whole step
                result = self.losses(rows, vectors.cpu())
                self._measured, value = {0: result.measured}, result.losses.sum()
                return value, loss_scaling * result.d_embeddings
            places = [self._step.place_of[document] for document in self.packer.documents(rows)]
            value = torch.tensor([self._step.losses[row] for row in rows], dtype=torch.float64).sum()
            return value, loss_scaling * self._step.d_embeddings[places]

        return loss_of_states(batch, self.pooling, loss)

    def losses(self, rows: Sequence[int], embeddings: Tensor) -> EmbeddingLosses:
        """Compute the losses of rows and their gradient from the vectors of all their documents.

        Args:
            embeddings: E, (documents, hidden), float32 or wider.
        """
        identities = self.identities(rows)
        group = RowGroup.of(identities)
        total, d_embeddings = embeddings.new_zeros(len(rows)), torch.zeros_like(embeddings)
        measured: Measured = {}
        for size in (embeddings.shape[1], *self.options.matryoshka_dims):
            units, saved = normalize_forward(embeddings[:, :size])
            losses, d_units = self._of_units(identities, group, units)
            total += losses
            d_embeddings[:, :size] += normalize_backward(d_units, saved).d_x
            if not measured:
                cosines = (units[group.anchors] * units[group.positives]).sum(1)
                measured["cosine/pairs"] = float(cosines.sum()), len(rows)
                measured["cosine/all"] = mean_cosine(units) * len(rows), len(rows)
        return EmbeddingLosses(total, d_embeddings, measured)

    def _of_units(self, identities: Sequence[TextIdentities], group: RowGroup, units: Tensor) -> tuple[Tensor, Tensor]:
        """Return ℓ of each row, (rows,), and ∂Σ ℓ/∂Ê, (documents, size)."""
        options, (anchors, positives, negatives, owners) = self.options, group
        d_units, ones = torch.zeros_like(units), units.new_ones(len(identities))
        if options.embedding_loss == "cosent":
            targets = torch.tensor([not_none(one.score) for one in identities], dtype=torch.float64)
            loss, of_pairs = cosent_forward(units[anchors], units[positives], targets, options.similarity_scale)
            d_units[anchors], d_units[positives] = cosent_backward(loss.new_tensor(len(identities)), of_pairs)
            return loss * ones, d_units
        if options.embedding_loss == "triplet":
            vectors = units[anchors], units[positives], units[negatives]
            losses, of_triplets = triplet_forward(*vectors, owners, options.triplet_margin)
            grads = triplet_backward(ones, of_triplets)
            d_units[anchors], d_units[positives], d_units[negatives] = grads
            return losses, d_units
        candidates = torch.cat((positives, negatives))
        excluded = excluded_pairs(identities)
        rule = InfoNCERule(options.similarity_scale, options.embedding_loss == "symmetric")
        losses, saved = info_nce_forward(
            *(units[anchors], units[candidates], torch.arange(len(identities)), excluded),
            *(labels_of(identities), rule),
        )
        d_units[anchors], d_units[candidates] = info_nce_backward(ones, saved)
        return losses, d_units

    def measured(self, processes: Communicator) -> dict[str, float]:
        """Return the metrics of the step's rows, and forget them."""
        mine, self._measured = self._measured, {}
        return means(mine.values())


def excluded_pairs(rows: Sequence[TextIdentities]) -> Tensor:
    """Return the pairs of an anchor and a candidate that are no negatives, (pairs, 2) int64.

    The candidates are the positives of all rows, then the other texts of all rows.
    """
    texts = [row.texts[1] for row in rows] + [text for row in rows for text in row.texts[2:]]
    candidates_of, positives_of = defaultdict[int, list[int]](list), defaultdict[int, set[int]](set)
    for number, text in enumerate(texts):
        candidates_of[text].append(number)
    for row in rows:
        positives_of[row.texts[0]] |= {row.texts[0], row.texts[1]}
    pairs = [
        (number, candidate)
        for number, row in enumerate(rows)
        for text in positives_of[row.texts[0]]
        for candidate in candidates_of.get(text, ())
        if candidate != number
    ]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def labels_of(rows: Sequence[TextIdentities]) -> Labels | None:
    """Return the labels of anchors and candidates, numbered from 0; None for rows without labels."""
    if any(row.label is None for row in rows):
        return None
    numbers: dict[int | None, int] = {}
    labels = [numbers.setdefault(row.label, len(numbers)) for row in rows]
    negatives = [label for label, row in zip(labels, rows, strict=True) for _ in row.texts[2:]]
    return Labels(torch.tensor(labels, dtype=torch.int64), torch.tensor([*labels, *negatives], dtype=torch.int64))
