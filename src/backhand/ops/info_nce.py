"""InfoNCE: the cross-entropy of each anchor's positive among all candidates of a batch.

    S = s A Cᵀ,   ℓ_i = log Σ_j exp(S_ij) - S_{i,t_i}      A anchors (n, d), C candidates (m, d), t_i the positive of i

[arXiv:1807.03748, eq. 4]. With unit rows and s = 20 it is MultipleNegativesRankingLoss of sentence-transformers: the
candidates are the positives of all anchors, followed by hard negatives. A candidate that is no negative of an anchor,
such as a second copy of its positive, is excluded: S_ij = -∞. Such pairs are listed. If anchors and candidates have
labels, all pairs of equal labels except the positives are excluded, too, without a list of them. The symmetric form
also looks for the anchor of each positive, over the anchors that are not excluded:

    ℓ_i = ½ (log Σ_j exp(S_ij) + log Σ_k exp(S_{k,t_i})) - S_{i,t_i}

Backward. Let P_ij = exp(S_ij) / Σ_j exp(S_ij) and Q_kj = exp(S_kj) / Σ_k exp(S_kj) be the softmax of rows and columns.
Let G = ∂L/∂ℓ (n,), and H_j the sum of G_i over the anchors with t_i = j. Then D = ∂L/∂S (n, m) is
    D_ij = G_i (P_ij - [j = t_i])                                one direction
    D_ij = ½ (G_i P_ij + H_j Q_ij) - G_i [j = t_i]               symmetric
and from dS = s (dA Cᵀ + A dCᵀ)
    ∂L/∂A = s D C   (n, d)        ∂L/∂C = s Dᵀ A   (m, d)

S and D are computed in blocks of anchors, forward and backward, and never exist as a whole if they are large. Saved:
A, C, the logarithms of the sums of both directions, t, the excluded pairs and the labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.pieces import piece_size

BLOCK_SCORES = 1 << 19
"""Number of scores in a block: 2 MB in float32. More makes no step faster, and four blocks exist at the same time."""


class InfoNCERule(NamedTuple):
    """s, the inverse temperature, and the form of the loss."""

    scale: float = 20.0
    symmetric: bool = False


class Labels(NamedTuple):
    """Labels of anchors (n,) and candidates (m,), int64. A candidate with an anchor's label is no negative of it."""

    anchors: Tensor
    candidates: Tensor


class InfoNCESaved(NamedTuple):
    """Saved for the backward, in float32 or wider; excluded pairs are sorted by anchor."""

    anchors: Tensor  # A, (n, d)
    candidates: Tensor  # C, (m, d)
    positives: Tensor  # t, (n,) int64
    excluded: Tensor  # (pairs, 2) int64: anchor, candidate
    row_sums: Tensor  # log Σ_j exp(S_ij), (n,)
    column_sums: Tensor  # log Σ_k exp(S_kj), (m,), -∞ for a column without scores; 0 in one direction
    labels: Labels | None
    rule: InfoNCERule
    dtypes: tuple[torch.dtype, torch.dtype]  # of anchors and candidates


class InfoNCEGrads(NamedTuple):
    """d_anchors (n, d) and d_candidates (m, d)."""

    d_anchors: Tensor
    d_candidates: Tensor


def _blocks(
    anchors: Tensor, candidates: Tensor, positives: Tensor, excluded: Tensor, labels: Labels | None, rule: InfoNCERule
) -> Iterator[tuple[slice, Tensor]]:
    """Yield S of a block of anchors, (block, m), with the range of the anchors."""
    size = max(1, piece_size(BLOCK_SCORES) // max(1, len(candidates)))
    for start in range(0, len(anchors), size):
        block = slice(start, min(start + size, len(anchors)))
        scores = rule.scale * (anchors[block] @ candidates.T)
        limits = torch.tensor([block.start, block.stop], device=excluded.device)
        first, last = torch.searchsorted(excluded[:, 0].contiguous(), limits).tolist()
        rows, columns = excluded[first:last].unbind(1)
        scores[rows - start, columns] = -torch.inf
        if labels is not None:
            alike = labels.anchors[block, None] == labels.candidates
            scores.masked_fill_(alike.scatter_(1, positives[block, None], False), -torch.inf)
        yield block, scores


def info_nce_forward(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    excluded: Tensor,
    labels: Labels | None,
    rule: InfoNCERule,
) -> tuple[Tensor, InfoNCESaved]:
    """Compute ℓ of every anchor.

    Args:
        anchors: A, (n, d).
        candidates: C, (m, d).
        positives: t, (n,) int64 in [0, m).
        excluded: (pairs, 2) int64, each an anchor and a candidate that is not its negative, and not its positive.
        labels: of anchors and candidates; None without labels.
        rule: scale and form.

    Returns:
        (n,) losses in nats, float32 or wider, and the saved tensors.
    """
    wide = torch.promote_types(anchors.dtype, torch.float32)
    dtypes, (a, c) = (anchors.dtype, candidates.dtype), (anchors.to(wide), candidates.to(wide))
    excluded = excluded[excluded[:, 0].argsort(stable=True)]
    row_sums, of_positives = a.new_empty(len(a)), a.new_empty(len(a))
    column_sums = a.new_full((len(c),), -torch.inf if rule.symmetric else 0.0)
    for block, scores in _blocks(a, c, positives, excluded, labels, rule):
        row_sums[block] = scores.logsumexp(1)
        of_positives[block] = scores.gather(1, positives[block, None]).squeeze(1)
        if rule.symmetric:
            column_sums = torch.logaddexp(column_sums, scores.logsumexp(0))
    sums = (row_sums + column_sums[positives]) / 2 if rule.symmetric else row_sums
    saved = InfoNCESaved(a, c, positives, excluded, row_sums, column_sums, labels, rule, dtypes)
    return sums - of_positives, saved


def info_nce_backward(d_y: Tensor, saved: InfoNCESaved) -> InfoNCEGrads:
    """Map d_y (n,) to the gradients derived in the module docstring."""
    a, c, positives, excluded, row_sums, column_sums, labels, rule, dtypes = saved
    d_y = d_y.to(a.dtype)
    d_anchors, d_candidates = torch.empty_like(a), torch.zeros_like(c)
    of_columns = d_y.new_zeros(len(c)).index_add_(0, positives, d_y)  # H
    column_sums = column_sums.nan_to_num(neginf=0.0)  # all scores of such a column are -∞, and their exponentials 0
    for block, scores in _blocks(a, c, positives, excluded, labels, rule):
        of_rows = (scores - column_sums).exp_().mul_(of_columns) if rule.symmetric else None
        d_scores = scores.sub_(row_sums[block, None]).exp_().mul_(d_y[block, None])
        if of_rows is not None:
            d_scores.add_(of_rows).div_(2)
        d_scores.scatter_add_(1, positives[block, None], -d_y[block, None])
        d_anchors[block] = rule.scale * (d_scores @ c)
        d_candidates.addmm_(d_scores.T, a[block], alpha=rule.scale)
    return InfoNCEGrads(d_anchors.to(dtypes[0]), d_candidates.to(dtypes[1]))


def info_nce_reference(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    excluded: Tensor,
    labels: Labels | None,
    rule: InfoNCERule,
) -> Tensor:
    """Compute the same losses from all scores at once, by torch's cross-entropy of rows and columns."""
    wide = torch.promote_types(anchors.dtype, torch.float32)
    mask = torch.zeros(len(anchors), len(candidates), dtype=torch.bool, device=anchors.device)
    mask[excluded[:, 0], excluded[:, 1]] = True
    if labels is not None:
        mask |= labels.anchors.unsqueeze(1) == labels.candidates.unsqueeze(0)
        mask[torch.arange(len(anchors), device=mask.device), positives] = False
    scores = (rule.scale * torch.einsum("id,jd->ij", anchors.to(wide), candidates.to(wide))).masked_fill(
        mask, -torch.inf
    )
    if not len(anchors):
        return scores.sum(1)
    cross_entropy = torch.nn.functional.cross_entropy
    losses = cross_entropy(scores, positives, reduction="none")
    if not rule.symmetric:
        return losses
    columns = scores.T[positives]
    return (losses + cross_entropy(columns, torch.arange(len(columns), device=columns.device), reduction="none")) / 2
