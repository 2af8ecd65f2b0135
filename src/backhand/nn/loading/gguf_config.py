"""A GGUF file's metadata as a Hugging Face config.

Every key of the architecture is read here or handed on under its own name, and every tensor that no Hugging Face module
takes is listed, so that `decoder_config` refuses what nobody has understood.

- Numbers that a file leaves out have llama.cpp's defaults: key/value heads as heads, head_dim embedding / heads, rope
  base 1e4, linear rope scaling where a factor stands without a type, Gemma's local base 1e4 and one full layer in six;
  Gemma scales queries by head_dim^-½, in its 62-layer model by (hidden / heads)^-½.
- `rope_freqs.weight` divides the rotary frequencies. If it is Llama 3's rule with the published constants, the config
  says so; otherwise it lists the divisors, as a `longrope` rule whose two lists are equal.
- Mistral files have architecture `llama`; one that states a sliding window becomes a `mistral` config.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_tensors import huggingface_name, is_skipped
from backhand.nn.rotary_frequencies import llama3_factors

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_GEMMA_27B_LAYERS = 62
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

_NEUTRAL = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")
_NEUTRAL_VALUES = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}


class _Metadata:
    """Keys of the architecture, without its name in front, noting which were read; wrong values are ArtifactErrors."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self._file = file
        self._prefix = f"{architecture}."
        self._read: set[str] = set(_NEUTRAL)

    def get(self, key: str, default: Any = None) -> Any:
        """The value; a list of equal numbers, one for each layer, is that number."""
        self._read.add(key)
        value = self._file.value(self._prefix + key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArtifactError(
                f"{self._prefix}{key} = {value!r} is not a positive integer",
                where=str(self._file.path),
                why="models whose layers differ in size are not supported" if isinstance(value, list) else None,
            )
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ArtifactError(f"{self._prefix}{key} = {value!r} is not a positive number", where=str(self._file.path))
        return float(value)

    def unread(self) -> dict[str, Any]:
        """What nobody asked for and is not known to be neutral, under its full name."""
        keys = [key for key in self._file if key.startswith(self._prefix)]
        left = {key: self._file.value(key) for key in keys if key.removeprefix(self._prefix) not in self._read}
        return {
            key: value
            for key, value in left.items()
            if _NEUTRAL_VALUES.get(key.removeprefix(self._prefix), _Metadata) != value
        }


def huggingface_config(file: GGUFFile, architecture: str, rope_factors: Tensor | None) -> dict[str, Any]:
    """Hugging Face configuration keys for a file.

    Args:
        file: the opened file, the first one of a split model, with the tensors of all.
        architecture: one of `gguf_tensors.ARCHITECTURES`.
        rope_factors: (head_dim / 2,) float32 divisors of the rotary frequencies, None if the file has none.

    Raises:
        ArtifactError: for metadata that no model has.
    """
    metadata = _Metadata(file, architecture)
    heads = metadata.integer("attention.head_count")
    hidden_size = metadata.integer("embedding_length")
    head_dim = metadata.integer("attention.key_length", max(hidden_size // heads, 1))
    context_length = metadata.integer("context_length")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ArtifactError("the tensor token_embd.weight is missing", where=str(file.path))
    layers = metadata.integer("block_count")
    if layers > len(file.tensors):
        raise ArtifactError(f"{layers} blocks cannot lie in {len(file.tensors)} tensors", where=str(file.path))
    config: dict[str, Any] = {
        "model_type": architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
        "rms_norm_eps": metadata.get("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for part in ("bos", "eos", "pad"):
        config[f"{part}_token_id"] = file.value(f"tokenizer.ggml.{'padding' if part == 'pad' else part}_token_id")
    if metadata.get("attention.value_length", head_dim) != head_dim:
        config[f"{architecture}.attention.value_length"] = metadata.get("attention.value_length")
    rotated = metadata.integer("rope.dimension_count", head_dim)
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    rotary = _rotary(metadata, head_dim, context_length, rope_factors)
    _FAMILY_PARTS[architecture](config, metadata, rotary, file)
    config["architectures"] = [_CLASSES[config["model_type"]]]
    return config | metadata.unread() | _unknown_tensors(file, architecture)


def _rotary(metadata: _Metadata, head_dim: int, context_length: int, factors: Tensor | None) -> dict[str, Any]:
    theta = metadata.number("rope.freq_base", 10000.0)
    kind = metadata.get("rope.scaling.type", "linear")
    # Files of 2023 have a key of its own for linear scaling.
    scale = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        return {"rope_type": kind, "rope_theta": theta, "factor": scale}
    scale = scale if kind == "linear" else 1.0
    if factors is not None and factors.numel() != head_dim // 2:
        raise ArtifactError(
            f"rope_freqs.weight has {factors.numel()} numbers, and heads of {head_dim} have {head_dim // 2} frequencies"
        )
    if factors is not None and not bool((factors == 1.0).all()):
        rule = {"factor": float(factors.max()), **_LLAMA3}
        if scale == 1.0 and torch.allclose(llama3_factors(theta, head_dim, rule), factors, rtol=1e-5, atol=0):
            return {"rope_type": "llama3", "rope_theta": theta, **rule}
        divisors = (factors * scale).tolist()
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": divisors,
            "long_factor": list(divisors),
            "attention_factor": 1.0,
            "original_max_position_embeddings": context_length,
        }
    if scale != 1.0:
        return {"rope_type": "linear", "rope_theta": theta, "factor": scale}
    return {"rope_type": "default", "rope_theta": theta}


def _llama(config: dict[str, Any], metadata: _Metadata, rotary: dict[str, Any], file: GGUFFile) -> None:
    config["rope_parameters"] = rotary
    window = metadata.get("attention.sliding_window")
    if window:
        config |= {"model_type": "mistral", "sliding_window": window}
    config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors


def _qwen(config: dict[str, Any], _: _Metadata, rotary: dict[str, Any], file: GGUFFile) -> None:
    config["rope_parameters"] = rotary
    if config["model_type"] == "qwen3":
        config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors


def _gemma3(config: dict[str, Any], metadata: _Metadata, rotary: dict[str, Any], _: GGUFFile) -> None:
    layers = config["num_hidden_layers"]
    window = metadata.get("attention.sliding_window")
    pattern = metadata.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, bool):
        slides = [pattern] * layers
    elif isinstance(pattern, list):
        slides = [bool(item) for item in pattern]
    else:
        period = metadata.integer("attention.sliding_window_pattern", 6)
        slides = [bool((layer + 1) % period) for layer in range(layers)]
    local = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", 10000.0)}
    is_largest = layers == _GEMMA_27B_LAYERS
    del config["hidden_act"]
    config |= {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if window and here else "full_attention" for here in slides],
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"]
        ),
        "rope_parameters": {"full_attention": rotary, "sliding_attention": local},
        "final_logit_softcapping": metadata.get("final_logit_softcapping"),
        "attn_logit_softcapping": metadata.get("attn_logit_softcapping"),
    }


_FAMILY_PARTS = {"llama": _llama, "qwen2": _qwen, "qwen3": _qwen, "gemma3": _gemma3}


def _unknown_tensors(file: GGUFFile, architecture: str) -> dict[str, Any]:
    unknown = [name for name in file.tensors if not is_skipped(name) and huggingface_name(architecture, name) is None]
    # A bias on q, k and v alone is Qwen2's; no other config can say it.
    if architecture != "qwen2" and "blk.0.attn_output.bias" not in file.tensors:
        unknown += [name for name in file.tensors if name.endswith(("attn_q.bias", "attn_k.bias", "attn_v.bias"))]
    return {"tensors of the GGUF file": unknown} if unknown else {}
