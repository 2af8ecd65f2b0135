"""GGUF files give back the tensors and the configuration they were written from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as StorageType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backhand.errors import ArtifactError
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.weights import empty_weights, named_views
from backhand.nn.families.config_fields import UNREAD, UnsupportedModel
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.families.rotary_frequencies import inverse_frequencies
from backhand.nn.loading import fill, open_model
from backhand.nn.loading.gguf_config import huggingface_config
from backhand.nn.loading.gguf_file import GGUFFile
from tests.support.in_memory import experts_apart
from tests.support.llama_cpp import LlamaCpp
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import (
    GPT_OSS_OF_LLAMA_CPP,
    ORIGINAL_LENGTH,
    VARIANTS,
    VOCAB_SIZE,
    full_logits,
    tiny_config,
    tiny_documents,
    tiny_model,
)

_GRANITE4 = ("granitemoehybrid", "granite4-nope")
_NOT_STORED = ("bamba-steps", "falcon-norm", "nemotron-biases")

# What cannot be written into a file of their architecture: a sliding window, a scale, biases.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "lfm2-biases": {"conv_bias": False},
    "bamba": {"mamba_proj_bias": False, "mlp_bias": True},
    # The file's weights contain the multipliers.
    "falcon_h1": {
        **{f"attention_{end}_multiplier": 1.0 for end in ("in", "out")},
        **{f"ssm_{end}_multiplier": 1.0 for end in ("in", "out")},
        **{f"{module}_multiplier": 1.0 for module in ("embedding", "lm_head", "key")},
        "mlp_multipliers": [1.0] * 2,
        "ssm_multipliers": [1.0] * 5,
    },
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 14},
    "gemma3_text": {"query_pre_attn_scalar": 14},
    "gpt_oss": GPT_OSS_OF_LLAMA_CPP,
}
# Files say nothing of the window of these, nor that experts are weighed by their share among all; and llama.cpp's
# converter makes a Granite 3 of a Granite 4 without Mamba layers and experts.
_VARIANTS = [
    variant
    for variant in VARIANTS
    if not variant.endswith(("-window", "-shares")) and variant not in _GRANITE4 and not variant.startswith(_NOT_STORED)
]


@pytest.mark.parametrize("variant", _VARIANTS)
def test_tensors_equal_the_model(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant, **_OVERRIDES.get(variant, {}))
    source = open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf"))
    expected = experts_apart(model.state_dict(), model.config.model_type)
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert set(source.tensor_names()) == set(expected)
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        loaded = source.load(name)
        if name.endswith("A_log"):
            torch.testing.assert_close(loaded, tensor, rtol=1e-6, atol=1e-7)  # its exponential is stored
        elif variant.startswith(("gemma2", "gemma3", "qwen3_5")) and name.endswith("norm.weight"):
            # Stored with 1 added, the last bits of a small number are gone; 1 + weight, which is used, is exact.
            assert torch.equal(1 + loaded, 1 + tensor)
        else:
            assert torch.equal(loaded, tensor), name


@pytest.mark.parametrize("variant", _VARIANTS)
def test_configuration_equals_the_models(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant, **_OVERRIDES.get(variant, {}))
    parsed = decoder_config(open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf")).config)
    expected = decoder_config(model.config.to_dict())
    if variant == "mistral":
        expected = replace(expected, family="llama")
    # Factors are float32 in the file, and it has a number of pairs for Gemma 4's share of them.
    in_file = ("llama3", "lfm2-biases", "exaone4-full", "qwen3-yarn", "phi3-longrope")
    if variant in in_file or variant.startswith("gemma4"):
        for ours, theirs, dim in zip(parsed.rotary, expected.rotary, expected.rotary_dims, strict=True):
            for length in (ORIGINAL_LENGTH, ORIGINAL_LENGTH + 1):
                found, reference = (inverse_frequencies(each, dim, length=length) for each in (ours, theirs))
                torch.testing.assert_close(found, reference, rtol=5e-7, atol=0)
            assert ours.attention_factor == pytest.approx(theirs.attention_factor, rel=1e-7)
            assert ours.features == theirs.features
        parsed = replace(parsed, rotary=expected.rotary)
    assert parsed == expected


def test_a_granite_4_of_attention_alone_is_read_as_llama_cpp_has_it(tmp_path: Path) -> None:
    model, ids = tiny_model("granitemoehybrid"), tiny_documents([20])[0]
    source = open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf"))
    assert source.config["model_type"] == "granite"
    decoder = Decoder.from_source(source, dtype=torch.float64)
    expected = full_logits(model.double(), ids)
    # The file has the multipliers in float32.
    assert float((decoder.logits(ids) - expected).norm() / expected.norm()) < 1e-6


def test_nemotron_hs_epsilon_under_either_name(tmp_path: Path) -> None:
    """llama.cpp takes the second name if the first one is missing."""
    model, name = tiny_model("nemotron_h"), "nemotron_h.attention.layer_norm_rms_epsilon"
    for without in ((), (name,)):
        source = open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf", without=without))
        assert decoder_config(source.config).norm_eps == pytest.approx(model.config.layer_norm_epsilon)


def test_one_without_rotary_embedding_is_no_granite_3(tmp_path: Path) -> None:
    source = open_model(write_tiny_gguf(tiny_model("granite4-nope", attention_bias=False), tmp_path / "tiny.gguf"))
    with pytest.raises(UnsupportedModel, match=r"granite\.rope\.scaling\.finetuned = False"):
        decoder_config(source.config)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_tensors_equal_transformers_reading_the_same_file(variant: str, tmp_path: Path) -> None:
    # transformers takes no head_dim from a Qwen file.
    overrides = _OVERRIDES | {"qwen2": {"head_dim": 10}, "qwen3": {"head_dim": 128}}
    model = tiny_model(variant, **overrides.get(variant, {}))
    source = open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    expected = theirs.state_dict()
    for name in source.tensor_names():
        assert torch.equal(source.load(name), expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", [StorageType.F16, StorageType.BF16, StorageType.Q8_0, StorageType.Q4_1])
@pytest.mark.parametrize("variant", ["llama-biases", "qwen2", "gemma3_text"])
def test_quantized_tensors_keep_their_rows_and_are_rounded_once(
    variant: str, storage: StorageType, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model(variant, hidden_size=96, intermediate_size=160, head_dim=32)
    source = open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf", storage=storage))
    config = decoder_config(source.config)
    weights = empty_weights(config, dtype)
    fill(source, named_views(weights, config))
    for name, view in named_views(weights, config):
        expected = model.state_dict()[name]
        if expected.dim() == 2:
            # Rows are quantized one by one, so that quantizing them in their own order gives the same numbers.
            stored = gguf.quants.quantize(expected.numpy(), storage)
            expected = torch.from_numpy(gguf.dequantize(stored, storage).astype(np.float32))
        elif variant.startswith("gemma") and name.endswith("norm.weight"):
            expected = (expected + 1) - 1
        assert torch.equal(view, expected.to(dtype)), name
        assert torch.equal(source.load(name).to(dtype), view)


def test_published_llama3_scaling_is_recognised(tmp_path: Path) -> None:
    rule = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model("llama3", head_dim=64, max_position_embeddings=131072, rope_parameters=rule)
    source = open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf"))
    assert source.config["rope_parameters"] == rule
    assert decoder_config(source.config) == decoder_config(model.config.to_dict())


def test_a_config_from_a_file_is_transformers_own(tmp_path: Path) -> None:
    for variant in _VARIANTS:
        model = tiny_model(variant, **_OVERRIDES.get(variant, {}))
        source = open_model(write_tiny_gguf(model, tmp_path / f"{variant}.gguf"))
        theirs = transformers.AutoConfig.for_model(**source.config)
        assert decoder_config(theirs.to_dict()) == decoder_config(source.config)


def test_parts_of_a_split_model_open_by_any_of_them(tmp_path: Path) -> None:
    model = tiny_model("llama")
    first = write_tiny_gguf(model, tmp_path / "tiny.gguf", parts=3)
    assert len(list(tmp_path.iterdir())) == 3
    for path in (first, tmp_path / "tiny-00003-of-00003.gguf", tmp_path):
        source = open_model(path)
        assert all(torch.equal(source.load(name), tensor) for name, tensor in model.state_dict().items())
    (tmp_path / "tiny-00002-of-00003.gguf").unlink()
    with pytest.raises(ArtifactError, match=r"1 of 3 parts .* tiny-00002-of-00003\.gguf"):
        open_model(first)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("llama.expert_shared_count", 8, r"llama\.expert_shared_count = 8"),
        ("llama.attention.clamp_kqv", 1, r"llama\.attention\.clamp_kqv = 1"),
        ("llama.rope.dimension_count", 6, "partial_rotary_factor"),
        ("llama.attention.value_length", 12, r"llama\.attention\.value_length = 12"),
    ],
)
def test_metadata_that_nobody_understands_is_refused(key: str, value: int, named: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    if key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        content = write_tiny_gguf(tiny_model("llama"), path).read_bytes()
        place = content.index(key.encode()) + len(key) + 4
        path.write_bytes(content[:place] + value.to_bytes(4, "little") + content[place + 4 :])
    else:
        write_tiny_gguf(tiny_model("llama"), path, extra={key: value})
    with pytest.raises(UnsupportedModel, match=named):
        decoder_config(open_model(path).config)


def test_metadata_without_effect_is_no_obstacle(tmp_path: Path) -> None:
    extra = {"llama.expert_count": 0, "llama.expert_used_count": 0, "general.file_type": 0, "other.key": 3}
    path = write_tiny_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", extra=extra)
    assert decoder_config(open_model(path).config) == decoder_config(tiny_config("llama").to_dict())


def test_a_sliding_window_makes_a_mistral(tmp_path: Path) -> None:
    path = write_tiny_gguf(tiny_model("mistral"), tmp_path / "tiny.gguf", extra={"llama.attention.sliding_window": 8})
    assert decoder_config(open_model(path).config) == decoder_config(tiny_config("mistral").to_dict())


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
@pytest.mark.parametrize(("kind", "scales"), [(None, True), ("linear", True), ("none", False)])
def test_a_rotary_factor_without_a_type_is_linear_as_in_llama_cpp(
    key: str, kind: str | None, scales: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)

    whole_number = gguf.GGUFWriter.add_uint32
    extra = {key: 4.0} | ({} if kind is None else {"llama.rope.scaling.type": kind})
    with monkeypatch.context() as patched:
        patched.setattr(
            gguf.GGUFWriter,
            "add_uint32",
            lambda writer, key, value: (add if key in extra else whole_number)(writer, key, value),
        )
        path = write_tiny_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", extra=extra)
    (rotary,) = decoder_config(open_model(path).config).rotary
    assert dict(rotary.scaling or ()) == ({"rope_type": "linear", "factor": 4.0} if scales else {})
    document = tiny_documents([40], vocab_size=300)[0]
    ours = Decoder.from_source(open_model(path), dtype=torch.float32).logits(document)[-1].double().log_softmax(-1)
    theirs = LlamaCpp(path).log_probabilities(document.tolist(), VOCAB_SIZE)
    assert float((ours - theirs).abs().max()) < 1e-4


def test_rotary_divisors_that_are_not_one_for_each_frequency_are_an_error(tmp_path: Path) -> None:
    path = write_tiny_gguf(tiny_model("llama3"), tmp_path / "tiny.gguf")
    file = GGUFFile(path)
    with pytest.raises(ArtifactError, match=r"rope_freqs\.weight has 6 numbers"):
        huggingface_config(file, "llama", {"rope_freqs.weight": torch.full((6,), 2.0)})


def test_gemma_of_62_layers_scales_queries_by_hidden_over_heads(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text", num_hidden_layers=62, hidden_size=12, intermediate_size=8, head_dim=4)
    source = open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf"))
    assert source.config["query_pre_attn_scalar"] == 12 // 6


def _rewritten(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert len(old) == len(new)
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def test_files_that_are_no_known_model(tmp_path: Path) -> None:
    def fresh() -> Path:
        return write_tiny_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")

    with pytest.raises(ArtifactError, match="architecture 'bloom'"):
        open_model(_rewritten(fresh(), b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom"))
    with pytest.raises(ArtifactError, match=r"token_embd\.weight is missing"):
        open_model(_rewritten(fresh(), b"token_embd.weight", b"token_emb_.weight"))
    with pytest.raises(UnsupportedModel, match=r"blk\.1\.ffn_gato\.weight"):
        decoder_config(open_model(_rewritten(fresh(), b"blk.1.ffn_gate.weight", b"blk.1.ffn_gato.weight")).config)
    with pytest.raises(ArtifactError, match="block_count"):
        open_model(_rewritten(fresh(), b"llama.block_count", b"llama.block_cound"))
    source = open_model(_rewritten(fresh(), b"blk.1.ffn_gate.weight", b"blk.9.ffn_gate.weight"))
    config = decoder_config(source.config)
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.gate_proj\.weight \(76, 60\) is missing"):
        fill(source, named_views(empty_weights(config, torch.float32), config))


def test_a_bias_on_queries_alone_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tiny_model("llama-biases"), tmp_path / "tiny.gguf")
    for layer in range(3):
        name = f"blk.{layer}.attn_output.bias".encode()
        _rewritten(path, name, name.replace(b"output", b"oooput"))
    source = open_model(path)
    assert "blk.0.attn_q.bias" in source.config[UNREAD]["tensors of the GGUF file"]
    with pytest.raises(UnsupportedModel, match="tensors of the GGUF file"):
        decoder_config(source.config)


def test_an_adapter_is_not_a_base_model(tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArtifactError, match="is an adapter"):
        open_model(path)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_tiny_gguf(tiny_model("gemma3_text"), path).read_bytes()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(st.integers(0, 1600), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_metadata_is_read_or_refused(changes: list[tuple[int, int]], gemma: bytes, tmp_path: Path) -> None:
    content = bytearray(gemma)
    for place, byte in changes:
        content[place] = byte
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    try:
        source = open_model(path)
        decoder_config(source.config)
        source.tokenizer()
    except ArtifactError:
        return
    assert source.tensor_names()


@pytest.mark.smollm2
def test_smollm2_equals_the_gguf_package() -> None:
    source = open_model("smollm2-135m")
    assert source.hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert source.config["rms_norm_eps"] == 1e-5
    config = decoder_config(source.config)
    assert (config.hidden_size, len(config.layers), config.num_heads, config.num_key_value_heads) == (576, 30, 9, 3)
    file = GGUFFile(source.path)
    for name, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v"), ("self_attn.q_proj", "attn_q")):
        tensor = file.tensors[f"blk.7.{theirs}.weight"]
        rows = file.bytes_of(tensor).reshape(tensor.shape[0], -1)
        expected = torch.from_numpy(gguf.dequantize(rows, StorageType(tensor.type_id)))
        if theirs == "attn_q":
            expected = expected.view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
        assert torch.equal(source.load(f"model.layers.7.{name}.weight"), expected)
