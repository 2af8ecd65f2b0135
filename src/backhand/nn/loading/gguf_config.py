"""Convert a GGUF file's metadata to a Hugging Face config.

Every architecture key that the gguf package declares is read, or is neutral, or goes into the config under `UNREAD`.
Tensors that belong to no Hugging Face module go there as well. `decoder_config` refuses a config with `UNREAD`, and
transformers is not tried instead, because the config does not describe the whole model. Keys that the package does not
declare go under `FOREIGN` and are reported: no llama.cpp converter writes them, and no llama.cpp model reads them.

- **Defaults** are llama.cpp's: key/value heads equal to heads, head_dim = embedding / heads, rope base 1e4, and linear
  rope scaling if the file has a factor without a type. Defaults of single families are in `gguf_families`.
- **YaRN** multiplies queries and keys by attn_factor · (0.1 ln(factor) + 1) / (0.1 m ln(factor) + 1), where m is
  `yarn_log_multiplier` and the division is omitted without it. llama.cpp ignores `yarn_attn_factor` and, in most
  architectures, the two betas. It always rounds the range outward.
- **Frequency divisors.** `rope_freqs.weight` divides the rotary frequencies. If it equals Llama 3's rule with the
  published constants, the config has that rule. Otherwise the config lists the divisors as a `longrope` rule with two
  equal lists. Phi-3's `rope_factors_short.weight` and `rope_factors_long.weight` are chosen by the length of the text.
  Phi-3's window of 0 means no window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.families.config_fields import FOREIGN, UNREAD
from backhand.nn.families.rotary_frequencies import llama3_factors, yarn_length
from backhand.nn.loading.gguf_families import FAMILY_PARTS, prediction_block_count
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_metadata import Metadata, describe, rotary_fraction
from backhand.nn.loading.gguf_tensors import (
    ARCHITECTURES,
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    huggingface_names,
    is_skipped,
)
from backhand.nn.loading.wrappers import causal_class

_WITH_ZEROS = ("lfm2", "granitehybrid", "nemotron_h")
"""Architectures in which layers without attention have 0 key/value heads, and layers without an MLP a width of 0."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def huggingface_config(file: GGUFFile, architecture: str, rope_factors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the Hugging Face configuration of a GGUF file.

    Args:
        file: the opened file, or the first file of a split model with the tensors of all parts.
        architecture: one of `gguf_tensors.ARCHITECTURES`.
        rope_factors: tensor name → the file's divisors of the rotary frequencies, (rotated features / 2,) float32.

    Raises:
        ArtifactError: for metadata that no model has.
    """
    metadata = Metadata(file, architecture)
    heads = metadata.integer("attention.head_count")
    hidden_size = metadata.integer("embedding_length")
    head_dim = metadata.integer("attention.key_length", max(hidden_size // heads, 1))
    context_length = metadata.integer("context_length")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ArtifactError("the tensor token_embd.weight is missing", where=str(file.path))
    layers = metadata.integer("block_count") - prediction_block_count(file, architecture)
    if not 0 < layers <= len(file.tensors):
        raise ArtifactError(f"{layers} blocks cannot consist of {len(file.tensors)} tensors", where=str(file.path))
    # llama.cpp's default, which is not read from files that state the epsilon of RMS norms.
    other_eps = metadata.get("attention.layer_norm_epsilon") if architecture == "nemotron_h" else None
    config: dict[str, Any] = {
        "model_type": architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": _of_layers(metadata, "feed_forward_length", architecture),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _of_layers(metadata, "attention.head_count_kv", architecture, heads),
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
        "rms_norm_eps": metadata.number(ARCHITECTURES[architecture].norm_eps, other_eps),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for part in ("bos", "eos", "pad"):
        config[f"{part}_token_id"] = _token_id(file, "padding" if part == "pad" else part, embedding.shape[0])
    value_length = metadata.get("attention.value_length", head_dim)
    rotated = metadata.integer("rope.dimension_count", head_dim)
    if rotated % 2 or rotated > head_dim:
        raise ArtifactError(
            f"{architecture}.rope.dimension_count = {rotated} does not fit heads of {head_dim}",
            where=str(file.path),
            why=f"the number of rotated dimensions must be even and at most {head_dim}",
        )
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotary_fraction(rotated, head_dim)
    config["rope_parameters"] = _rotary(metadata, rotated, context_length, rope_factors)
    config |= {field: tensor in file.tensors for field, tensor in ARCHITECTURES[architecture].biases.items()}
    if (add_family_fields := FAMILY_PARTS.get(architecture)) is not None:
        add_family_fields(config, metadata, file)
    config["architectures"] = causal_class(config["model_type"])
    unread, foreign = metadata.unread_keys()
    if value_length != head_dim:
        unread[f"{architecture}.attention.value_length"] = value_length
    unread |= _unknown_tensors(file, architecture)
    return config | ({UNREAD: unread} if unread else {}) | ({FOREIGN: foreign} if foreign else {})


def _of_layers(metadata: Metadata, key: str, architecture: str, default: int | None = None) -> int:
    """Return a number common to all layers that have one, the others have 0.

    For Gemma 4 it is the first of a list, which `gguf_gemma4` reads again.
    """
    values = metadata.get(key)
    if architecture in _WITH_ZEROS and isinstance(values, list) and len({*values, 0}) == 2:
        (only,) = {*values} - {0}
        return metadata.checked(key, only)
    return metadata.first(key, default) if architecture == "gemma4" else metadata.integer(key, default)


def _rotary(metadata: Metadata, rotated: int, context_length: int, all_factors: Mapping[str, Tensor]) -> dict[str, Any]:
    factors = all_factors.get(ROPE_FACTORS)
    for name, tensor in all_factors.items():
        if tensor.numel() != rotated // 2:
            raise ArtifactError(
                f"{name} has {tensor.numel()} numbers, but {rotated} rotated features have {rotated // 2} frequencies"
            )
    theta = metadata.number("rope.freq_base", 10000.0)
    kind = metadata.optional("rope.scaling.type", str) or "linear"
    if kind in ("none", "linear"):
        metadata.get("rope.scaling.original_context_length")  # used only by YaRN and longrope
    # Files from 2023 have a separate key for linear scaling.
    scale = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    if factors is None and {LONG_FACTORS, SHORT_FACTORS} <= set(all_factors) and kind in ("longrope", "linear"):
        attention_factor = metadata.number("rope.scaling.attn_factor", 1.0)
        original = metadata.integer("rope.scaling.original_context_length", context_length)
        return _longrope(theta, all_factors[SHORT_FACTORS], all_factors[LONG_FACTORS], attention_factor, original)
    if kind == "yarn" and (factors is None or bool((factors == 1.0).all())):
        return _yarn(metadata, theta, scale, context_length)
    if kind not in ("none", "linear"):
        combined = "" if factors is None else ", and rope_freqs.weight"
        return {"rope_type": f"{kind}{combined}", "rope_theta": theta, "factor": scale}
    scale = scale if kind == "linear" else 1.0
    if factors is not None and not bool((factors == 1.0).all()):
        rule = {"factor": float(factors.max()), **_LLAMA3}
        if scale == 1.0 and torch.allclose(llama3_factors(theta, rotated, rule), factors, rtol=1e-5, atol=0):
            return {"rope_type": "llama3", "rope_theta": theta, **rule}
        return _longrope(theta, factors * scale, factors * scale, 1.0, context_length)
    if scale != 1.0:
        return {"rope_type": "linear", "rope_theta": theta, "factor": scale}
    return {"rope_type": "default", "rope_theta": theta}


def _longrope(
    theta: float, short: Tensor, long: Tensor, attention_factor: float, original_length: int
) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "attention_factor": attention_factor,
        "original_max_position_embeddings": original_length,
    }


def _yarn(metadata: Metadata, theta: float, factor: float, context_length: int) -> dict[str, Any]:
    multiplier = metadata.optional("rope.scaling.yarn_log_multiplier", float)
    attention_factor = yarn_length(factor) / (yarn_length(factor, multiplier) if multiplier else 1.0)
    attention_factor *= metadata.number("rope.scaling.attn_factor", 1.0)
    metadata.accept_if_equal("rope.scaling.yarn_attn_factor", attention_factor)
    metadata.accept_if_equal("rope.scaling.yarn_ext_factor", 1.0)
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", 1.0),
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length", context_length),
        "attention_factor": attention_factor,
    }


def _token_id(file: GGUFFile, role: str, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    value = file.value(key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size):
        return value
    raise ArtifactError(f"{key} = {describe(value)} is not one of {vocab_size} tokens", where=str(file.path))


def _unknown_tensors(file: GGUFFile, architecture: str) -> dict[str, Any]:
    unknown = [
        name
        for name, tensor in file.tensors.items()
        if not is_skipped(architecture, name) and not huggingface_names(architecture, name, tensor.shape)
    ]
    # Only Qwen2's and GLM's configs can express a bias on q, k and v without one on o.
    has_output_bias = any(name.endswith("attn_output.bias") for name in file.tensors)
    if architecture not in ("qwen2", "chatglm", "glm4") and not has_output_bias:
        unknown += [name for name in file.tensors if name.endswith(("attn_q.bias", "attn_k.bias", "attn_v.bias"))]
    return {"tensors of the GGUF file": unknown} if unknown else {}
