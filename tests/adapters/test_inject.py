"""Putting adapters into models and taking them out again: no trace, and no silent failure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import UnusableAdapterError
from backhand.adapters.inject import inject, inject_from
from backhand.errors import ArtifactError, UsageError
from backhand.nn.modules.lora_module import LoRAModule
from tests.support.any_models import (
    KINDS,
    PREFIX,
    Pictures,
    Words,
    our_config,
    outputs,
    randomise,
    state,
    word_ids,
)


@pytest.mark.parametrize("name", ["bert", "gpt2", "pictures", "words"])
def test_removing_leaves_no_trace(name: str) -> None:
    build, draw, fields, _, _ = KINDS[name]
    model = build().eval()
    next(iter(model.parameters())).requires_grad_(False)
    x = draw()
    before, bits = state(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        untouched = outputs(model, x)
        # torch multiplies a frozen weight by another routine than one that is not, where the input is strided.
        expected = outputs(copy.deepcopy(model).requires_grad_(False), x)
        adapter = inject(model, our_config(fields))
        assert torch.allclose(outputs(model, x), expected, atol=1e-5)
        randomise(adapter)
        assert not torch.allclose(outputs(model, x), expected, atol=1e-3)
        with adapter.disabled():
            assert torch.equal(outputs(model, x), expected)
        if name != "pictures":
            adapter.merge()
            with adapter.disabled():
                assert torch.equal(outputs(model, x), expected)
            assert adapter.merged
        assert adapter.remove() is model
        assert state(model) == before
        assert torch.equal(outputs(model, x), untouched)
    after = model.state_dict()
    assert list(after) == list(bits) and all(torch.equal(after[key], bits[key]) for key in bits)


def test_a_grouped_convolution_stops_the_merge_before_anything_is_merged() -> None:
    adapter = inject(Pictures(), LoRAConfig(rank=4, target_modules=("first", "grouped")))
    with pytest.raises(UsageError, match="grouped cannot be merged"):
        adapter.merge()
    assert not adapter.merged


def test_disabling_for_a_while_leaves_a_disabled_adapter_disabled() -> None:
    model = Words()
    x = word_ids()
    adapter = inject(model, LoRAConfig(rank=4, target_modules=("mix",), modules_to_save=("conv",)))
    with adapter.disabled():
        base = model(x)
    randomise(adapter)
    with adapter.disabled():
        with adapter.disabled():
            pass
        assert torch.equal(model(x), base)
    assert not torch.equal(model(x), base)
    adapter.enable(False)
    with adapter.disabled():
        pass
    assert torch.equal(model(x), base)


def test_a_disabled_adapter_is_not_merged() -> None:
    adapter = inject(Words(), LoRAConfig(rank=4, target_modules=("mix",)))
    adapter.enable(False)
    with pytest.raises(UsageError, match="a disabled adapter cannot be merged"):
        adapter.merge()
    assert not adapter.merged
    adapter.enable()
    adapter.merge()
    assert adapter.merged


def test_the_seed_decides_the_first_values() -> None:
    first, same, other = (inject(Words(), LoRAConfig(), seed=seed) for seed in (1, 1, 2))
    for (_, a), (_, b), (_, c) in zip(
        first.named_parameters(), same.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(a, b) and (not a.any() or not torch.equal(a, c))


def test_the_base_keys_of_the_state_dict_stay() -> None:
    model = Words()
    before = set(model.state_dict())
    adapter = inject(model, our_config({"target_modules": ["table", "mix"]}))
    added = set(model.state_dict()) - before
    assert before < set(model.state_dict())
    assert added == {name for name, _ in adapter.named_parameters()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added
    assert adapter.parameter_count == sum(p.numel() for p in adapter.parameters()) == 4 * (17 + 6 + 7 + 7)


class Shared(nn.Module):
    """One linear layer that hangs in two parents."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 4))
        self.b = nn.Sequential(self.a[0], nn.ReLU())
        self.c = nn.Linear(4, 4)


class TwoTables(nn.Module):
    """Two embeddings of one weight, as encoder and decoder of T5 have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.other, self.out = nn.Embedding(5, 4), nn.Embedding(5, 4), nn.Linear(4, 4)
        self.other.weight = self.embed_tokens.weight


class Odd(nn.Linear):
    """Computes something else than its weight says."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in torch
        return -super().forward(input)


@pytest.mark.parametrize(
    ("model", "config", "shown"),
    [
        (Shared, LoRAConfig(), "a.0: the same module is also at b.0"),
        (
            lambda: nn.Sequential(Odd(3, 4), nn.Linear(4, 2)),
            LoRAConfig(),
            "0: a Odd cannot be adapted; what it makes of",
        ),
        (Pictures, LoRAConfig(target_modules=("norm",)), "norm: a BatchNorm2d cannot be adapted"),
        (Pictures, LoRAConfig(rank=6, target_modules=("grouped",)), "grouped: its 4 groups do not divide the rank 6"),
        (
            lambda: nn.TransformerEncoderLayer(8, 2, 12),
            LoRAConfig(),
            "self_attn.out_proj: nn.MultiheadAttention reads its weight and never calls it",
        ),
        (
            lambda: nn.MultiheadAttention(8, 2),
            LoRAConfig(),
            "out_proj: nn.MultiheadAttention reads its weight and never calls it",
        ),
        (lambda: nn.Sequential(nn.ReLU()), LoRAConfig(), "leaves no module"),
        (
            Pictures,
            LoRAConfig(target_modules=("out",), modules_to_save=("norm",)),
            "norm cannot be trained in full\n  why: training would also change running_mean, running_var, num_batches",
        ),
        (
            lambda: peft.get_peft_model(Words(), peft.LoraConfig(target_modules=["mix"])),  # type: ignore[arg-type]
            LoRAConfig(),
            "the model is adapted already, by PEFT",
        ),
        (
            TwoTables,
            LoRAConfig(trainable_token_indices=(1,)),
            "other is a second embedding that shares the weight of embed_tokens",
        ),
        (Words, LoRAConfig(target_modules=("mxi",)), "did you mean mix"),
        (Words, LoRAConfig(rank=0), "rank 0"),
        (lambda: nn.Linear(3, 4), LoRAConfig(), "leaves no module"),
        (Words, {"rank": 4}, "builtins.dict is not a backhand.LoRAConfig"),
        (Words, peft.LoraConfig(r=4), "LoraConfig is not a backhand.LoRAConfig"),
    ],
)
def test_what_cannot_be_adapted_is_said_and_nothing_is_touched(
    model: Callable[[], nn.Module], config: Any, shown: str
) -> None:
    built = model()
    before = state(built)
    with pytest.raises(UsageError) as caught:
        inject(built, config)
    assert shown in str(caught.value)
    assert state(built) == before


def test_only_a_module_is_adapted() -> None:
    with pytest.raises(UsageError, match=r"module: str is not a torch\.nn\.Module"):
        inject("model", LoRAConfig())  # type: ignore[arg-type]


def test_the_adapter_says_what_it_is() -> None:
    assert repr(inject(Words(), LoRAConfig(rank=4, target_modules=("mix",)))) == (
        f"InjectedAdapter(Words: 1 modules adapted, {4 * (7 + 7)} numbers trained)"
    )


def test_a_state_dict_carries_the_adapter_into_another_model() -> None:
    adapter, other = (inject(Words(), LoRAConfig(rank=4, target_modules=("mix", "conv")), seed=s) for s in (0, 1))
    randomise(adapter)
    x = word_ids()
    other.module.load_state_dict(adapter.module.state_dict())
    assert torch.equal(other.module(x), adapter.module(x))


def test_a_wrapped_model_is_adapted_under_the_wrappers_names() -> None:
    wrapped = nn.DataParallel(Words())  # without a card it calls the module itself
    adapter = inject(wrapped, LoRAConfig(rank=4, target_modules=("mix",)))
    assert list(adapter.modules) == ["module.mix"]
    plain = wrapped(word_ids()).detach()
    randomise(adapter)
    assert not torch.allclose(wrapped(word_ids()), plain)


def test_an_adapted_model_is_not_adapted_again() -> None:
    model = Words()
    inject(model, LoRAConfig())
    with pytest.raises(UsageError, match="adapted already"):
        inject(model, LoRAConfig())


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_own_transformer_layers_run_the_adapter(padded: bool) -> None:
    """Their fast path in evaluation reads the weights of its linear layers and would never call them."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2, enable_nested_tensor=padded
    ).eval()
    before = state(model)
    x = torch.randn(3, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2]) if padded else None
    adapter = inject(model, LoRAConfig(rank=2, exclude_modules=("out_proj",)))
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=mask)
        randomise(adapter)
        evaluated = model(x, src_key_padding_mask=mask)
    trained = model(x, src_key_padding_mask=mask)
    keep = slice(None) if mask is None else ~mask
    assert not torch.allclose(evaluated[keep], plain[keep], atol=1e-3)
    assert torch.allclose(evaluated[keep], trained[keep], atol=1e-5)
    adapter.remove()
    assert state(model) == before
    assert model.use_nested_tensor is padded and all(layer.activation_relu_or_gelu for layer in model.layers)


def test_a_plain_models_head_is_left_out_when_it_is_named_so() -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "lm_head": nn.Linear(4, 5)})
    assert list(inject(copy.deepcopy(model)).modules) == ["body"]
    assert list(inject(copy.deepcopy(model), heads=("body",)).modules) == ["lm_head"]


def test_loading_into_an_injected_model(tmp_path: Path) -> None:
    config = our_config({"target_modules": ["table", "mix"]})
    adapter, other = inject(Words(), config), inject(Words(), config, seed=8)
    randomise(adapter)
    adapter.save(tmp_path / "a")
    other.merge()
    loaded = other.load(tmp_path / "a")
    assert loaded.config.rank == 4
    assert other.merged
    for (name, mine), (_, theirs) in zip(other.named_parameters(), adapter.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"rank": 2}, "mix: rank 4 and scaling 1.7 in the file, 2 and 3.4 in the model"),
        ({"alpha": 3.4}, "mix: rank 4 and scaling 1.7 in the file, 4 and 0.85 in the model"),
        ({"target_modules": ("mix",)}, "table: adapted in the file, not in the model"),
        ({"target_modules": ("mix", "table", "conv")}, "conv: adapted in the model, not in the file"),
    ],
)
def test_an_adapter_of_another_form_is_not_loaded(fields: dict[str, Any], shown: str, tmp_path: Path) -> None:
    inject(Words(), our_config({"target_modules": ["table", "mix"]})).save(tmp_path / "a")
    ours = {"rank": 4, "alpha": 6.8, "target_modules": ("table", "mix"), **fields}
    other = inject(Words(), LoRAConfig(**ours))
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(UnusableAdapterError) as caught:
        other.load(tmp_path / "a")
    assert shown in caught.value.problems
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_a_broken_adapter_leaves_the_model_alone(tmp_path: Path) -> None:
    inject(Words(), our_config({"target_modules": ["mix"]})).save(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    model = Words()
    before = state(model)
    with pytest.raises(ArtifactError):
        inject_from(model, tmp_path / "nowhere")
    with pytest.raises(UnusableAdapterError, match=r"not belong to this model[\s\S]*are not in this model.*: mix"):
        inject_from(Pictures(), tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnusableAdapterError, match="bytes are there"):
        inject_from(model, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LOHA", "target_modules": ["mix"]}')
    with pytest.raises(UnusableAdapterError, match="LOHA"):
        inject_from(model, tmp_path / "a")
    assert state(model) == before


def test_an_ordinary_loop_learns_and_the_base_stays() -> None:
    torch.manual_seed(1)
    model = Words()
    bits = copy.deepcopy(model.state_dict())
    adapter = inject(model, LoRAConfig(rank=4, target_modules=("table", "conv", "mix"), dropout=0.05))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    x, target = word_ids(), torch.randn(3, 11, 7) / 2
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in bits.items())


def test_a_moved_and_copied_model_keeps_its_adapter(tmp_path: Path) -> None:
    adapter = inject(Words(), our_config({"target_modules": ["table", "mix"]}))
    randomise(adapter)
    copied = copy.deepcopy(adapter)
    copied.module.double()
    assert isinstance(copied.module, Words) and isinstance(copied.module.mix, LoRAModule)
    x = word_ids()
    assert torch.allclose(copied.module(x).float(), adapter.module(x), atol=1e-5)
    copied.save(tmp_path / "copied")
    stored = load_file(tmp_path / "copied" / "adapter_model.safetensors")
    assert stored[f"{PREFIX}mix.lora_A.weight"].dtype == torch.float64
