"""Layers of experts: which experts are computed, ties, and the layouts of the experts' matrices in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as StorageType
from safetensors import safe_open

from backhand.errors import ArtifactError, UsageError
from backhand.interop.command import export_command
from backhand.interop.merging import merge_command
from backhand.interop.options import ExportOptions, MergeOptions
from backhand.nn.decoder import experts
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.experts import ExpertMatrices
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import open_model
from backhand.nn.loading.expert_tensors import expert_parameter, hub_name, parse_expert_name
from tests.support.parity import decoder_like, our_gradients, peft_gradients, peft_loss, relative_error, supervise
from tests.support.tiny_adapters import save_tiny_adapter
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import attach_lora, full_logits, save_tiny, tiny_config, tiny_documents, tiny_model

VARIANTS = ("qwen3_moe", "qwen3_moe-shares", "mixtral", "gpt_oss")


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_only_what_a_token_chose_is_read(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = attach_lora(tiny_model("qwen3_moe"), rank=5, alpha=8.5)
    decoder, batch = decoder_like(adapted, 1.7, recompute=recompute), supervise(tiny_documents([2]))
    asked: list[int] = []
    chosen: list[int] = []
    take, route = ExpertMatrices.__getitem__, experts.route

    def watched(self: ExpertMatrices, expert: int) -> Any:
        asked.append(expert)
        return take(self, expert)

    def noted(choices: torch.Tensor, count: int) -> Any:
        chosen.extend(choices.flatten().tolist())
        return route(choices, count)

    monkeypatch.setattr(ExpertMatrices, "__getitem__", watched)
    monkeypatch.setattr(experts, "route", noted)
    decoder.loss_and_gradients(batch, 1.0)
    # The first matrix says how large all are.
    assert set(chosen) <= set(asked) <= {*chosen, 0}
    assert 3 <= len(set(chosen)) < 11
    lora = decoder.lora
    assert lora is not None
    for name in (name for name in lora.slots if "experts" in name):
        by_expert = lora.d_lora_A(name).view(11, 5, -1)
        assert all(by_expert[expert].eq(0).all() for expert in range(11) if expert not in chosen)


@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_without_tokens_have_the_gradients_of_peft(variant: str) -> None:
    adapted = attach_lora(tiny_model(variant), rank=5, alpha=8.5)
    decoder, batch = decoder_like(adapted, 1.7), supervise(tiny_documents([2, 1]))
    peft_loss(adapted, batch).backward()
    decoder.loss_and_gradients(batch, 1.0)
    theirs = peft_gradients(adapted)
    for name, gradient in our_gradients(decoder.lora).items():
        assert relative_error(gradient, theirs[name]) <= 1e-5, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tie_is_broken_as_transformers_breaks_it(variant: str) -> None:
    """All experts are equally likely, or every second one."""
    for step in (1, 2):
        model = tiny_model(variant)
        with torch.no_grad():
            for name, router in model.named_parameters():
                if name.endswith(("mlp.gate.weight", "mlp.router.weight", "mlp.router.bias")):
                    router[::step] = 0.0
        adapted = attach_lora(model, rank=5, alpha=8.5)
        decoder, batch = decoder_like(adapted, 1.7), supervise(tiny_documents([13, 9]))
        peft_loss(adapted, batch).backward()
        decoder.loss_and_gradients(batch, 1.0)
        document = tiny_documents([13])[0]
        assert relative_error(decoder.logits(document), full_logits(adapted, document)) <= 1e-5
        theirs = peft_gradients(adapted)
        for name, gradient in our_gradients(decoder.lora).items():
            assert relative_error(gradient, theirs[name]) <= 1e-5, name


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "as stored"])
@pytest.mark.parametrize("variant", ["qwen3_moe", "mixtral", "granite4-experts"])
def test_matrices_apart_and_in_stacks_are_the_same_model(variant: str, quantized: bool, tmp_path: Path) -> None:
    model = tiny_model(variant)
    model.save_pretrained(tmp_path / "apart")
    model.save_pretrained(tmp_path / "stacks", save_original_format=False)
    stored = []
    for place in ("apart", "stacks"):
        with safe_open(tmp_path / place / "model.safetensors", "pt") as file:
            stored.append(set(file.keys()))
    assert any(name.endswith(".experts.down_proj") for name in stored[1] - stored[0])
    sources = [open_model(tmp_path / place) for place in ("apart", "stacks")]
    assert set(sources[0].tensor_names()) == set(sources[1].tensor_names())
    assert {hub_name(model.config.model_type, name) for name in sources[0].tensor_names()} == stored[0]
    document = tiny_documents([19])[0]
    expected = full_logits(model, document)
    for source in sources:
        decoder = Decoder.from_source(source, dtype=torch.float32, quantized=quantized)
        assert relative_error(decoder.logits(document), expected) <= 1e-5


def test_experts_next_to_an_mlp_stay_frozen(tmp_path: Path) -> None:
    """Neither they nor the router can be adapted. Without Mamba-2, no GGUF file is made of them."""
    model = tiny_model("granite4-experts", layer_types=["attention"] * 3)
    base, adapter = save_tiny(model, tmp_path / "base"), save_tiny_adapter(model, tmp_path / "adapter", alpha=10)
    shapes = Decoder.from_source(open_model(base), dtype=torch.float32).module_shapes()
    assert not shapes.experts and "model.layers.1.shared_mlp.input_linear" in shapes
    assert {f"model.layers.1.mlp.{name}.weight" for name in ("router", "experts.10.up_proj")} <= {*shapes.frozen}
    with pytest.raises(ArtifactError, match="no GGUF format of this granitemoehybrid"):
        merge_command(MergeOptions(adapter=adapter, output=tmp_path / "m.gguf", model=str(base), quiet=True))
    options = ExportOptions(adapter=adapter, to="gguf", output=tmp_path / "a.gguf", model=str(base), quiet=True)
    with pytest.raises(UsageError, match="give --to peft"):
        export_command(options)


def test_the_names_of_one_experts_matrix() -> None:
    name = "model.layers.3.mlp.experts.12.up_proj.weight"
    assert parse_expert_name(name) == ("model.layers.3", 12, "up_proj")
    assert expert_parameter(name) == "model.layers.3.mlp.experts.gate_up_proj"
    assert expert_parameter("model.layers.3.mlp.up_proj.weight") is None
    assert hub_name("mixtral", name) == "model.layers.3.block_sparse_moe.experts.12.w3.weight"
    assert hub_name("mixtral", "model.layers.3.mlp.gate.weight") == "model.layers.3.block_sparse_moe.gate.weight"
    assert hub_name("qwen3_moe", name) == name
    assert hub_name("granitemoehybrid", name) == "model.layers.3.block_sparse_moe.input_linear.weight"
    assert hub_name("gpt_oss", name) == "model.layers.3.mlp.experts.gate_up_proj"
    assert hub_name("gpt_oss", name.replace("up_proj.weight", "down_proj.bias")).endswith("experts.down_proj_bias")
    assert expert_parameter(name.replace(".weight", ".bias")) is None


def test_a_stack_of_another_number_of_experts_is_named(tmp_path: Path) -> None:
    path = write_tiny_gguf(tiny_model("mixtral"), tmp_path / "tiny.gguf", extra={"llama.expert_count": 6})
    with pytest.raises(ArtifactError, match=r"mlp\.(gate|experts\.\d+).*weight"):
        Decoder.from_source(open_model(path), dtype=torch.float32)


def test_matrices_of_one_type_each_in_a_file(tmp_path: Path) -> None:
    model = tiny_model("mixtral", hidden_size=64, intermediate_size=96, head_dim=32)
    kinds = {"gate": StorageType.Q8_0, "up": StorageType.Q4_0, "down": StorageType.F16}
    path = write_tiny_gguf(
        model,
        tmp_path / "tiny.gguf",
        storage=lambda name: next(
            (kind for part, kind in kinds.items() if f"ffn_{part}_exps" in name), StorageType.F32
        ),
    )
    quantized = Decoder.from_source(open_model(path), dtype=torch.float32, quantized=True)
    block = quantized.weights.blocks[0]
    assert {part.type_id for part in block.gate_up.parts} == {int(StorageType.Q8_0), int(StorageType.Q4_0)}
    assert len(block.gate_up.parts) == 10 and block.gate_up.shape == (5 * 2 * 96, 64)
    document = tiny_documents([19])[0]
    dense = Decoder.from_source(open_model(path), dtype=torch.float32)
    assert torch.equal(quantized.logits(document), dense.logits(document))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 12}, "12 of 11 experts"),
        ({"num_experts": 2**40, "num_local_experts": 2**40}, "is not a valid mixture"),
        ({"mlp_only_layers": ["1"]}, "not a list of layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ],
)
def test_no_mixture(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        decoder_config({**tiny_config("qwen3_moe").to_dict(), **changes})


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_by_either_name(name: str) -> None:
    config = json.loads(json.dumps(tiny_config("qwen3_moe").to_dict()))
    count = next(config.pop(key) for key in ("num_experts", "num_local_experts") if key in config)
    mixture = decoder_config({**config, name: count}).mixture
    assert mixture is not None and mixture.experts == count == 11


def test_which_layers_have_experts() -> None:
    config = tiny_config("qwen3_moe").to_dict() | {"num_hidden_layers": 7}
    layers = decoder_config({**config, "decoder_sparse_step": 2, "mlp_only_layers": [3]}).layers
    assert [layer.experts for layer in layers] == [False, True, False, False, False, True, False]
    none = decoder_config({**config, "mlp_only_layers": list(range(7))})
    assert none.mixture is None and not any(layer.experts for layer in none.layers)
