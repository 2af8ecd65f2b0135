"""gpt-oss: OpenAI's checkpoints with experts in MXFP4 blocks, their configurations, and the effect of sinks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as StorageType
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from backhand.errors import ArtifactError, UsageError
from backhand.generation.held_base import weight_bytes
from backhand.interop.merging import describe_base
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.family_parsing import UnsupportedModel, decoder_config
from backhand.nn.families.rotary_frequencies import inverse_frequencies
from backhand.nn.loading import open_model
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.quantizing import QuantizingSource
from tests.support.llama_cpp import LlamaCpp
from tests.support.parity import decoder_like, relative_error, supervise
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import (
    GPT_OSS_OF_LLAMA_CPP,
    VOCAB_SIZE,
    attach_lora,
    full_logits,
    tiny_documents,
    tiny_model,
)
from tests.support.tiny_mxfp4 import IN_BLOCKS, QUANTIZATION, save_packed

_PUBLISHED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": QUANTIZATION,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}
"""config.json as the 20-billion-parameter model has it."""


def _transformers_model(packed: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """The same in memory, unpacked by transformers."""
    model = tiny_model("gpt_oss", **IN_BLOCKS)
    with torch.no_grad():
        for name, (blocks, scales) in packed.items():
            unpacked = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            model.get_parameter(name).copy_(unpacked)
    return model


def test_blocks_of_a_checkpoint_are_the_numbers_that_transformers_makes_of_them(tmp_path: Path) -> None:
    model = _transformers_model(save_packed(tmp_path))
    source = open_model(tmp_path)
    document = tiny_documents([19])[0]
    decoder = Decoder.from_source(source, dtype=torch.float32)
    assert relative_error(decoder.logits(document), full_logits(model, document)) <= 1e-5
    expected = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[3, :, 1::2].T
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert source.shape(name) == tuple(expected.shape) == (96, 64)
    assert source.load(name).dtype == torch.bfloat16 and torch.equal(source.load(name).float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_they_are_stored_they_are_the_same_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    save_packed(tmp_path)
    source = open_model(tmp_path)
    assert source.quantized and weight_bytes(source, dtype, quantized=True) < weight_bytes(
        source, dtype, quantized=False
    )
    document = tiny_documents([19])[0]
    dense = Decoder.from_source(source, dtype=dtype)
    quantized = Decoder.from_source(source, dtype=dtype, quantized=True)
    assert {part.type_id for part in quantized.weights.blocks[0].down.parts} == {int(StorageType.MXFP4)}
    assert torch.equal(quantized.logits(document), dense.logits(document))


def test_blocks_are_not_rounded_again_and_a_merge_names_them(tmp_path: Path) -> None:
    save_packed(tmp_path)
    source = open_model(tmp_path)
    assert "MXFP4" in describe_base(source)
    with pytest.raises(UsageError, match="rounded twice"):
        QuantizingSource(source, "q8_0")


def test_so_are_those_of_a_file_in_circulation(tmp_path: Path) -> None:
    """Experts in MXFP4, all else in Q8_0 or float32."""
    model = tiny_model("gpt_oss", **IN_BLOCKS, **GPT_OSS_OF_LLAMA_CPP)
    path = write_tiny_gguf(
        model,
        tmp_path / "tiny.gguf",
        storage=lambda name: StorageType.MXFP4 if "_exps" in name else StorageType.F32,
    )
    document = tiny_documents([33], vocab_size=300)[0]
    dense = Decoder.from_source(GGUFModel(path), dtype=torch.float32)
    quantized = Decoder.from_source(GGUFModel(path), dtype=torch.float32, quantized=True)
    assert {part.type_id for part in quantized.weights.blocks[1].gate_up.parts} == {int(StorageType.MXFP4)}
    assert torch.equal(quantized.logits(document), dense.logits(document))
    theirs = LlamaCpp(path).log_probabilities(document.tolist(), VOCAB_SIZE)
    ours = dense.logits(document)[-1].double().log_softmax(-1)
    assert float((ours - theirs).abs().max()) < 0.3  # llama.cpp rounds what enters an expert to eight bits


def test_blocks_without_scales_are_said(tmp_path: Path) -> None:
    packed = save_packed(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    name = next(iter(packed))
    save_file({**tensors, f"{name}_scales": tensors[f"{name}_scales"][:-1]}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="does not have one scale per block"):
        open_model(tmp_path)
    del tensors[f"{name}_scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="is missing"):
        Decoder.from_source(open_model(tmp_path), dtype=torch.float32)


def test_the_published_configuration() -> None:
    config = decoder_config(_PUBLISHED)
    assert [layer.window for layer in config.layers[:4]] == [128, None, 128, None]
    assert config.sinks and config.qkv_bias and config.output_bias and not config.tied_head
    mixture = config.mixture
    assert mixture is not None and (mixture.experts, mixture.chosen, mixture.width) == (32, 4, 2880)
    assert mixture.clamp == (1.702, 7.0) and mixture.bias and mixture.interleaved and not mixture.of_all
    (note,) = config.notes
    assert note.endswith("no gpt_oss model of transformers reads: experts_per_token, initial_context_length")
    shapes = module_shapes(config)
    assert shapes.experts["model.layers.0.mlp.experts.gate_up_proj"] == (32, 5760, 2880)
    assert "model.layers.0.self_attn.sinks" in shapes.frozen
    assert "model.layers.0.mlp.router.bias" in shapes.frozen


def test_what_a_silent_configuration_means() -> None:
    """As its class has it: yarn's angles, every second layer with a window of 128."""
    silent = {key: value for key, value in _PUBLISHED.items() if key not in _DEFAULTS}
    found, reference = decoder_config(silent), decoder_config(_PUBLISHED)
    assert found.layers == reference.layers and found.mixture == reference.mixture and found.qkv_bias
    one, other = (inverse_frequencies(config.rotary[0], 64) for config in (found, reference))
    assert torch.equal(one, other)
    assert found.rotary[0].attention_factor == reference.rotary[0].attention_factor


_DEFAULTS = ("rope_scaling", "rope_theta", "layer_types", "sliding_window", "swiglu_limit", "attention_bias")


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8"])
def test_other_quantizations_are_refused(method: str) -> None:
    with pytest.raises(UnsupportedModel, match="quantization_config"):
        decoder_config({**_PUBLISHED, "quantization_config": {"quant_method": method}})


def test_blocks_of_another_family_are_refused() -> None:
    llama = {**tiny_model("llama").config.to_dict(), "quantization_config": {"quant_method": "mxfp4"}}
    with pytest.raises(UnsupportedModel, match="quantization_config"):
        decoder_config(llama)


def test_a_sink_that_is_far_below_all_scores_is_none() -> None:
    adapted = attach_lora(tiny_model("gpt_oss"), rank=5, alpha=8.5)
    batch, found = supervise(tiny_documents([19, 9])), {}
    for kind in ("usual", "far below", "none"):
        decoder = decoder_like(adapted, 1.7)
        for block in decoder.weights.blocks:
            assert block.sinks is not None
            if kind == "none":
                block.sinks = None
            elif kind == "far below":
                block.sinks.fill_(-1e4)
        loss = decoder.loss_and_gradients(batch, 1.0)
        assert decoder.lora is not None
        found[kind] = torch.cat([loss[None], decoder.lora.gradients.double()])
    assert relative_error(found["far below"], found["none"]) <= 1e-6
    assert relative_error(found["usual"], found["none"]) > 0.05
