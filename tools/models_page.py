"""The generated sections of docs/models.md: families, image models around them, storage types, and what `auto` does."""

from __future__ import annotations

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from backhand.engines.decoder_engine import COST
from backhand.nn.families.family import ATTENTION, FUSED_QKV, DecoderConfig
from backhand.nn.families.family_parsing import FAMILIES, decoder_config
from backhand.nn.families.neutral_fields import FIXED, QUANTIZED
from backhand.nn.families.rotary import SCALING_RULES
from backhand.nn.loading.gguf_tensors import gguf_architecture
from backhand.nn.loading.gguf_values import is_readable
from backhand.nn.loading.wrappers import WRAPPERS, causal_class, unwrap_config

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}


_KNOWN_AS = {
    "bamba": "Bamba",
    "exaone4": "EXAONE 4",
    "falcon_h1": "Falcon-H1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, FunctionGemma",
    "gemma4_text": "Gemma 4, dense (E2B, E4B, 31B)",
    "glm": "GLM-4 of 2024 (glm-4-9b-chat-hf), GLM-Edge",
    "glm4": "GLM-4-0414",
    "gpt_oss": "gpt-oss-20b, gpt-oss-120b",
    "granite": "Granite 3",
    "granitemoehybrid": "Granite 4 and 4 H",
    "lfm2": "LFM2, LFM2.5",
    "llama": "Llama 2 to 3.3, SmolLM2, TinyLlama, many others",
    "ministral3": "Ministral 3",
    "mistral": "Mistral 7B and later dense ones",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "nemotron_h": "Nemotron-H and Nemotron Nano 2, without experts",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "phi3": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    "qwen2": "Qwen 2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_5_text": "Qwen3.5, Qwen3.6, dense",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B, Qwen3-Coder-30B-A3B",
    "smollm3": "SmolLM3",
}
"""By the names that people know."""


def families_section() -> str:
    """Every `model_type` that the decoder engine takes, with what is particular to it."""
    rows = [
        "| `model_type` | models | class in transformers | GGUF architecture | particular to it |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        dense = {"num_local_experts": 0, "layer_types": ["full_attention"] * 6, "position_embedding_type": "rope"}
        stated = {"granitemoehybrid": dense, "bamba": {"mamba_n_heads": 4, "attn_layer_indices": [3]}}
        stated["falcon_h1"] = {"mamba_n_heads": 4, "mamba_d_ssm": 64}
        stated["nemotron_h"] = {"hybrid_override_pattern": "M-M*"}
        config = decoder_config({"model_type": family, **_SIZES, **stated.get(family, {})})
        variants = ({"model_type": family, **one} for one in (stated.get(family, {}), {}))
        architectures = dict.fromkeys(name for one in variants if (name := gguf_architecture(one)) is not None)
        stored = ", ".join(f"`{name}`" for name in architectures) or "none that is read"
        named, particular = _KNOWN_AS[family], _particular(family, config)
        rows.append(f"| `{family}` | {named} | `{causal_class(family)[0]}` | {stored} | {particular} |")
    rules = ", ".join(f"`{rule}`" for rule in SCALING_RULES)
    return "\n".join([*rows, "", f"Rotary angles by the rules {rules}."])


def _particular(family: str, config: DecoderConfig) -> str:
    """Describe the differences from a plain decoder."""
    windowed = {layer.window is not None for layer in config.layers}
    words = {
        "a bias on q, k and v": config.qkv_bias and not config.output_bias,
        "q, k and v in one module": FUSED_QKV in config.groups[0],
        "gate and up in one module": config.has_mlp and len(config.groups[2]) == 1,
        "q and k normed": config.qk_norm == "head",
        "q and k normed over all heads": config.qk_norm == "width",
        "norms after attention and MLP too": config.norms.after_mlp is not None and config.norms.before_mlp is not None,
        "norms after attention and MLP, none before": config.norms.before_attention is None,
        "one sublayer in a block: Mamba-2, attention or an MLP": not config.has_mlp,
        "norms that multiply by 1 + weight": config.norm_offset != 0,
        "the embedding scaled": config.embedding_scaling != 1,
        "GELU": config.activation.startswith("gelu"),
        "squared ReLU without a gate": config.activation == "relu2",
        "layers without rotary embedding": any(
            layer.rotary is None and layer.mixer == ATTENTION for layer in config.layers
        ),
        "gated short convolutions in most layers": config.short_conv is not None,
        "the gated delta rule in most layers": config.delta is not None,
        "Mamba-2 in most layers": family == "bamba",
        "Mamba-2 next to attention in every layer": family == "falcon_h1",
        "attention's output multiplied by a gate": config.attention_gate,
        "a sink in each head's softmax": config.sinks,
        "biases of attention": family == "gpt_oss",
        "experts in the place of the MLP": config.mixture is not None,
        "with biases and a clamped gated unit": config.mixture is not None and config.mixture.clamp is not None,
        "v normed": config.value_norm,
        "two sizes of heads": len({layer.sizes for layer in config.layers}) > 1,
        "inputs of each layer": config.per_layer is not None,
        "a sliding window": windowed == {True},
        "a sliding window in most layers": windowed == {True, False} and family != "gpt_oss",
        "a sliding window in every second layer": family == "gpt_oss",
        "neighbouring features turned": any(rotary.interleaved for rotary in config.rotary),
        "part of the features turned": any(rotary.features is not None for rotary in config.rotary),
        "two sets of rotary angles": len(config.rotary) > 1,
    }
    optional = {
        "multipliers of the embedding, of scores, of what is added to the stream, and of logits": family.startswith(
            "granite"
        ),
        "Mamba-2 where `layer_types` says so": family == "granitemoehybrid",
        "experts next to the MLP where `num_local_experts` says so": family == "granitemoehybrid",
        "multipliers of the outputs of modules": family == "falcon_h1",
        "no rotary embedding where `position_embedding_type` is not `rope`": family == "granitemoehybrid",
        "late layers that use earlier ones' keys and values, capped logits": config.value_norm,
        "queries scaled by their position": config.query_scaling is not None,
        "capped scores and logits": config.attention_cap is not None,
        "part of the features turned where `partial_rotary_factor` says so": family == "phi3",
        "a sliding window where `sliding_window` says so": family in ("phi3", "ministral3", "mixtral"),
        "layers without experts where `mlp_only_layers` or `decoder_sparse_step` says so": family == "qwen3_moe",
        "a sliding window where `use_sliding_window` says so": family == "qwen3_moe",
        "biases where `attention_bias` or `mlp_bias` says so": family == "llama",
        "a sliding window in late layers where `use_sliding_window` says so": family in ("qwen2", "qwen3"),
    }
    found = [word for word, holds in {**words, **optional}.items() if holds]
    return ", ".join(found) or "nothing"


def wrappers_section() -> str:
    """Every image model whose text model is opened alone."""
    rows = ["| `model_type` | the adapter's modules begin with |", "|---|---|"]
    for model_type in sorted(WRAPPERS):
        _, wrapper = unwrap_config({"model_type": model_type, "text_config": {}, "tie_word_embeddings": True})
        assert wrapper is not None
        rows.append(f"| `{model_type}` | `{wrapper.prefix}.` |")
    return "\n".join(rows)


def storage_section() -> str:
    """Storage types of GGUF files, readable or not."""
    known = [kind for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES]
    whole = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")  # of no weights
    weights = [kind for kind in known if kind.name not in whole]
    readable = [f"`{kind.name}`" for kind in weights if is_readable(int(kind))]
    others = [f"`{kind.name}`" for kind in weights if not is_readable(int(kind))]
    rows = [f"| read, in any mix | {', '.join(readable)} |"]
    if others:
        rows.append(f"| refused when the file is opened | {', '.join(others)} |")
    return "\n".join(["| storage types | |", "|---|---|", *rows])


def fallback_section() -> str:
    """When `--engine auto` does not take the decoder engine, and what to do."""
    fixed = ", ".join(f"`{key}` other than `{str(value).lower()}`" for key, value in FIXED.items())
    quantized = ", ".join(f"`{key}`" for key in QUANTIZED)
    rows = [
        ("a family or a text model that is not above", "transformers", "wait, or add the family: CONTRIBUTING"),
        (
            f"{quantized} in config.json, other than gpt-oss's `mxfp4`",
            "transformers, where its package is there",
            "give the GGUF file, or the directory before it was quantized",
        ),
        (
            "another rotary rule, or `partial_rotary_factor` below 1 in a family where all features turn",
            "transformers",
            "none: the engine lacks it",
        ),
        (fixed, "transformers", "none: the engine lacks it"),
        (
            "a field that transformers reads and the engine does not",
            "transformers",
            "none: the message names the field",
        ),
        ("a field that no model of this type reads", "the decoder engine, with a note", "nothing"),
        ("GGUF metadata or tensors that are not understood", "an error", "give the model's Hugging Face directory"),
    ]
    table = [f"| {what} | {done} | {remedy} |" for what, done, remedy in rows]
    return "\n".join(
        ["| what the model has | what is taken | what would change it |", "|---|---|---|", *table, "", f"{COST}."]
    )
