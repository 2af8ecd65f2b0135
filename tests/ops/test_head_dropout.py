"""The fused head with dropout on its adapter's input: gradients against autograd, with the same mask."""

from __future__ import annotations

import torch

from backhand.ops.linear_cross_entropy import HeadFactors, linear_cross_entropy_backward
from backhand.ops.lora_linear import Dropout, multiplier
from support.parity import relative_error

ROWS, HIDDEN, VOCAB, RANK, SCALING = 261, 7, 11, 3, 1.7  # more rows than one chunk has


def test_gradients_with_dropout_equal_autograds() -> None:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, lora_A, lora_B = drawn(ROWS, HIDDEN), drawn(VOCAB, HIDDEN), drawn(RANK, HIDDEN), drawn(VOCAB, RANK)
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    dropout = Dropout(0.4, 9)
    losses, grads = linear_cross_entropy_backward(
        x, weight, targets, HeadFactors(lora_A, lora_B, SCALING, dropout), multiplier=0.3
    )
    mask = multiplier(x, dropout)
    assert mask is not None and 0 < int((mask == 0).sum()) < mask.numel()
    leaves = [tensor.clone().requires_grad_() for tensor in (x, lora_A, lora_B)]
    logits = leaves[0] @ weight.T + SCALING * ((leaves[0] * mask) @ leaves[1].T) @ leaves[2].T
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (0.3 * expected.sum()).backward()
    assert relative_error(losses, expected) <= 1e-12
    for by_hand, leaf in zip(grads, leaves, strict=True):
        assert by_hand is not None and leaf.grad is not None
        assert relative_error(by_hand, leaf.grad) <= 1e-12
