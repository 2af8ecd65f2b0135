"""A GGUF file's metadata as a Hugging Face config.

Every key of the architecture that the gguf package declares is read here, neutral, or handed on under `UNREAD`, and so
is every tensor that no Hugging Face module takes: `decoder_config` refuses what nobody has understood, and no other way
of computing the model is tried, since the config alone does not say it. Keys that the package does not declare, which
no converter of llama.cpp writes and none of its models reads, are handed on under `FOREIGN` and noted.

- Numbers that a file leaves out have llama.cpp's defaults: key/value heads as heads, head_dim embedding / heads, rope
  base 1e4, linear rope scaling where a factor stands without a type, Gemma's local base 1e4 and one full layer in six;
  Gemma scales queries by head_dim^-½, in its largest models (46 layers of Gemma 2, 62 of Gemma 3) by
  (hidden / heads)^-½; Gemma 2 has full attention in every second layer, and caps of 50 and 30; OLMo and EXAONE, where
  there is a sliding window, in every fourth, and there is one of 4096 in EXAONE's largest (64 layers).
- YaRN's multiplier of queries and keys is 0.1 ln(factor) + 1, over the same with `yarn_log_multiplier` in front of the
  logarithm, times `attn_factor`. llama.cpp does not look at `yarn_attn_factor`, nor in most architectures at the two
  betas, and always rounds the range outward.
- `rope_freqs.weight` divides the rotary frequencies. If it is Llama 3's rule with the published constants, the config
  says so; otherwise it lists the divisors, as a `longrope` rule whose two lists are equal. Phi-3's
  `rope_factors_short.weight` and `rope_factors_long.weight` do so by the text's length; its window of 0 is none.
- Mixtral files have architecture `llama` too, and experts. In llama.cpp the weights of a token's experts add up to 1,
  and every layer of `qwen3moe` has experts; here one without a router in the file has none.
- gpt-oss: every second layer slides, the first one does; files say neither that nor the numbers of the experts' gated
  unit, 1.702 and 7, which llama.cpp has in its code.
- A layer of LFM2 with 0 key/value heads is a convolution.
- Qwen3.5: see `gguf_delta`.
- Mistral files have architecture `llama`; one that states a sliding window becomes a `mistral` config. OLMo 3 files
  have architecture `olmo2` and a sliding window, in whose layers rotary scaling does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.decoder.config_fields import FOREIGN, UNREAD
from backhand.nn.decoder.family import GPT_OSS_CLAMP
from backhand.nn.decoder.rotary import llama3_factors, yarn_length
from backhand.nn.loading.gguf_delta import delta_config, delta_shapes, own_prediction_blocks
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_metadata import Metadata, shown
from backhand.nn.loading.gguf_tensors import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    huggingface_names,
    is_skipped,
)
from backhand.nn.loading.wrappers import CAUSAL_CLASSES

_GEMMA2_27B_LAYERS = 46
_GEMMA3_27B_LAYERS = 62
NO_ROPE_INTERVAL = 4
"""In files of architecture smollm3 every fourth layer has no rotary embedding; none says it."""
FULL_INTERVAL = 4
"""llama.cpp reads no pattern of windows from files of architectures olmo2 and exaone4: every fourth layer is full."""
GPT_OSS_INTERVAL = 2
"""Nor from those of architecture gpt-oss: every second one is full."""
EXAONE4_32B_LAYERS = 64
"""llama.cpp has the windows of EXAONE 4 in models of so many layers alone."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def huggingface_config(file: GGUFFile, architecture: str, rope_factors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Hugging Face configuration keys for a file.

    Args:
        file: the opened file, the first one of a split model, with the tensors of all.
        architecture: one of `gguf_tensors.ARCHITECTURES`.
        rope_factors: the file's divisors of the rotary frequencies, (turning features / 2,) float32 each, by their
            tensors' names.

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
    layers = metadata.integer("block_count") - own_prediction_blocks(file, architecture)
    if not 0 < layers <= len(file.tensors):
        raise ArtifactError(f"{layers} blocks cannot lie in {len(file.tensors)} tensors", where=str(file.path))
    config: dict[str, Any] = {
        "model_type": architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _key_value_heads(metadata, architecture, heads),
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for part in ("bos", "eos", "pad"):
        config[f"{part}_token_id"] = _token_id(file, "padding" if part == "pad" else part, embedding.shape[0])
    value_length = metadata.get("attention.value_length", head_dim)
    rotated = metadata.integer("rope.dimension_count", head_dim)
    if rotated % 2 or rotated > head_dim:
        raise ArtifactError(
            f"{architecture}.rope.dimension_count = {rotated} cannot be rotated in heads of {head_dim}",
            where=str(file.path),
            why="an even number of dimensions is, at most all of them",
        )
    if rotated != head_dim:
        config["partial_rotary_factor"] = _share(rotated, head_dim)
    rotary = _rotary(metadata, rotated, context_length, rope_factors)
    _FAMILY_PARTS[architecture](config, metadata, rotary, file)
    config["architectures"] = [CAUSAL_CLASSES[config["model_type"]]]
    _check_sizes(file, config)
    unread, foreign = metadata.left()
    if value_length != head_dim:
        unread[f"{architecture}.attention.value_length"] = value_length
    unread |= _unknown_tensors(file, architecture)
    return config | ({UNREAD: unread} if unread else {}) | ({FOREIGN: foreign} if foreign else {})


def _key_value_heads(metadata: Metadata, architecture: str, heads: int) -> int:
    """Key/value heads of a layer with attention; where others are convolutions, a list has 0 for these."""
    counts = metadata.get("attention.head_count_kv")
    if architecture == "lfm2" and isinstance(counts, list) and len({*counts, 0}) == 2:
        (counts,) = {*counts} - {0}
        return metadata.checked("attention.head_count_kv", counts)
    return metadata.integer("attention.head_count_kv", heads)


def _share(rotated: int, head_dim: int) -> float:
    """A share of which, multiplied and cut as transformers does it, is that number again."""
    share = rotated / head_dim
    return share if int(head_dim * share) == rotated else math.nextafter(share, 1.0)


def _rotary(metadata: Metadata, rotated: int, context_length: int, all_factors: Mapping[str, Tensor]) -> dict[str, Any]:
    factors = all_factors.get(ROPE_FACTORS)
    for name, tensor in all_factors.items():
        if tensor.numel() != rotated // 2:
            raise ArtifactError(
                f"{name} has {tensor.numel()} numbers, and {rotated} features that turn have {rotated // 2} frequencies"
            )
    theta = metadata.number("rope.freq_base", 10000.0)
    kind = metadata.optional("rope.scaling.type", str) or "linear"
    if kind in ("none", "linear"):
        metadata.get("rope.scaling.original_context_length")  # of no other use than to YaRN's rule and longrope
    # Files of 2023 have a key of its own for linear scaling.
    scale = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    if factors is None and {LONG_FACTORS, SHORT_FACTORS} <= set(all_factors) and kind in ("longrope", "linear"):
        return _longrope(metadata, theta, context_length, all_factors)
    if kind == "yarn" and (factors is None or bool((factors == 1.0).all())):
        return _yarn(metadata, theta, scale, context_length)
    if kind not in ("none", "linear"):
        beside = "" if factors is None else ", and rope_freqs.weight"
        return {"rope_type": f"{kind}{beside}", "rope_theta": theta, "factor": scale}
    scale = scale if kind == "linear" else 1.0
    if factors is not None and not bool((factors == 1.0).all()):
        rule = {"factor": float(factors.max()), **_LLAMA3}
        if scale == 1.0 and torch.allclose(llama3_factors(theta, rotated, rule), factors, rtol=1e-5, atol=0):
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


def _longrope(metadata: Metadata, theta: float, context_length: int, factors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors[SHORT_FACTORS].tolist(),
        "long_factor": factors[LONG_FACTORS].tolist(),
        "attention_factor": metadata.number("rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length", context_length),
    }


def _yarn(metadata: Metadata, theta: float, factor: float, context_length: int) -> dict[str, Any]:
    multiplier = metadata.optional("rope.scaling.yarn_log_multiplier", float)
    length = yarn_length(factor) / (yarn_length(factor, multiplier) if multiplier else 1.0)
    length *= metadata.number("rope.scaling.attn_factor", 1.0)
    metadata.agrees("rope.scaling.yarn_attn_factor", length)
    metadata.agrees("rope.scaling.yarn_ext_factor", 1.0)
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", 1.0),
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length", context_length),
        "attention_factor": length,
    }


def _llama(config: dict[str, Any], metadata: Metadata, rotary: dict[str, Any], file: GGUFFile) -> None:
    config["rope_parameters"] = rotary
    window = metadata.optional("attention.sliding_window", int)
    if metadata.optional("expert_count", int):
        config |= {
            "model_type": "mixtral",
            "num_local_experts": metadata.integer("expert_count"),
            "num_experts_per_tok": metadata.integer("expert_used_count"),
            "sliding_window": window or None,
        }
        return
    if window:
        config |= {"model_type": "mistral", "sliding_window": window}
    _biases(config, file)


def _qwen(config: dict[str, Any], _: Metadata, rotary: dict[str, Any], file: GGUFFile) -> None:
    config["rope_parameters"] = rotary
    if config["model_type"] == "qwen3":
        config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors


def _qwen3moe(config: dict[str, Any], metadata: Metadata, rotary: dict[str, Any], file: GGUFFile) -> None:
    width = metadata.optional("expert_feed_forward_length", int)
    used = metadata.integer("expert_used_count")
    config |= {
        "model_type": "qwen3_moe",
        "rope_parameters": rotary,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": used,
        # As llama.cpp divides it where a file is silent.
        "moe_intermediate_size": width or config["intermediate_size"] // used,
        "norm_topk_prob": True,
        "mlp_only_layers": [
            layer
            for layer in range(config["num_hidden_layers"])
            if f"blk.{layer}.ffn_gate_inp.weight" not in file.tensors
        ],
    }


def _gpt_oss(config: dict[str, Any], metadata: Metadata, rotary: dict[str, Any], file: GGUFFile) -> None:
    layers = config["num_hidden_layers"]
    metadata.agrees("rope.freq_base_swa", rotary["rope_theta"])
    config |= {
        "model_type": "gpt_oss",
        "rope_parameters": rotary,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "intermediate_size": metadata.integer("expert_feed_forward_length", config["intermediate_size"]),
        "num_local_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if here else "full_attention" for here in _sliding(metadata, layers, GPT_OSS_INTERVAL)
        ],
        "swiglu_alpha": GPT_OSS_CLAMP.gain,
        "swiglu_limit": GPT_OSS_CLAMP.limit,
    }


def _granite(config: dict[str, Any], metadata: Metadata, rotary: dict[str, Any], file: GGUFFile) -> None:
    _biases(config, file)
    if metadata.get("rope.scaling.finetuned") is False:  # here it says that nothing turns, which no config of it can
        metadata.not_understood("rope.scaling.finetuned")
    config |= {
        "rope_parameters": rotary,
        "attention_multiplier": metadata.number("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": metadata.number("embedding_scale", 1.0),
        "residual_multiplier": metadata.number("residual_scale", 1.0),
        "logits_scaling": metadata.number("logit_scale"),
    }


def _smollm3(config: dict[str, Any], _: Metadata, rotary: dict[str, Any], file: GGUFFile) -> None:
    _biases(config, file)
    config |= {"rope_parameters": rotary, "no_rope_layer_interval": NO_ROPE_INTERVAL}


def _lfm2(config: dict[str, Any], metadata: Metadata, rotary: dict[str, Any], file: GGUFFile) -> None:
    counts = metadata.get("attention.head_count_kv")
    layers = config["num_hidden_layers"]
    if isinstance(counts, list) and len(counts) != layers:
        raise ArtifactError(f"head_count_kv has not a number for each of {layers} layers", where=str(file.path))
    del config["hidden_act"]
    config |= {
        "norm_eps": config.pop("rms_norm_eps"),
        "rope_parameters": rotary,
        "layer_types": [
            "full_attention" if not isinstance(counts, list) or counts[layer] else "conv" for layer in range(layers)
        ],
        "conv_L_cache": metadata.integer("shortconv.l_cache"),
        "conv_bias": False,
        "block_auto_adjust_ff_dim": False,  # the file has the width as it is
    }


def _olmo2(config: dict[str, Any], metadata: Metadata, rotary: dict[str, Any], file: GGUFFile) -> None:
    layers = config["num_hidden_layers"]
    config |= {"attention_bias": "blk.0.attn_output.bias" in file.tensors, "rope_parameters": rotary}
    window = metadata.optional("attention.sliding_window", int)
    slides = _sliding(metadata, layers, FULL_INTERVAL)
    if window:
        local = {
            "rope_type": "default",
            "rope_theta": metadata.number("rope.freq_base_swa", rotary["rope_theta"]),
        }
        config |= {
            "model_type": "olmo3",
            "sliding_window": window,
            "layer_types": ["sliding_attention" if here else "full_attention" for here in slides],
            "rope_parameters": {"full_attention": rotary, "sliding_attention": local},
        }


def _exaone4(config: dict[str, Any], metadata: Metadata, rotary: dict[str, Any], _: GGUFFile) -> None:
    layers = config["num_hidden_layers"]
    window = metadata.optional("attention.sliding_window", int)
    if window is None and layers == EXAONE4_32B_LAYERS:
        window = 4096
    slides = _sliding(metadata, layers, FULL_INTERVAL)
    metadata.agrees("rope.freq_base_swa", rotary["rope_theta"])
    config |= {
        "rope_parameters": rotary,
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if window and here else "full_attention" for here in slides],
    }


def _phi3(config: dict[str, Any], metadata: Metadata, rotary: dict[str, Any], _: GGUFFile) -> None:
    window = metadata.optional("attention.sliding_window", int)  # 0 is none
    length = rotary.get("original_max_position_embeddings", config["max_position_embeddings"])
    metadata.get("rope.scaling.original_context_length")  # of no other use than to longrope
    config |= {"rope_parameters": rotary, "sliding_window": window or None, "original_max_position_embeddings": length}


def _mistral3(config: dict[str, Any], metadata: Metadata, rotary: dict[str, Any], _: GGUFFile) -> None:
    window = metadata.optional("attention.sliding_window", int)
    beta = metadata.optional("attention.temperature_scale", float)
    length = rotary.get("original_max_position_embeddings", config["max_position_embeddings"])
    metadata.agrees("attention.temperature_length", length)
    rotary |= {"llama_4_scaling_beta": beta or 0.0, "original_max_position_embeddings": length}
    config |= {"model_type": "ministral3", "rope_parameters": rotary, "sliding_window": window or None}


def _glm(config: dict[str, Any], _: Metadata, rotary: dict[str, Any], file: GGUFFile) -> None:
    config |= {
        "model_type": "glm" if config["model_type"] == "chatglm" else config["model_type"],
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        # Half of the features turn where a config is silent.
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0),
        "rope_parameters": rotary,
    }


def _biases(config: dict[str, Any], file: GGUFFile) -> None:
    config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors


def _gemma2(config: dict[str, Any], metadata: Metadata, rotary: dict[str, Any], _: GGUFFile) -> None:
    layers = config["num_hidden_layers"]
    del config["hidden_act"]
    config |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": metadata.integer("attention.sliding_window", 4096),
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)],
        "query_pre_attn_scalar": _gemma_scalar(config, is_largest=layers == _GEMMA2_27B_LAYERS),
        "rope_parameters": rotary,
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
    }


def _gemma_scalar(config: dict[str, Any], *, is_largest: bool) -> int:
    """Query scaling, which no file states: of every size but the largest it is the head's."""
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"]
    return int(scalar)


def _gemma3(config: dict[str, Any], metadata: Metadata, rotary: dict[str, Any], _: GGUFFile) -> None:
    layers = config["num_hidden_layers"]
    window = metadata.optional("attention.sliding_window", int)
    slides = _sliding(metadata, layers, 6)
    local = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", 10000.0)}
    del config["hidden_act"]
    config |= {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if window and here else "full_attention" for here in slides],
        "query_pre_attn_scalar": _gemma_scalar(config, is_largest=layers == _GEMMA3_27B_LAYERS),
        "rope_parameters": {"full_attention": rotary, "sliding_attention": local},
        "final_logit_softcapping": metadata.optional("final_logit_softcapping", float),
        "attn_logit_softcapping": metadata.optional("attn_logit_softcapping", float),
    }


def _sliding(metadata: Metadata, layers: int, interval: int) -> list[bool]:
    """Which layers slide: as the file lists them, or all but every so-manieth, as it says or as is usual."""
    pattern = metadata.get("attention.sliding_window_pattern", interval)
    if isinstance(pattern, bool):
        return [pattern] * layers
    if isinstance(pattern, list):
        return [bool(item) for item in pattern]
    period = metadata.integer("attention.sliding_window_pattern", interval)
    return [bool((layer + 1) % period) for layer in range(layers)]


_FAMILY_PARTS = {
    "llama": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen35": delta_config,
    "qwen3moe": _qwen3moe,
    "gpt-oss": _gpt_oss,
    "granite": _granite,
    "lfm2": _lfm2,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "mistral3": _mistral3,
    "exaone4": _exaone4,
    "phi3": _phi3,
    "chatglm": _glm,
    "glm4": _glm,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}


def _token_id(file: GGUFFile, role: str, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    value = file.value(key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size):
        return value
    raise ArtifactError(f"{key} = {shown(value)} is none of {vocab_size} tokens", where=str(file.path))


def _check_sizes(file: GGUFFile, config: dict[str, Any]) -> None:
    """Hold the tensors against what the metadata says of them, before anything is made of that size.

    Raises:
        ArtifactError: names the first tensor of another shape.
    """
    hidden, inner, dimension = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * dimension
    keys = config["num_key_value_heads"] * dimension
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q.weight": (queries, hidden),
        "attn_k.weight": (keys, hidden),
        "attn_v.weight": (keys, hidden),
        "attn_output.weight": (hidden, queries),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
        "attn_qkv.weight": (queries + 2 * keys, hidden),
        "attn_q.bias": (queries,),
        "attn_k.bias": (keys,),
        "attn_v.bias": (keys,),
        **dict.fromkeys(("attn_norm.weight", "ffn_norm.weight", "attn_output.bias", "ffn_down.bias"), (hidden,)),
        **dict.fromkeys(("post_attention_norm.weight", "post_ffw_norm.weight"), (hidden,)),
        **dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (dimension,)),
    }
    if config["model_type"] in ("phi3", "glm", "glm4"):
        shapes["ffn_up.weight"] = (2 * inner, hidden)
    if "linear_num_value_heads" in config:
        shapes |= delta_shapes(config)
    if config["model_type"] == "lfm2":
        shapes |= {
            "shortconv.in_proj.weight": (3 * hidden, hidden),
            "shortconv.conv.weight": (hidden, config["conv_L_cache"]),
            "shortconv.out_proj.weight": (hidden, hidden),
        }
    if config["model_type"].startswith("olmo"):
        shapes |= {"attn_q_norm.weight": (queries,), "attn_k_norm.weight": (keys,)}
    experts = config.get("num_local_experts", config.get("num_experts"))
    if experts is not None:
        width = config.get("moe_intermediate_size", inner)
        shapes |= {
            "ffn_gate_inp.weight": (experts, hidden),
            **dict.fromkeys(("ffn_gate_exps.weight", "ffn_up_exps.weight"), (experts, width, hidden)),
            "ffn_down_exps.weight": (experts, hidden, width),
            "ffn_gate_inp.bias": (experts,),
            **dict.fromkeys(("ffn_gate_exps.bias", "ffn_up_exps.bias"), (experts, width)),
            "ffn_down_exps.bias": (experts, hidden),
            "attn_sinks.weight": (config["num_attention_heads"],),
        }
    whole: dict[str, tuple[int, ...]] = {"output_norm.weight": (hidden,), "token_embd_norm.weight": (hidden,)}
    whole |= {
        "output.weight": file.tensors["token_embd.weight"].shape,
        "token_embd.weight": (config["vocab_size"], hidden),
    }
    for name, tensor in file.tensors.items():
        _, _, part = name.removeprefix("blk.").partition(".")
        expected = shapes.get(part) if name.startswith("blk.") else whole.get(name)
        if expected is not None and tensor.shape != expected:
            raise ArtifactError(
                f"the tensor {name} has the shape {tensor.shape}, where the metadata says {expected}",
                where=str(file.path),
                next_step="fetch the file again",
            )


def _unknown_tensors(file: GGUFFile, architecture: str) -> dict[str, Any]:
    unknown = [
        name
        for name, tensor in file.tensors.items()
        if not is_skipped(name) and not huggingface_names(architecture, name, tensor.shape)
    ]
    # A bias on q, k and v alone is Qwen2's and GLM's; no other config can say it.
    has_output_bias = any(name.endswith("attn_output.bias") for name in file.tensors)
    if architecture not in ("qwen2", "chatglm", "glm4") and not has_output_bias:
        unknown += [name for name in file.tensors if name.endswith(("attn_q.bias", "attn_k.bias", "attn_v.bias"))]
    return {"tensors of the GGUF file": unknown} if unknown else {}
