"""Tensors that the forward pass saves for backward, counted in bytes of distinct storage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from backhand.kernels.builds import kernels_available
from backhand.nn.decoder.adapted_group import block_adapter
from backhand.nn.decoder.block import BlockSaved, block_forward
from tests.support.parity import decoder_like, supervise
from tests.support.tiny_models import attach_lora, tiny_documents, tiny_model

RANK = 5
# torch's attention saves a log-sum-exp per head of short documents; the compiled kernel saves none.
HEADS_SAVED = 0 if kernels_available() else 6


def saved_outputs(dtype: torch.dtype) -> int:
    """Return how often attention's output is saved: its float32 kernel recomputes it in the backward."""
    return 0 if kernels_available() and dtype == torch.float32 else 1


def tensors_in(saved: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples."""
    if isinstance(saved, torch.Tensor):
        yield saved
    elif isinstance(saved, tuple):
        for part in saved:
            yield from tensors_in(part)


def saved_bytes_per_token(variant: str, recompute: str, dtype: torch.dtype, layer: int = 1) -> float:
    """Return the bytes per token of all storages of a block's saved tensors, without weights."""
    adapted = attach_lora(tiny_model(variant, dtype=dtype), rank=RANK)
    decoder = decoder_like(adapted, 1.7, dtype=dtype)
    batch = supervise(tiny_documents((23, 9, 9)))
    weights = decoder.weights.blocks[layer]
    owned = {tensor.untyped_storage().data_ptr() for tensor in vars(weights).values() if tensor is not None}
    x0 = decoder.embed(batch.input_ids)
    adapter = block_adapter(decoder.lora, decoder.config, layer, None)
    _, saved = block_forward(x0, weights, adapter, decoder.contexts(batch)[layer], recompute)
    assert isinstance(saved, BlockSaved)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(saved)}
    return sum(size for pointer, size in storages.items() if pointer not in owned) / len(batch.input_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("variant", "extra", "extra_factors"),
    [
        ("llama", 0, 0),
        # q and k are saved before their norm instead of after it, together with one factor per head.
        ("qwen3", 0, 6 + 2),
        # With sandwich norms, the inputs of the two norms after the sublayers are saved, together with their factors.
        ("gemma3_text", 2 * 60, 6 + 2 + 2),
    ],
)
def test_saved_bytes_follow_the_formula(variant, extra, extra_factors, dtype):
    d, q, k, f = 60, 6 * 14, 2 * 14, 76
    elements = 2 * d + (1 + saved_outputs(dtype)) * q + 2 * k + 2 * f + 7 * RANK + extra
    expected = elements * dtype.itemsize + (HEADS_SAVED + 2 + extra_factors) * 4
    assert saved_bytes_per_token(variant, "none", dtype) == expected


def test_a_convolution_saves_its_input_and_output():
    d, f = 60, 72
    elements = 2 * d + 3 * d + d + 2 * f + 5 * RANK
    assert saved_bytes_per_token("lfm2", "none", torch.float32, layer=2) == elements * 4 + 2 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_rule_saves_its_output_before_and_after_the_gate(dtype):
    d, f, heads, values, channels = 60, 76, 6, 60, 60 + 40
    elements = 2 * d + (channels + values + 2 * heads) + 2 * values + 2 * f + 8 * RANK
    expected = elements * dtype.itemsize + (2 + heads) * 4
    assert saved_bytes_per_token("qwen3_5_text", "none", dtype, layer=1) == expected


def test_mamba_saves_its_output_before_and_after_the_norm():
    d, f, width, channels, heads, groups = 60, 76, 120, 120 + 2 * 3 * 9, 6, 3
    elements = 2 * d + (width + channels + heads) + 2 * width + 2 * f + 5 * RANK
    expected = elements * 4 + (2 + groups) * 4
    assert saved_bytes_per_token("bamba", "none", torch.float32, layer=2) == expected


def test_gated_attention_saves_its_output_before_and_after_the_gate():
    d, q, k, f = 60, 6 * 14, 2 * 14, 76
    elements = 2 * d + (2 * q + 2 * k) + 2 * q + 2 * f + 7 * RANK
    expected = elements * 4 + (HEADS_SAVED + 2 + 6 + 2) * 4
    assert saved_bytes_per_token("qwen3_5_text", "none", torch.float32, layer=3) == expected


def test_recompute_saves_less():
    d, q, k = 60, 6 * 14, 2 * 14
    mlp = (2 * d + (1 + saved_outputs(torch.float32)) * q + 2 * k + 5 * RANK) * 4 + (HEADS_SAVED + 2) * 4
    assert saved_bytes_per_token("llama", "mlp", torch.float32) == mlp
    assert saved_bytes_per_token("llama", "block", torch.float32) == d * 4
