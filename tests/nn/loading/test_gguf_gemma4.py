"""Gemma 4's files: omitted keys, unused tensors, and metadata that no model has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter
from backhand.engines.memory.parts import decoder_size
from backhand.errors import ArtifactError
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.config_fields import UnsupportedModel
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.families.rotary_frequencies import inverse_frequencies
from backhand.nn.loading import open_model
from tests.support.llama_cpp import LlamaCpp
from tests.support.parity import relative_error
from tests.support.tiny_gguf import rewritten, write_tiny_gguf
from tests.support.tiny_models import VOCAB_SIZE, full_logits, tiny_documents, tiny_model

_AS_LLAMA_CPP: dict[str, Any] = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
_SCALING = {"gemma4.rope.scaling.type": "linear", "gemma4.rope.scaling.factor": 4.0}


def _file(tmp_path: Path, **given: Any) -> Path:
    return write_tiny_gguf(tiny_model("gemma4_text", **_AS_LLAMA_CPP), tmp_path / "tiny.gguf", **given)


def _difference(path: Path) -> float:
    ids = tiny_documents([33], vocab_size=300)[0]
    ours = Decoder.from_source(open_model(path), dtype=torch.float32).logits(ids).double().log_softmax(-1)
    peer = LlamaCpp(path)
    lengths = (1, 9, 20, 33)
    return max(
        float((ours[length - 1] - peer.log_probabilities(ids[:length].tolist(), VOCAB_SIZE)).abs().max())
        for length in lengths
    )


def test_keys_that_nobody_reads_are_left_out(tmp_path: Path) -> None:
    """Converters write k_proj, v_proj and k_norm of every layer, also where another layer's are used."""
    model = tiny_model("gemma4_text", **_AS_LLAMA_CPP)
    unread: dict[str, np.ndarray[Any, Any] | None] = {}
    for layer, size in ((2, 28), (3, 36)):
        of_layer = {"attn_k": (size, 60), "attn_v": (size, 60), "attn_k_norm": (size // 2,)}
        for name, shape in of_layer.items():
            unread[f"blk.{layer}.{name}.weight"] = np.full(shape, np.nan, dtype=np.float32)
    path = rewritten(_file(tmp_path), tmp_path / "more.gguf", tensors=unread)
    source = open_model(path)
    assert "model.layers.2.self_attn.k_proj.weight" not in source.tensor_names()
    assert "model.layers.1.self_attn.k_proj.weight" in source.tensor_names()
    document = tiny_documents([21])[0]
    ours = Decoder.from_source(source, dtype=torch.float32).logits(document)
    assert relative_error(ours, full_logits(model, document)) <= 1e-5
    assert _difference(path) < 2e-2  # ggml's GELU is a table of float16


@pytest.mark.parametrize(
    ("without", "extra"),
    [
        (("gemma4.final_logit_softcapping",), {}),
        (("gemma4.rope.freq_base_swa",), {}),
        (("gemma4.rope.dimension_count",), {}),
        ((), _SCALING),
    ],
    ids=["cap", "local base", "turning features", "linear scaling"],
)
def test_what_a_file_leaves_out_and_linear_scaling_are_as_in_llama_cpp(
    without: tuple[str, ...], extra: Mapping[str, Any], tmp_path: Path
) -> None:
    path = _file(tmp_path, without=without, extra=dict(extra))
    assert _difference(path) < 2e-2
    ids = tiny_documents([33])[0]
    plain, stated = (
        Decoder.from_source(open_model(one), dtype=torch.float32).logits(ids)
        for one in (write_tiny_gguf(tiny_model("gemma4_text", **_AS_LLAMA_CPP), tmp_path / "plain.gguf"), path)
    )
    differs = bool(extra) or "gemma4.final_logit_softcapping" in without
    assert (relative_error(stated, plain) > 0.01) is differs


def test_a_cap_of_zero_is_none_and_no_cap_is_thirty(tmp_path: Path) -> None:
    for without, expected in (((), None), (("gemma4.final_logit_softcapping",), 30.0)):
        model = tiny_model("gemma4-keys", attention_bias=False)
        source = open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf", without=without))
        assert decoder_config(source.config).logits.cap == expected


def test_scaled_angles_of_full_layers_are_the_models(tmp_path: Path) -> None:
    rules = {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.6,
            "factor": 3.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    model = tiny_model("gemma4_text", rope_parameters=rules)
    stated, found = (
        decoder_config(config)
        for config in (model.config.to_dict(), open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf")).config)
    )
    for ours, theirs, size in zip(found.rotary, stated.rotary, stated.rotary_dims, strict=True):
        assert torch.equal(inverse_frequencies(ours, size), inverse_frequencies(theirs, size))


@pytest.mark.parametrize("divisors", [[1, 2, 3, 1, 1, 1, 5, 1e30, 1e30], [1, 1, 1e30, 1, 1e30, 1, 1, 1, 1], [1e30] * 9])
def test_a_list_of_divisors_that_is_not_gemmas_rule_is_refused(divisors: list[float], tmp_path: Path) -> None:
    other = {"rope_freqs.weight": np.array(divisors, dtype=np.float32)}
    with pytest.raises(ArtifactError, match=r"rope_freqs\.weight does not follow"):
        open_model(rewritten(_file(tmp_path), tmp_path / "other.gguf", tensors=other))


def test_a_file_without_the_table_of_frequencies_is_refused(tmp_path: Path) -> None:
    path = rewritten(_file(tmp_path), tmp_path / "without.gguf", tensors={"rope_freqs.weight": None})
    with pytest.raises(ArtifactError, match=r"rope_freqs\.weight is missing"):
        open_model(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.sliding_window_pattern", [True, False, True], "has 3 values for 4 layers"),
        ("feed_forward_length", [76, 76, 152], "has 3 numbers for 4 layers"),
        ("attention.key_length_swa", 16, r"attention\.value_length_swa = 14"),
        ("feed_forward_length", [76, 152, 152, 152], r"gemma4\.feed_forward_length = \[76, 152"),
        ("embedding_length_per_layer_input", 8, r"per_layer_input_gate\.weight"),
        ("attention.shared_kv_layers", 4, "leaves no layer with keys and values"),
    ],
)
def test_metadata_that_no_model_has_are_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    path = rewritten(_file(tmp_path), tmp_path / "changed.gguf", changed={f"gemma4.{key}": value})
    with pytest.raises(ArtifactError, match=message):
        Decoder.from_source(open_model(path), dtype=torch.float32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window_pattern", [True, False, True, True]),
        ("rope.dimension_count_swa", 12),
        ("attention.value_length_swa", 12),
    ],
)
def test_what_the_engine_has_not_is_said(key: str, value: Any, tmp_path: Path) -> None:
    model = tiny_model("gemma4_text", **_AS_LLAMA_CPP, global_head_dim=14)  # so that both kinds fit every layer
    plain = write_tiny_gguf(model, tmp_path / "tiny.gguf")
    config = open_model(rewritten(plain, tmp_path / "changed.gguf", changed={f"gemma4.{key}": value})).config
    with pytest.raises(UnsupportedModel, match=key.replace(".", r"\.")):
        decoder_config(config)


@pytest.mark.parametrize("extra", [{"gemma4.expert_count": 4}, {"gemma4.expert_feed_forward_length": 32}])
def test_experts_next_to_the_mlp_are_refused(extra: dict[str, int], tmp_path: Path) -> None:
    """26B-A4B has both."""
    with pytest.raises(UnsupportedModel, match=r"gemma4\.expert_"):
        decoder_config(open_model(_file(tmp_path, extra=extra)).config)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_base_takes_what_is_said_before(quantized: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "hidden_size_per_layer_input": 32}
    model = tiny_model("gemma4_text", **_AS_LLAMA_CPP, **sizes, global_head_dim=32)
    path = write_tiny_gguf(model, tmp_path / "tiny.gguf", storage=gguf.GGMLQuantizationType.Q8_0)
    source = open_model(path)
    config = decoder_config(source.config)
    decoder = Decoder.from_source(source, dtype=torch.bfloat16, quantized=quantized)
    matrices = [view for _, view in decoder.frozen_tensors() if not isinstance(view, torch.Tensor) or view.dim() == 2]
    held = sum(view.numel() * 2 if isinstance(view, torch.Tensor) else view.stored_bytes for view in matrices)
    stored = sum(source.stored_bytes(name) for name in source.tensor_names() if len(source.shape(name)) == 2)
    layout = resolve_adapter(LoRAConfig(rank=4), module_shapes(config))
    assert decoder_size(config, layout, torch.bfloat16, stored if quantized else None).weight_bytes == held
