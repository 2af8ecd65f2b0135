"""Adapters in models of any kind: outputs, gradients and files against PEFT, and merging."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import UnusableAdapterError
from backhand.adapters.inject import inject, inject_from
from backhand.errors import UsageError
from tests.support.any_models import (
    KINDS,
    PREFIX,
    Pictures,
    distance,
    gpt2,
    our_config,
    ours_and_theirs,
    outputs,
    randomise,
    state,
    their_factors,
    word_ids,
)
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("name", KINDS)
def test_outputs_and_gradients_equal_pefts(name: str, tmp_path: Path) -> None:
    adapter, theirs, x = ours_and_theirs(name, tmp_path)
    bound = KINDS[name][4]
    y, expected = outputs(adapter.module, x), outputs(theirs, x)
    assert distance(y, expected) <= bound
    d_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    y.backward(d_y)
    expected.backward(d_y)
    factors = their_factors(theirs)
    mine = dict(adapter.named_parameters())
    assert set(factors) == set(mine)
    for factor, parameter in mine.items():
        got, reference = parameter.grad, factors[factor].grad
        assert got is not None and reference is not None and float(reference.abs().max()) > 0
        assert distance(got, reference) <= bound, factor
    trained = {key for key, parameter in adapter.module.named_parameters() if parameter.grad is not None}
    assert trained == set(mine)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_all_linear_adapts_what_peft_adapts(name: str) -> None:
    build = KINDS[name][0]
    adapter = inject(build(), LoRAConfig())
    theirs = peft.get_peft_model(
        build(),  # type: ignore[arg-type]
        peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=name == "gpt2"),
    )
    assert set(adapter.modules) == {
        key.removeprefix(PREFIX)
        for key, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("name", KINDS)
def test_we_read_what_peft_writes(name: str, tmp_path: Path) -> None:
    build, _, _, dtype, bound = KINDS[name]
    _, theirs, x = ours_and_theirs(name, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # embedding layers are saved whole in addition to their factors
        theirs.save_pretrained(str(tmp_path / "theirs"))  # type: ignore[operator]
    torch.manual_seed(0)
    adapter = inject_from(build().to(dtype).eval(), tmp_path / "theirs")
    with torch.no_grad():
        assert distance(outputs(adapter.module, x), outputs(theirs, x)) <= bound


@pytest.mark.parametrize("name", KINDS)
def test_saved_loaded_and_saved_again_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    build, _, fields, dtype, _ = KINDS[name]
    adapter = inject(build().to(dtype), our_config(fields))
    randomise(adapter)
    adapter.save(tmp_path / "first", base_model="b")
    again = inject_from(build().to(dtype), tmp_path / "first")
    again.save(tmp_path / "second", base_model="b")
    for file in sorted((tmp_path / "first").iterdir()):
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


MERGEABLE = [name for name in KINDS if "pictures" not in name and name not in ("bert in fp32", "bert, some", "llama")]


@pytest.mark.parametrize("name", [name for name in MERGEABLE if name != "llama, DoRA"])
def test_merging_keeps_the_function_and_unmerging_the_bits(name: str) -> None:
    build, draw, fields, dtype, _ = KINDS[name]
    model = build().to(dtype).eval()
    adapter = inject(model, our_config(fields))
    randomise(adapter)
    x = draw()
    with torch.no_grad():
        expected = outputs(model, x)
        bits = {key: value.clone() for key, value in model.state_dict().items()}
        adapter.merge()
        assert adapter.merged
        assert distance(outputs(model, x), expected) <= (1e-5 if dtype == torch.float32 else 1e-12)
        adapter.unmerge()
        assert torch.equal(outputs(model, x), expected)
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in KINDS if "," in name])
def test_disabled_it_is_the_base_and_removed_it_leaves_no_trace(name: str) -> None:
    build, draw, fields, dtype, _ = KINDS[name]
    model = build().to(dtype).eval()
    x = draw().to(dtype) if draw().is_floating_point() else draw()
    before, bits = state(model), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = outputs(copy.deepcopy(model).requires_grad_(False), x)
        adapter = inject(model, our_config(fields))
        assert distance(outputs(model, x), expected) <= (1e-5 if dtype == torch.float32 else 1e-12)
        randomise(adapter)
        changed = outputs(model, x)
        assert distance(changed, expected) > 1e-3
        with adapter.disabled():
            assert distance(outputs(model, x), expected) <= 1e-6
        assert torch.equal(outputs(model, x), changed)
        adapter.remove()
    assert state(model) == before
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())


def test_a_bias_without_one_in_the_base_is_not_merged() -> None:
    adapter = inject(tiny_model("llama"), LoRAConfig(lora_bias=True))
    with pytest.raises(UsageError, match="base model has none"):
        adapter.merge()
    assert not adapter.merged


@pytest.mark.parametrize(
    ("variant", "fields", "match"),
    [
        ("llama", {"use_dora": True, "lora_bias": True}, "do not go together"),
        ("llama", {"target_modules": ("embed_tokens",), "lora_bias": True}, "embedding"),
        ("llama", {"modules_to_save": ("lm_heat",)}, "did you mean .*lm_head"),
        ("llama", {"modules_to_save": ("norm",)}, "also ends input_layernorm"),
        ("llama", {"modules_to_save": ("mlp", "down_proj")}, "lies inside"),
        ("llama", {"trainable_token_indices": (307,)}, "beyond the vocabulary of 307"),
        ("llama", {"trainable_token_indices": (1, 1)}, "twice"),
        ("llama", {"trainable_token_indices": (1,), "modules_to_save": ("embed_tokens",)}, "in another way"),
        ("llama-tied", {"trainable_token_indices": (1,), "target_modules": ("lm_head",)}, "in another way"),
    ],
)
def test_what_does_not_go_together_is_refused_and_nothing_is_touched(variant: str, fields: Any, match: str) -> None:
    model = tiny_model(variant)
    before = state(model)
    with pytest.raises(UsageError, match=match):
        inject(model, LoRAConfig(**fields))
    assert state(model) == before


def test_a_grouped_convolution_has_no_dora() -> None:
    with pytest.raises(UsageError, match="grouped convolution"):
        inject(Pictures(), LoRAConfig(rank=4, target_modules=("grouped",), use_dora=True))


def test_a_tied_weight_trained_in_full_is_untied_and_said_to_be() -> None:
    model = tiny_model("llama-tied")
    adapter = inject(model, LoRAConfig(modules_to_save=("lm_head",)))
    assert any("lm_head.weight: it is tied to model.embed_tokens.weight" in note for note in adapter.notes)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.requires_grad and not model.get_input_embeddings().weight.requires_grad


def test_a_name_of_pefts_that_ends_within_a_word_is_read_as_peft_trained_it(tmp_path: Path) -> None:
    """PEFT takes `norm` for every module whose path ends in these letters."""
    theirs = peft.get_peft_model(
        tiny_model("llama"),
        peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    adapter = inject_from(tiny_model("llama"), tmp_path / "theirs")
    assert sum(name.endswith("norm.weight") for name, _ in adapter.named_parameters()) == 7
    x = word_ids()
    with torch.no_grad():
        assert distance(outputs(adapter.module, x), outputs(theirs.eval(), x)) <= 1e-5
    adapter.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "ours"))
    with torch.no_grad():
        assert distance(outputs(again, x), outputs(theirs, x)) <= 1e-5


def test_rows_by_the_name_of_the_embedding_are_read(tmp_path: Path) -> None:
    for key, fits in (("embed_tokens", True), ("lm_head", False)):
        theirs = peft.get_peft_model(
            tiny_model("llama"),
            peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={key: [4, 1]}, task_type="CAUSAL_LM"),
        )
        theirs.save_pretrained(str(tmp_path / key))
        if fits:
            adapter = inject_from(tiny_model("llama"), tmp_path / key)
            assert adapter.config.trainable_token_indices == (4, 1)
        else:
            with pytest.raises(UnusableAdapterError, match=r"unexpected: .*lm_head.token_adapter"):
                inject_from(tiny_model("llama"), tmp_path / key)


def test_merging_a_tied_weight_leaves_the_other_alone() -> None:
    model = gpt2().double().eval()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    assert table.weight is head.weight
    adapter = inject(model, LoRAConfig(rank=2, target_modules=("lm_head",)))
    randomise(adapter)
    assert any("tied to transformer.wte.weight" in note and "lm_head alone" in note for note in adapter.notes)
    x = word_ids()
    with torch.no_grad():
        expected, bits = outputs(model, x), table.weight.clone()
        adapter.merge()
        assert head.weight is not table.weight and torch.equal(table.weight, bits)
        assert distance(outputs(model, x), expected) <= 1e-12
        adapter.unmerge()
        assert head.weight is table.weight


def test_a_base_weight_in_the_file_must_be_the_models(tmp_path: Path) -> None:
    model = tiny_model("llama")
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(target_modules=["embed_tokens", "q_proj"]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path))
    assert f"{PREFIX}model.embed_tokens.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    adapter = inject_from(copy.deepcopy(model), tmp_path)
    assert "model.embed_tokens" in adapter.modules
    rounded = inject_from(copy.deepcopy(model).bfloat16(), tmp_path)  # compared in the narrower dtype
    assert "model.embed_tokens" in rounded.modules
    model.get_input_embeddings().weight.data[5, 7] += 1
    before = state(model)
    with pytest.raises(UnusableAdapterError, match="base weight of its own"):
        inject_from(model, tmp_path)
    assert state(model) == before
