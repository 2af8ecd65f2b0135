"""Gemma 4: shared keys and values, per-layer embeddings, and the other contents of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter
from backhand.errors import ArtifactError, UsageError
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.config_fields import UnsupportedModel
from backhand.nn.families.family import PER_LAYER_MODEL
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import open_model
from tests.support.parity import decoder_like, our_gradients, peft_gradients, peft_loss, relative_error, supervise
from tests.support.tiny_models import attach_lora, full_logits, save_tiny, tiny_config, tiny_documents, tiny_model

RANK, ALPHA = 5, 8.5
LENGTHS = (23, 9, 9, 1, 18)
VARIANTS = ("gemma4_text", "gemma4-keys")


def adapted_pair(variant: str, targets: str = "all-linear") -> tuple[Any, Decoder, PackedBatch]:
    adapted = attach_lora(tiny_model(variant), rank=RANK, alpha=ALPHA, target_modules=targets)
    return adapted, decoder_like(adapted, ALPHA / RANK), supervise(tiny_documents(LENGTHS))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (r"model\.layers\.2\.self_attn\.(k|v)_proj", 2),  # three layers use what they make
        (r"model\.layers\.1\.self_attn\.v_proj", 1),
        (r"model\.layers\.5\.self_attn\.(q|o)_proj", 2),
        (r"model\.layers\.6\.per_layer_projection", 1),
        (r"model\.layers\.[26]\.per_layer_input_gate", 2),
        (r"model\.per_layer_model_projection", 1),
        (r"model\.per_layer_model_projection|model\.layers\.3\.mlp\.down_proj", 2),
    ],
)
def test_parts_of_the_model_adapted(targets: str, expected: int) -> None:
    adapted, decoder, batch = adapted_pair("gemma4_text", targets)
    peft_loss(adapted, batch).backward()
    decoder.loss_and_gradients(batch, 1.0)
    assert decoder.lora is not None
    ours, theirs = our_gradients(decoder.lora), peft_gradients(adapted)
    assert ours.keys() == theirs.keys() and len(theirs) == 2 * expected
    for name, gradient in theirs.items():
        assert relative_error(ours[name], gradient) <= 1e-5, name


def test_what_layers_share_and_what_not() -> None:
    """Four of seven layers use others' keys: two sliding and full ones, by the last of their kind before them."""
    layers = decoder_config(tiny_config("gemma4_text").to_dict()).layers
    assert [layer.kv_source for layer in layers] == [None, None, None, 1, 2, 1, 1]
    assert [layer.sizes and layer.sizes.head_dim for layer in layers] == [14, 18, 14, 18, 14, 18, 18]
    assert [layer.sizes and layer.sizes.intermediate_size for layer in layers] == [76] * 3 + [152] * 4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shared", [1, 9])
def test_a_shared_prefix_equals_whole_documents(variant: str, shared: int) -> None:
    adapted, _, _ = adapted_pair(variant)
    decoder = decoder_like(adapted.double(), ALPHA / RANK, dtype=torch.float64)
    assert decoder.lora is not None
    (prefix,), endings = tiny_documents((shared,), seed=5), tiny_documents((7, 1, 12), seed=6)
    whole = [torch.cat([prefix, ending]) for ending in endings]
    labels = [torch.cat([torch.full((shared,), -100), supervise([ending], share=1.0).labels]) for ending in endings]
    apart = PackedBatch(torch.cat(whole), torch.cat(labels), tuple(len(one) for one in whole))
    own = torch.cat([labels[0][:shared], *(each[shared:] for each in labels)])
    lengths = (shared, *(len(one) for one in endings))
    together = PackedBatch(torch.cat([prefix, *endings]), own, lengths, (-1, 0, 0, 0))
    found = []
    for batch in (apart, together):
        decoder.lora.gradients.zero_()
        found.append((decoder.loss_and_gradients(batch, 0.1), decoder.lora.gradients.clone()))
    (loss, gradient), (shared_loss, shared_gradient) = found
    assert abs(loss - shared_loss).item() <= 1e-12 * loss.item()
    assert relative_error(shared_gradient, gradient) <= 1e-10


def test_keys_that_nobody_reads_are_left_out(tmp_path: Path) -> None:
    """Released checkpoints have k_proj, v_proj and k_norm in every layer, also where another layer's are used."""
    model = tiny_model("gemma4_text")
    path = save_tiny(model, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    for layer in (3, 6):
        for name in ("k_proj", "v_proj"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.full((36, 60), float("nan"))
        tensors[f"model.layers.{layer}.self_attn.k_norm.weight"] = torch.full((18,), float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_model(tmp_path)
    assert "model.layers.3.self_attn.k_proj.weight" not in source.tensor_names()
    assert "model.layers.2.self_attn.k_proj.weight" in source.tensor_names()
    document = tiny_documents([21])[0]
    ours = Decoder.from_source(source, dtype=torch.float32).logits(document)
    assert relative_error(ours, full_logits(model, document)) <= 1e-5


def test_a_pass_does_not_start_above_a_layer_whose_keys_are_used_there() -> None:
    config = decoder_config(tiny_config("gemma4_text").to_dict())
    assert [config.start_layer(layer) for layer in range(7)] == [0, 1, 1, 1, 1, 1, 1]
    assert decoder_config(tiny_config("gemma4-keys").to_dict()).start_layer(3) == 3


def test_experts_next_to_the_mlp_are_refused() -> None:
    config = tiny_config("gemma4_text").to_dict()
    with pytest.raises(UnsupportedModel, match="26B-A4B"):
        decoder_config({**config, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2})


def test_attention_in_both_directions_is_refused() -> None:
    config = tiny_config("gemma4_text").to_dict()
    with pytest.raises(UnsupportedModel, match="use_bidirectional_attention"):
        decoder_config({**config, "use_bidirectional_attention": "all"})


@pytest.mark.parametrize("sharing", [6, 7])
def test_layers_without_keys_to_use_are_refused(sharing: int) -> None:
    config = tiny_config("gemma4_text").to_dict()
    with pytest.raises(ArtifactError, match=r"num_kv_shared_layers|share the keys"):
        decoder_config({**config, "num_kv_shared_layers": sharing})


def test_older_and_newer_ways_to_say_the_sizes_agree() -> None:
    for variant in VARIANTS:
        config = tiny_config(variant).to_dict()
        older = {key: value for key, value in config.items() if key != "per_layer_config"}
        older |= {"global_head_dim": 18, "num_global_key_value_heads": 3}
        assert decoder_config(older) == decoder_config(config)


@pytest.mark.parametrize("name", ["embed_tokens_per_layer", PER_LAYER_MODEL.rpartition(".")[2]])
def test_what_makes_the_inputs_is_trained_by_factors_alone(name: str) -> None:
    shapes = adapted_pair("gemma4_text")[1].module_shapes()
    assert shapes[PER_LAYER_MODEL] == (182, 60)
    with pytest.raises(UsageError, match="cannot be trained"):
        resolve_adapter(LoRAConfig(target_modules=("q_proj",), modules_to_save=(name,)), shapes)
