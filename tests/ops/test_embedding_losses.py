"""Losses of embeddings equal those of sentence-transformers, with their gradients."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer import losses
from torch import nn

from backhand.engines.memory_probe import TensorBytes
from backhand.ops.cosent import cosent_backward, cosent_forward
from backhand.ops.info_nce import InfoNCERule, info_nce_backward, info_nce_forward
from backhand.ops.normalize import normalize_backward, normalize_forward
from backhand.ops.triplet import triplet_backward, triplet_forward

ROWS, WIDTH = 12, 9
BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
OF_ROW = torch.full((ROWS,), 1 / ROWS, dtype=torch.float64)


def drawn(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype, requires_grad=True) for _ in range(count)]


def check(ours, theirs, embeddings):
    """Compare the loss and the gradients of both.

    Args:
        ours: maps the normalized columns to the loss, and to the gradients of these columns.
        theirs: maps the columns to the loss.
    """
    expected = theirs(embeddings)
    value = float(expected.detach())
    with torch.no_grad():
        columns, saved = zip(*map(normalize_forward, embeddings), strict=True)
        loss, d_columns = ours(*columns)
    bound = 1e-12 if expected.dtype == torch.float64 else 1e-5
    assert abs(float(loss) - value) <= bound * value
    for d_y, one, gradient in zip(d_columns, saved, torch.autograd.grad(expected, embeddings), strict=True):
        assert float((normalize_backward(d_y, one).d_x - gradient).norm()) <= bound * float(gradient.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_is_multiple_negatives_ranking_loss(symmetric, negatives, dtype):
    theirs = losses.MultipleNegativesRankingLoss(nn.Identity(), **(BOTH if symmetric else {}))

    def ours(anchors, *candidates):
        none, rule = torch.zeros(0, 2, dtype=torch.int64), InfoNCERule(20.0, symmetric)
        of_rows, saved = info_nce_forward(anchors, torch.cat(candidates), torch.arange(ROWS), none, None, rule)
        grads = info_nce_backward(OF_ROW, saved)
        return of_rows.mean(), (grads.d_anchors, *grads.d_candidates.split(ROWS))

    check(ours, lambda columns: theirs.compute_loss_from_embeddings(columns, None), drawn(2 + negatives, dtype))


def test_triplet_is_triplet_loss_with_cosine_distances():
    metric = losses.TripletDistanceMetric.COSINE
    theirs = losses.TripletLoss(nn.Identity(), distance_metric=metric, triplet_margin=0.4)

    def ours(*columns):
        of_rows, saved = triplet_forward(*columns, torch.arange(ROWS), 0.4)
        return of_rows.mean(), triplet_backward(OF_ROW, saved)

    check(ours, lambda columns: theirs.compute_loss_from_embeddings(columns, None), drawn(3))


def test_cosent_is_cosent_loss():
    targets = torch.arange(ROWS, dtype=torch.float64) % 4 / 4

    def ours(*columns):
        loss, saved = cosent_forward(*columns, targets, 20.0)
        return loss, cosent_backward(torch.ones_like(loss), saved)

    theirs = losses.CoSENTLoss(nn.Identity())
    check(ours, lambda columns: theirs.compute_loss_from_embeddings(columns, targets), drawn(2))


def test_scores_of_a_large_batch_take_a_few_small_blocks():
    """All 2,048 × 2,048 scores would be 17 MB, and their gradient as much again."""
    rows = 2048
    anchors, candidates = (torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    with TensorBytes() as tensors:
        _, saved = info_nce_forward(anchors, candidates, torch.arange(rows), nothing, None, InfoNCERule(symmetric=True))
        info_nce_backward(torch.ones(rows), saved)
    assert tensors.peak_bytes < 12e6
