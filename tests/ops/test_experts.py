"""Experts on rows sorted by expert: nothing is computed that no token chose, and the rows come back to their tokens."""

from __future__ import annotations

import torch

from backhand.ops.expert_linear import ExpertFactors, expert_linear_backward, expert_linear_forward
from backhand.ops.expert_rows import combine_forward, dispatch_forward, route, weigh_forward


class Watched:
    """The experts' weights, and which of them were asked for; the first one says the size."""

    def __init__(self, weights):
        self.weights = weights
        self.asked = set()

    def __getitem__(self, expert):
        self.asked.add(expert)
        return self.weights[expert]

    def __len__(self):
        return len(self.weights)


def test_an_expert_that_no_token_chose_is_not_touched():
    weights = Watched(torch.randn(5, 4, 3))
    counts = (2, 0, 3, 0, 0)
    factors = ExpertFactors(torch.randn(5, 2, 3), torch.randn(5, 4, 2), 1.7)
    # NaN would reach a gradient through any product.
    for tensor in (factors.lora_A, factors.lora_B, weights.weights):
        tensor[[1, 3, 4]] = torch.nan
    y, saved = expert_linear_forward(torch.randn(5, 3), weights, counts, factors)
    grads = expert_linear_backward(torch.randn(5, 4), saved)
    assert weights.asked == {0, 2}
    assert y.isfinite().all()
    assert grads.d_x.isfinite().all()
    for gradient in (grads.d_lora_A, grads.d_lora_B):
        assert gradient[[1, 3, 4]].eq(0).all()
        assert gradient[[0, 2]].ne(0).any()


def test_rows_are_sorted_by_expert_and_find_back():
    chosen = torch.tensor([[3, 1], [0, 3], [1, 0], [3, 4]])
    routing = route(chosen, 6)
    assert routing.counts == (2, 2, 0, 3, 1, 0)
    experts = torch.repeat_interleave(torch.arange(6), torch.tensor(routing.counts))
    assert chosen.flatten()[routing.places.flatten().argsort()].equal(experts)
    x = torch.arange(4.0)[:, None].expand(4, 3)
    rows, _ = dispatch_forward(x, routing)
    assert rows[routing.places].equal(x[:, None].expand(4, 2, 3))
    halves, _ = weigh_forward(rows, torch.full((4, 2), 0.5), routing)
    y, _ = combine_forward(halves, routing)
    torch.testing.assert_close(y, x)
