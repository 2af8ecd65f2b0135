"""The attention output recomputed in the backward pass gives the same gradients as a saved one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter
from backhand.kernels.builds import kernels_available, torch_form
from backhand.kernels.library import proving_kernels
from backhand.nn.decoder import attention_mixer
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.weights import dense_views, empty_weights, module_shapes
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops import lora_group
from backhand.ops.attention import attention_backward, attention_forward, can_recompute_output
from backhand.ops.attention_blocks import Scores
from backhand.ops.document_groups import SegmentRun
from backhand.ops.lora_group import LoRAGroup, group_A_gradients, group_gradients, group_input_gradient
from backhand.ops.lora_linear import Dropout, lora_linear_backward, lora_linear_forward, multiplier
from backhand.ops.low_rank import LoRAFactors, h_gradient
from tests.support.parity import relative_error, supervise
from tests.support.tiny_models import tiny_config, tiny_documents

needs_loops = pytest.mark.skipif(not kernels_available(), reason="no compiled kernels here")
RUNS = (SegmentRun(0, 2, 9), SegmentRun(18, 1, 5))


def gradients(
    variant: str, adapter: LoRAConfig, recompute: str = "none", dropout_seed: int | None = None
) -> torch.Tensor:
    """All gradients of a tiny model in one pass, in float64; the bits do not depend on how often it is asked."""
    config = decoder_config(tiny_config(variant).to_dict())
    weights = empty_weights(config, torch.float64)
    generator = torch.Generator().manual_seed(2)
    for _, tensor in dense_views(weights, config):
        tensor.normal_(std=0.3, generator=generator)
    decoder = Decoder(config, weights, recompute=recompute)
    layout = resolve_adapter(adapter, module_shapes(config))
    lora = LoRAParameters(layout.slots, full_tensors=layout.full_tensors, dtype=torch.float64)
    decoder.start_values(lora)
    for _, tensor in lora.named_tensors():
        tensor.add_(torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator), alpha=0.3)
    decoder.attach(lora)
    decoder.loss_and_gradients(supervise(tiny_documents((23, 9, 9))), 0.1, dropout_seed)
    return lora.gradients.clone()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each pass back through attention, whether it recomputed its output."""
    seen: list[bool] = []
    right: Callable[..., Any] = attention_mixer.attention_backward

    def counting(*arguments: Any, output_buffer: torch.Tensor | None = None, **options: Any) -> Any:
        seen.append(output_buffer is not None)
        return right(*arguments, output_buffer=output_buffer, **options)

    monkeypatch.setattr(attention_mixer, "attention_backward", counting)
    return seen


@needs_loops
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize("variant", ["llama", "qwen3", "olmo2"])
def test_gradients_are_those_of_a_saved_output(variant, recompute, monkeypatch):
    with torch_form():
        saved = gradients(variant, LoRAConfig(rank=3), recompute, 5)
    seen = counted(monkeypatch)
    with proving_kernels():
        recomputed = gradients(variant, LoRAConfig(rank=3), recompute, 5)
    assert seen
    assert all(seen)
    assert relative_error(recomputed, saved) < 1e-12


@needs_loops
@pytest.mark.parametrize(
    "adapter",
    [
        LoRAConfig(rank=3, dropout=0.3),
        LoRAConfig(rank=3, use_dora=True),
        LoRAConfig(rank=3, target_modules=("o_proj",)),
        LoRAConfig(rank=3, target_modules=("o_proj", "down_proj"), layers="last:1"),
        LoRAConfig(rank=3, target_modules=("q_proj", "v_proj")),
    ],
    ids=["dropout", "dora", "o_proj alone", "o_proj of the last layer", "o_proj frozen"],
)
def test_every_adapter_of_the_output_projection_gets_its_gradient(adapter):
    with torch_form():
        saved = gradients("llama", adapter, dropout_seed=7)
    with proving_kernels():
        recomputed = gradients("llama", adapter, dropout_seed=7)
    assert saved.count_nonzero() > 0.9 * saved.numel()
    assert relative_error(recomputed, saved) < 1e-12


@needs_loops
def test_the_output_is_not_recomputed_if_nothing_needs_it(monkeypatch):
    seen = counted(monkeypatch)
    with proving_kernels():
        gradients("llama", LoRAConfig(rank=3, target_modules=("q_proj", "v_proj")))
    assert seen
    assert not any(seen)


@needs_loops
@pytest.mark.parametrize("variant", ["gemma2", "qwen3_5_text"])
def test_capped_and_gated_attention_saves_its_output(variant, monkeypatch):
    seen = counted(monkeypatch)
    with proving_kernels():
        gradients(variant, LoRAConfig(rank=3))
    assert not any(seen)


def attended(dtype: torch.dtype) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """What attention saved, its output, and a gradient of it."""
    generator = torch.Generator().manual_seed(4)
    q, k, v, d_y = (torch.randn(23, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2, 4))
    y, saved = attention_forward(q, k, v, RUNS, Scores(0.3))
    return saved, y, d_y


@needs_loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_recomputed_output_has_the_bits_of_the_forward(dtype):
    saved, y, d_y = attended(dtype)
    assert can_recompute_output(saved.q, RUNS) == (dtype == torch.float32)
    recomputed, other = torch.full_like(y, float("nan")), torch.full_like(y, float("nan"))
    plain = attention_backward(d_y, saved)
    both = attention_backward(d_y, saved._replace(output=None), output_buffer=recomputed)
    attention_backward(d_y, saved, output_buffer=other)
    assert all(torch.equal(one, two) for one, two in zip(plain, both, strict=True))
    assert torch.equal(recomputed, other)
    assert relative_error(recomputed, y) < (1e-6 if dtype == torch.float32 else 1e-2)


@needs_loops
def test_queries_of_many_visible_keys_save_their_output():
    q = torch.zeros(1, 1, 8)
    whole, continued = (SegmentRun(0, 1, 1025),), (SegmentRun(0, 1, 600), SegmentRun(600, 3, 425, ((0, 600),)))
    for runs in (whole, continued):
        assert not can_recompute_output(q, runs)
        assert not can_recompute_output(q, runs, window=1025)
        assert can_recompute_output(q, runs, window=1024)
    assert can_recompute_output(q, (SegmentRun(0, 9, 1024),))


@needs_loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_of_many_visible_keys_save_the_sums_of_their_softmax(dtype):
    q = torch.zeros(1025, 3, 8, dtype=dtype)
    for tokens, window, saves in ((1025, None, True), (1024, None, False), (1025, 1024, False)):
        x = q[:tokens]
        _, saved = attention_forward(x, x, x, (SegmentRun(0, 1, tokens),), Scores(0.3, window))
        assert (saved.logsumexp is not None) == saves
    # In the kernel's units, which are those of the exponential function or of powers of two.
    assert attention_forward(q, q, q, (SegmentRun(0, 1, 1025),), Scores(0.3))[1].logsumexp[0, 0] == 0


def test_torch_s_form_returns_the_saved_output_or_recomputes_it():
    with torch_form():
        saved, y, d_y = attended(torch.float64)
        assert not can_recompute_output(saved.q, RUNS)
        recomputed = torch.empty_like(y)
        attention_backward(d_y, saved, output_buffer=recomputed)
        assert torch.equal(recomputed, y)
    with proving_kernels():  # keeps nothing that torch's form needs
        saved, y, d_y = attended(torch.float64)
    with torch_form():
        attention_backward(d_y, saved._replace(output=None), output_buffer=recomputed.zero_())
    assert relative_error(recomputed, y) < 1e-12


@pytest.mark.parametrize("dropout", [None, Dropout(0.4, 9)])
def test_only_lora_A_s_gradient_needs_the_input(dropout):
    generator = torch.Generator().manual_seed(1)
    sizes = ((7, 5), (6, 5), (3, 5), (6, 3), (7, 6))
    x, weight, lora_A, lora_B, d_y = (torch.randn(*size, generator=generator) for size in sizes)
    _, saved = lora_linear_forward(x, weight, None, lora_A, lora_B, 1.7, dropout)
    expected = lora_linear_backward(d_y, saved)
    d_lora_A, d_lora_B = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    group = LoRAGroup((LoRAFactors(0, lora_A, lora_B, 1.7, d_lora_A, d_lora_B),), dropout)
    d_h = h_gradient(d_y, saved.h, group.factors)
    d_x = group_input_gradient(d_y, d_h, weight, group)
    assert not d_lora_A.any()
    group_A_gradients(x, d_h, group)
    for expected_one, found in zip(expected, (d_x, d_lora_A, d_lora_B), strict=True):
        assert relative_error(found, expected_one) < 1e-6


def test_both_gradients_of_an_input_draw_the_mask_once(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    x, weight, lora_A, lora_B, d_y, d_h = (
        torch.randn(*size, generator=generator) for size in ((7, 5), (6, 5), (3, 5), (6, 3), (7, 6), (7, 3))
    )
    apart, together = torch.zeros_like(lora_A), torch.zeros_like(lora_A)
    group = LoRAGroup((LoRAFactors(0, lora_A, lora_B, 1.7, apart, torch.zeros_like(lora_B)),), Dropout(0.4, 9))
    group_A_gradients(x, d_h, group)
    d_x = group_input_gradient(d_y, d_h, weight, group)
    drawn = []

    def counted(like: torch.Tensor, dropout: Dropout | None) -> torch.Tensor | None:
        drawn.append(dropout)
        return multiplier(like, dropout)

    monkeypatch.setattr(lora_group, "multiplier", counted)
    group = group._replace(factors=(group.factors[0]._replace(d_lora_A=together),))
    assert torch.equal(group_gradients(d_y, x, d_h, weight, group), d_x)
    assert torch.equal(together, apart)
    assert drawn == [Dropout(0.4, 9)]
