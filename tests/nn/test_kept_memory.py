"""What the forward pass keeps for backward, counted in bytes of distinct storage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from backhand.nn.block import BlockSaved, block_forward
from backhand.nn.block_adapter import block_adapter
from support.parity import decoder_like, supervise
from support.tiny_models import attach_lora, tiny_documents, tiny_model

RANK = 5


def tensors_in(kept: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples."""
    if isinstance(kept, torch.Tensor):
        yield kept
    elif isinstance(kept, tuple):
        for part in kept:
            yield from tensors_in(part)


def kept_bytes_per_token(variant: str, recompute: str, dtype: torch.dtype) -> float:
    """Bytes of all storages a block's saved tensors hold on to, per token, weights apart."""
    adapted = attach_lora(tiny_model(variant, dtype=dtype), rank=RANK)
    decoder = decoder_like(adapted, 1.7, dtype=dtype)
    batch = supervise(tiny_documents((23, 9, 9)))
    weights = decoder.weights.blocks[1]
    owned = {tensor.untyped_storage().data_ptr() for tensor in vars(weights).values() if tensor is not None}
    x0 = decoder.embed(batch.input_ids)
    _, saved = block_forward(x0, weights, block_adapter(decoder.lora, 1, None), decoder.contexts(batch)[1], recompute)
    assert isinstance(saved, BlockSaved)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(saved)}
    return sum(size for pointer, size in storages.items() if pointer not in owned) / len(batch.input_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("variant", "extra", "extra_factors"),
    [
        ("llama", 0, 0),
        # q and k are kept before their norm instead of after it; one factor a head comes on top.
        ("qwen3", 0, 6 + 2),
        # Sandwich norms keep the two normed outputs as they were before the norm, and their factors.
        ("gemma3_text", 2 * 60, 6 + 2 + 2),
    ],
)
def test_kept_bytes_follow_the_formula(variant, extra, extra_factors, dtype):
    d, q, k, f, heads = 60, 6 * 14, 2 * 14, 76, 6
    elements = 2 * d + 2 * q + 2 * k + 2 * f + 7 * RANK + extra
    expected = elements * dtype.itemsize + (heads + 2 + extra_factors) * 4
    assert kept_bytes_per_token(variant, "none", dtype) == expected


def test_recompute_keeps_less():
    d, q, k, heads = 60, 6 * 14, 2 * 14, 6
    mlp = (2 * d + 2 * q + 2 * k + 5 * RANK) * 4 + (heads + 2) * 4
    assert kept_bytes_per_token("llama", "mlp", torch.float32) == mlp
    assert kept_bytes_per_token("llama", "block", torch.float32) == d * 4
