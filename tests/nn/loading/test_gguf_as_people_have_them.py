"""GGUF files of llama.cpp's quantizer and of common publishers open with the right values, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as StorageType

from backhand.errors import ArtifactError
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.config_fields import FOREIGN, UNREAD, UnsupportedModel
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import open_model
from backhand.nn.loading.gguf_config import huggingface_config
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_metadata import NEUTRAL, NEUTRAL_VALUES, declared_keys
from backhand.nn.loading.gguf_tensors import huggingface_name
from backhand.nn.loading.transformers_model import load_transformers_model
from tests.support.llama_cpp import LlamaCpp
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import VOCAB_SIZE, tiny_config, tiny_documents, tiny_model

Mixture = Callable[[str], StorageType]

# Rows of whole K-quant blocks (256), as models that people have.
_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


def _mixture(body: str, *, v: str = "", down: str = "", o: str = "", embedding: str = "", output: str = "") -> Mixture:
    """Use one type for the blocks. attn_v, half of ffn_down, attn_output, embedding and head may have others."""

    def kind(name: str) -> StorageType:
        part = name.split(".")[-2]
        # The quantiser gives every other ffn_down and attn_v more bits.
        more = name.startswith("blk.0.")
        chosen = {"attn_v": v if more else "", "ffn_down": down if more else "", "attn_output": o}.get(part)
        chosen = {"token_embd": embedding, "output": output}.get(part, chosen)
        return StorageType[chosen or body]

    return kind


MIXTURES: dict[str, Mixture] = {
    "Q2_K": _mixture("Q2_K", v="Q4_K", down="Q3_K", o="Q3_K", output="Q6_K"),
    "Q3_K_L": _mixture("Q3_K", v="Q5_K", down="Q5_K", o="Q5_K", output="Q6_K"),
    "Q4_K_M": _mixture("Q4_K", v="Q6_K", down="Q6_K", output="Q6_K"),
    "Q4_K_L": _mixture("Q4_K", v="Q6_K", down="Q6_K", embedding="Q8_0", output="Q8_0"),
    "Q5_K_S": _mixture("Q5_K", output="Q6_K"),
    "Q6_K": _mixture("Q6_K"),
    "IQ4_XS": _mixture("IQ4_XS", v="Q5_K", down="Q5_K", output="Q6_K"),
    "IQ4_NL": _mixture("IQ4_NL", v="Q5_K", output="Q6_K"),
    "IQ3_S": _mixture("IQ3_S", v="Q4_K", output="Q6_K"),
    "IQ3_XXS": _mixture("IQ3_XXS", v="Q4_K", down="Q4_K", o="IQ3_S", embedding="IQ3_S", output="Q5_K"),
    "IQ2_XXS": _mixture("IQ2_XXS", v="Q4_K", down="Q2_K", o="IQ3_XXS", embedding="Q2_K", output="Q5_K"),
    "TQ1_0": _mixture("TQ1_0", embedding="Q4_K", output="Q6_K"),
    "MXFP4": _mixture("MXFP4", v="Q8_0", embedding="Q8_0", output="Q8_0"),
    "BF16": _mixture("BF16"),
    "Q8_0": _mixture("Q8_0", embedding="F16", output="F32"),
    # Rows that are no whole number of 256 get an older type instead.
    "fallback": _mixture("Q4_K", down="Q5_0", v="Q5_1", embedding="Q8_0", output="Q8_0"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixed_files_hold_what_llama_cpp_has_stored(name: str, tmp_path: Path) -> None:
    """Every tensor equals the gguf package's dequantization of llama.cpp's blocks, in Hugging Face's order."""
    model = tiny_model("llama", **_SIZES)
    path = write_tiny_gguf(model, tmp_path / "tiny.gguf", storage=MIXTURES[name])
    source = open_model(path)
    decoder = Decoder.from_source(source, dtype=torch.float32)
    ours = dict(decoder.frozen_tensors())
    kinds = set()
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 1:
            continue
        kinds.add(tensor.tensor_type)
        assert tensor.tensor_type == MIXTURES[name](tensor.name)
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        found = ours[_our_name(tensor.name)]
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            found = found.view(-1, 2, 32, 256).transpose(1, 2).reshape(found.shape)
        assert torch.equal(found, torch.from_numpy(values).reshape(found.shape)), tensor.name
    assert len(kinds) > 1 or name in ("Q6_K", "BF16")


def _our_name(stored: str) -> str:
    name = huggingface_name("llama", stored)
    assert name is not None
    return name


@pytest.mark.parametrize("name", ["Q4_K_M", "IQ4_XS", "Q2_K"])
def test_llama_cpp_computes_the_same_from_these_files(name: str, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits for such weights, so that only ranking and approximate values agree."""
    path = write_tiny_gguf(tiny_model("llama", **_SIZES), tmp_path / "tiny.gguf", storage=MIXTURES[name])
    ids = tiny_documents([24], vocab_size=300)[0]
    ours = Decoder.from_source(open_model(path), dtype=torch.float32).logits(ids)[-1].double().log_softmax(-1)
    theirs = LlamaCpp(path).log_probabilities(ids.tolist(), VOCAB_SIZE)
    assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > 0.995


def test_a_type_that_nobody_dequantises_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    model = tiny_model("llama", **_SIZES)
    path = write_tiny_gguf(model, tmp_path / "tiny.gguf", storage=_mixture("Q8_0", v="Q1_0", down="Q1_0"))
    with pytest.raises(ArtifactError, match=r"2 tensors .* blk\.0\.attn_v\.weight \(Q1_0\)") as raised:
        open_model(path)
    assert "Q8_0, Q4_K_M or BF16" in str(raised.value)


_PUBLISHED: dict[str, dict[str, Any]] = {
    "llama.cpp": {
        "general.type": "model",
        "general.size_label": "135M",
        "general.license": "apache-2.0",
        "general.base_model.count": 1,
        "general.tags": ["safetensors", "text-generation"],
        "general.quantization_version": 2,
        "general.file_type": 15,
        "tokenizer.ggml.add_space_prefix": False,
    },
    "bartowski": {
        "general.basename": "Tiny",
        "general.finetune": "Instruct",
        "general.base_model.0.name": "Tiny Base",
        "quantize.imatrix.file": "/models_out/tiny.imatrix",
        "quantize.imatrix.dataset": "/training_dir/calibration_datav3.txt",
        "quantize.imatrix.entries_count": 210,
        "quantize.imatrix.chunks_count": 128,
        "general.file_type": 30,
    },
    "unsloth": {
        "general.quantized_by": "Unsloth",
        "general.repo_url": "https://huggingface.co/unsloth",
        "general.sampling.temp": "0.6",
        "quantize.imatrix.file": "tiny-GGUF/imatrix_unsloth.dat",
        "quantize.imatrix.dataset": "unsloth_calibration.txt",
        "llama.unsloth_fixed": True,
    },
}


@pytest.mark.parametrize("publisher", _PUBLISHED)
def test_what_publishers_add_changes_nothing(publisher: str, tmp_path: Path) -> None:
    model = tiny_model("llama", **_SIZES)
    extra = _PUBLISHED[publisher]
    path = write_tiny_gguf(model, tmp_path / "tiny.gguf", storage=MIXTURES["Q4_K_M"], extra=extra)
    source = open_model(path)
    parsed = decoder_config(source.config)
    assert parsed == decoder_config(tiny_config("llama", **_SIZES).to_dict())
    assert source.tokenizer().chat_template
    assert UNREAD not in source.config
    # Below the architecture's name, where it could have meant something, a made-up key is noted.
    assert source.config.get(FOREIGN) == (["llama.unsloth_fixed"] if publisher == "unsloth" else None)
    assert any("llama.unsloth_fixed" in note for note in parsed.notes) == (publisher == "unsloth")


def test_a_file_without_chat_template_and_general_keys_opens(tmp_path: Path) -> None:
    model = tiny_model("llama", **_SIZES)
    without = ("tokenizer.chat_template", "general.name", "general.type", "general.file_type", "llama.vocab_size")
    path = write_tiny_gguf(model, tmp_path / "tiny.gguf", storage=MIXTURES["Q5_K_S"], without=without)
    assert not {key for key in GGUFFile(path) if key.startswith("general.")} - {"general.architecture"}
    source = open_model(path)
    assert source.tokenizer().chat_template is None
    assert decoder_config(source.config).vocab_size == VOCAB_SIZE
    assert Decoder.from_source(source, dtype=torch.float32).logits(torch.tensor([3, 4])).shape == (2, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("general.architecture", "does not state its architecture"),
        ("llama.attention.layer_norm_rms_epsilon", r"layer_norm_rms_epsilon = None"),
        ("llama.attention.head_count", r"head_count = None"),
        ("llama.context_length", r"context_length = None"),
        ("llama.feed_forward_length", r"feed_forward_length = None"),
    ],
)
def test_a_key_without_which_nothing_can_be_computed_is_named(key: str, named: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", without=[key])
    with pytest.raises(ArtifactError, match=named):
        open_model(path)


@pytest.mark.parametrize("key", ["attention.head_count_kv", "attention.key_length", "rope.dimension_count"])
def test_keys_with_a_default_may_be_missing(key: str, tmp_path: Path) -> None:
    model = tiny_model("llama", num_key_value_heads=6, head_dim=10)
    path = write_tiny_gguf(model, tmp_path / "tiny.gguf", without=[f"llama.{key}"])
    assert decoder_config(open_model(path).config) == decoder_config(model.config.to_dict())


def test_parts_of_mixed_types_open_together(tmp_path: Path) -> None:
    model = tiny_model("llama", **_SIZES)
    first = write_tiny_gguf(model, tmp_path / "tiny.gguf", storage=MIXTURES["Q4_K_M"], parts=3)
    assert first.name == "tiny-00001-of-00003.gguf"
    whole = write_tiny_gguf(model, tmp_path / "whole.gguf", storage=MIXTURES["Q4_K_M"])
    split = open_model(tmp_path / "tiny-00002-of-00003.gguf")
    one = open_model(whole)
    assert set(split.tensor_names()) == set(one.tensor_names())
    for name in one.tensor_names():
        assert torch.equal(split.load(name), one.load(name)), name


def test_a_renamed_part_is_named(tmp_path: Path) -> None:
    first = write_tiny_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", parts=3)
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(ArtifactError, match="is one of 3 parts of a model"):
        open_model(renamed)


def _small_file(path: Path, architecture: str, kind: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_image_part_next_to_the_model_is_left_alone(tmp_path: Path) -> None:
    write_tiny_gguf(tiny_model("llama"), tmp_path / "tiny-Q8_0.gguf")
    image = _small_file(tmp_path / "mmproj-tiny-F16.gguf", "clip", "mmproj")
    assert open_model(tmp_path).path.name == "tiny-Q8_0.gguf"
    with pytest.raises(ArtifactError, match="is the image part of a model"):
        open_model(image)
    with pytest.raises(ArtifactError, match="is an importance matrix"):
        open_model(_small_file(tmp_path / "tiny.imatrix.gguf", "imatrix", "imatrix"))


def test_what_is_not_understood_is_no_other_model_for_transformers(tmp_path: Path) -> None:
    """Without the unread key the config would describe a plain model that fits the weights."""
    path = write_tiny_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", extra={"llama.attention.clamp_kqv": 3})
    source = open_model(path)
    with pytest.raises(UnsupportedModel, match=r"clamp_kqv = 3"):
        decoder_config(source.config)
    with pytest.raises(ArtifactError, match=r"not understood: llama\.attention\.clamp_kqv"):
        load_transformers_model(source, dtype=torch.float32)


class _ChangedFile:
    """A file whose metadata has one more key."""

    def __init__(self, file: GGUFFile, key: str, value: Any) -> None:
        self._file, self._key, self._value = file, key, value
        self.path, self.tensors = file.path, file.tensors

    def __iter__(self) -> Any:
        yield from {*self._file, self._key}

    def value(self, key: str, default: Any = None) -> Any:
        return self._value if key == self._key else self._file.value(key, default)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma3_text", "olmo2", "exaone4", "phi3", "glm4", "ministral3"]
)
def test_every_key_of_the_gguf_package_is_used_neutral_or_in_the_way(family: str, tmp_path: Path) -> None:
    """A newer gguf package may declare keys that are not classified. They are refused, and listed here."""
    file = GGUFFile(write_tiny_gguf(tiny_model(family), tmp_path / "tiny.gguf"))
    architecture = file.value("general.architecture")
    plain = decoder_config(huggingface_config(file, architecture, {}))
    neutral = set()
    for key in declared_keys():
        there = file.value(f"{architecture}.{key}")
        changed: Any = 7 if not isinstance(there, float) else there * 2
        altered: Any = _ChangedFile(file, f"{architecture}.{key}", changed)
        try:
            parsed = decoder_config(huggingface_config(altered, architecture, {}))
        except ArtifactError:
            continue
        if parsed == plain:
            neutral.add(key)
    without_windows = {"attention.sliding_window_pattern"} if family == "olmo2" else set()  # OLMo 2 has none
    assert neutral <= {*NEUTRAL, "rope.scaling.original_context_length", *without_windows}
    assert set(NEUTRAL) <= declared_keys()
    assert {*NEUTRAL_VALUES} <= declared_keys()
    assert len(declared_keys()) > 90
