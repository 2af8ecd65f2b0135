"""Modules trained in full in a model that is moved, or whose parameters the model itself exchanges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import InjectedAdapter, inject
from backhand.errors import UsageError
from tests.support.any_models import PREFIX, outputs, randomise, word_ids
from tests.support.tiny_models import tiny_model

HEAD = "lm_head.weight"


def trained_head(variant: str, *saved: str) -> tuple[Any, InjectedAdapter]:
    model = tiny_model(variant)
    adapter = inject(model, LoRAConfig(rank=2, target_modules=("q_proj",), modules_to_save=saved or ("lm_head",)))
    randomise(adapter)
    return model, adapter


@pytest.mark.parametrize(
    ("variant", "saved"),
    [("llama", ("lm_head",)), ("llama-tied", ("lm_head",)), ("llama-tied", ("lm_head", "embed_tokens"))],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_base_goes_where_the_model_is_moved(variant: str, saved: tuple[str, ...], dtype: torch.dtype) -> None:
    model, adapter = trained_head(variant, *saved)
    base, x = tiny_model(variant).to(dtype), word_ids()
    with torch.no_grad():
        expected = outputs(base, x)
        model.to(dtype)
        changed = outputs(model, x)
        with adapter.disabled():
            assert torch.equal(outputs(model, x), expected)
        assert torch.equal(outputs(model, x), changed)
        adapter.remove()
        assert torch.equal(outputs(model, x), expected)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (variant == "llama-tied")


def test_what_is_trained_goes_where_the_model_is_moved_while_it_is_disabled() -> None:
    model, adapter = trained_head("llama")
    x = word_ids()
    with torch.no_grad():
        before = outputs(model, x)
        adapter.enable(False)
        model.double()
        adapter.enable()
        assert torch.allclose(outputs(model, x).float(), before, atol=1e-5)


def test_a_head_in_a_wider_dtype_does_not_widen_the_embedding_it_was_tied_to() -> None:
    model, adapter = trained_head("llama-tied")
    model.bfloat16()
    model.lm_head.float()
    with adapter.disabled():
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.float32


def assigned(model: nn.Module) -> None:
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)


def converted(model: nn.Module) -> None:
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.mark.parametrize("exchange", [assigned, converted])
def test_parameters_that_take_the_place_of_trained_ones_are_trained_and_saved(
    exchange: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    model, adapter = trained_head("llama")
    exchange(model)
    assert dict(adapter.named_parameters())[HEAD] is model.lm_head.weight
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    adapter.save(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")[PREFIX + HEAD]
    assert torch.equal(stored, model.lm_head.weight)
    kept = model.lm_head.weight
    with adapter.disabled():
        assert model.lm_head.weight is not kept
    assert model.lm_head.weight is kept


@pytest.mark.parametrize("saved", [("lm_head",), ("lm_head", "embed_tokens")])
def test_a_head_that_is_tied_again_is_an_error_until_it_is_put_back(saved: tuple[str, ...], tmp_path: Path) -> None:
    model, adapter = trained_head("llama-tied", *saved)
    trained = model.lm_head.weight
    model.tie_weights()
    assert model.lm_head.weight is not trained
    with pytest.raises(UsageError, match=r"lm_head\.weight is no longer trained"):
        adapter.parameters()
    with pytest.raises(UsageError, match=r"lm_head\.weight is no longer trained"):
        adapter.save(tmp_path / "a")
    adapter.enable()
    assert model.lm_head.weight is trained
    assert any(parameter is trained for parameter in adapter.parameters())


def test_a_resized_head_is_an_error(tmp_path: Path) -> None:
    model, adapter = trained_head("llama")
    model.resize_token_embeddings(320)
    head = model.lm_head.weight
    for use in (lambda: adapter.save(tmp_path / "a"), adapter.parameters, adapter.remove):
        with pytest.raises(UsageError, match=r"lm_head\.weight is \(320, 60\) now and was \(307, 60\)"):
            use()
    assert model.lm_head.weight is head and adapter.modules
