"""Losses of rankings equal those of sentence-transformers, with their gradients."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import losses
from torch import nn

from backhand.ops.binary_cross_entropy import binary_cross_entropy_backward, binary_cross_entropy_forward
from backhand.ops.decide import decide_backward, decide_forward

COUNTS = (3, 5, 2)  # documents of each query
PAIRS = [("query", "document")] * sum(COUNTS)


class GivenScores(CrossEncoder):
    """A cross-encoder whose scores are its parameter."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self) -> None:
        nn.Module.__init__(self)
        drawn = torch.randn(len(PAIRS), generator=torch.Generator().manual_seed(3))
        self.scores = nn.Parameter(2 * drawn)

    def preprocess(self, *_, **__):
        return {}

    def forward(self, _):
        return {"scores": self.scores}


def check(losses_of_rows, d_scores, weight, model, expected):
    (gradient,) = torch.autograd.grad(expected, [model.scores])
    assert float((losses_of_rows * weight).sum()) == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(d_scores, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_pointwise_is_binary_cross_entropy_loss(weight):
    model = GivenScores()
    targets = torch.arange(len(PAIRS)) % 3 / 2
    theirs = losses.BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(weight))
    ours, saved = binary_cross_entropy_forward(model.scores.detach(), targets, weight)
    mean = torch.full_like(ours, 1 / len(PAIRS))
    d_scores = binary_cross_entropy_backward(mean, saved).d_scores
    check(ours, d_scores, mean, model, theirs(list(zip(*PAIRS, strict=True)), targets))


def test_listnet_is_list_net_loss():
    model = GivenScores()
    labels = [torch.arange(count) % 4 / 1.0 for count in COUNTS]
    theirs = losses.ListNetLoss(model, mini_batch_size=-1)(
        [["query"] * len(COUNTS), [["document"] * n for n in COUNTS]], labels
    )
    owner = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    targets = torch.cat([one.softmax(0) for one in labels])
    ours, saved = decide_forward(model.scores.detach(), targets, owner, len(COUNTS))
    mean = torch.full_like(ours, 1 / len(COUNTS))
    check(ours, decide_backward(mean, saved).d_scores, mean, model, theirs)
