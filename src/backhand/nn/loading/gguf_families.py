"""Family-specific fields of the Hugging Face config of a GGUF file, one function per architecture.

Each function receives the config with the fields that every family has, the metadata, and the file. Files often omit
numbers that are constants in llama.cpp's code:

- **BERT and ModernBERT.** The activation is GELU, and attention has both directions. Every third layer of ModernBERT
  has full attention, beginning with the first. Half of the window is visible to each side.
- **Gemma.** The base of local rope is 1e4, and every sixth layer is full attention. Queries are scaled by
  head_dim^-½, in the largest models (46 layers of Gemma 2, 62 of Gemma 3) by (hidden / heads)^-½. In Gemma 2 every
  second layer is full attention, and the caps are 50 and 30. EmbeddingGemma is Gemma 3 in both directions. Gemma 4: see
  `gguf_gemma4`.
- **Mixtral** files have architecture `llama` and experts. The weights of a token's experts add up to 1.
- **Qwen3-MoE.** llama.cpp gives every layer experts. Backhand gives none to a layer without a router in the file.
- **gpt-oss.** Every second layer is full attention, beginning with the second. The constants of the experts' gated
  unit are 1.702 and 7.
- **LFM2.** A layer with 0 key/value heads is a convolution.
- **Qwen3.5.** Every fourth layer is attention and the others have the gated delta rule, unless
  `full_attention_interval` or `attention.recurrent_layers` says otherwise. Multi-token prediction blocks after the last
  layer are ignored.
- **Mamba-2** (`granitehybrid`, `falcon-h1`, `nemotron_h`). A layer with 0 key/value heads is Mamba-2. In `nemotron_h`,
  a layer with a feed-forward length is an MLP. Falcon-H1's multipliers are part of the weights. A `granitehybrid` that
  rotates part of each head is a Bamba, which has no multipliers. In a Granite 4 with experts, the feed-forward length
  is that of an expert.
- **Mistral** files have architecture `llama`. A file with a sliding window becomes a `mistral` config.
- **OLMo 3** files have architecture `olmo2` and a sliding window. Rotary scaling does not apply to sliding layers.
- **OLMo and EXAONE.** If there is a sliding window, every fourth layer is full attention. EXAONE 4 with 64 layers has a
  window of 4096 by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from backhand.errors import ArtifactError
from backhand.nn.families.family import GPT_OSS_CLAMP
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_gemma4 import gemma4_config
from backhand.nn.loading.gguf_metadata import Metadata, all_but_every, layer_kinds, sliding_layers

FamilyPart = Callable[[dict[str, Any], Metadata, GGUFFile], None]

_GEMMA2_27B_LAYERS = 46
_GEMMA3_27B_LAYERS = 62
NO_ROPE_INTERVAL = 4
"""smollm3: every fourth layer has no rotary embedding. Files do not state it."""
FULL_INTERVAL = 4
"""olmo2, exaone4: every fourth layer is full attention. llama.cpp reads no pattern from these files."""
GPT_OSS_INTERVAL = 2
"""gpt-oss: every second layer is full attention. llama.cpp reads no pattern from these files."""
MODERN_BERT_INTERVAL = 3
"""modern-bert: every third layer is full attention by default, beginning with the first."""
EXAONE4_32B_LAYERS = 64
"""exaone4: number of layers of the only model to which llama.cpp gives a sliding window by default."""
RECURRENT_LAYERS = "attention.recurrent_layers"
"""Key for the layers with a recurrent state. llama.cpp reads it, but the gguf package has no constant for it."""
DELTA_INTERVAL = 4
"""qwen35: every fourth layer is attention by default."""


def _llama(config: dict[str, Any], metadata: Metadata, _: GGUFFile) -> None:
    if metadata.optional("expert_count", int):
        del config["attention_bias"], config["mlp_bias"]
        config |= {
            "model_type": "mixtral",
            "num_local_experts": metadata.integer("expert_count"),
            "num_experts_per_tok": metadata.integer("expert_used_count"),
            "sliding_window": metadata.window,
        }
    elif metadata.window:
        config |= {"model_type": "mistral", "sliding_window": metadata.window}


def _qwen3moe(config: dict[str, Any], metadata: Metadata, file: GGUFFile) -> None:
    width = metadata.optional("expert_feed_forward_length", int)
    used, layers = metadata.integer("expert_used_count"), range(config["num_hidden_layers"])
    config |= {
        "model_type": "qwen3_moe",
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": used,
        # llama.cpp's default.
        "moe_intermediate_size": width or config["intermediate_size"] // used,
        "norm_topk_prob": True,
        "mlp_only_layers": [layer for layer in layers if f"blk.{layer}.ffn_gate_inp.weight" not in file.tensors],
    }


def _gpt_oss(config: dict[str, Any], metadata: Metadata, _: GGUFFile) -> None:
    metadata.accept_if_equal("rope.freq_base_swa", config["rope_parameters"]["rope_theta"])
    config |= {
        "model_type": "gpt_oss",
        "intermediate_size": metadata.integer("expert_feed_forward_length", config["intermediate_size"]),
        "num_local_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": layer_kinds(sliding_layers(metadata, config["num_hidden_layers"], GPT_OSS_INTERVAL)),
        "swiglu_alpha": GPT_OSS_CLAMP.gain,
        "swiglu_limit": GPT_OSS_CLAMP.limit,
    }


def prediction_block_count(file: GGUFFile, architecture: str) -> int:
    """Return the number of multi-token prediction blocks after the last layer. Only Qwen3.5 has such blocks."""
    key = "nextn_predict_layers"
    return (Metadata(file, architecture).optional(key, int) or 0) if architecture == "qwen35" else 0


def _qwen35(config: dict[str, Any], metadata: Metadata, file: GGUFFile) -> None:
    """Add the gated delta rule's sizes. `ssm.inner_size` is the width of all value heads together."""
    layers = config["num_hidden_layers"]
    value_heads, inner = metadata.integer("ssm.time_step_rank"), metadata.integer("ssm.inner_size")
    if inner % value_heads:
        raise ArtifactError(
            f"ssm.inner_size = {inner} is not a multiple of the {value_heads} value heads", where=str(file.path)
        )
    metadata.get("rope.dimension_sections")  # used only for images
    interval = metadata.integer("full_attention_interval", DELTA_INTERVAL)
    recurrent = all_but_every(metadata, RECURRENT_LAYERS, layers, interval)[:layers]  # lists include prediction blocks
    config |= {
        "model_type": "qwen3_5_text",
        "attention_bias": any(name.endswith("attn_output.bias") for name in file.tensors),
        # Stated explicitly, because transformers' default is a quarter of the features.
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0),
        "layer_types": ["linear_attention" if here else "full_attention" for here in recurrent],
        "linear_num_key_heads": metadata.integer("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": metadata.integer("ssm.state_size"),
        "linear_value_head_dim": inner // value_heads,
        "linear_conv_kernel_dim": metadata.integer("ssm.conv_kernel"),
    }
    if predicted := metadata.optional("nextn_predict_layers", int):
        config["mtp_num_hidden_layers"] = predicted


def _granite(config: dict[str, Any], metadata: Metadata, _: GGUFFile) -> None:
    if metadata.get("rope.scaling.finetuned") is False:  # Granite without rotary embedding, which no config expresses
        metadata.mark_unread("rope.scaling.finetuned")
    config |= {
        "attention_multiplier": metadata.number("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": metadata.number("embedding_scale", 1.0),
        "residual_multiplier": metadata.number("residual_scale", 1.0),
        "logits_scaling": metadata.number("logit_scale"),
    }


def _mamba(metadata: Metadata, file: GGUFFile, names: tuple[str, ...]) -> dict[str, Any]:
    """Return heads, width of a head, groups, state width, taps and bias of the convolution by these names."""
    heads, inner = metadata.integer("ssm.time_step_rank"), metadata.integer("ssm.inner_size")
    if inner % heads:
        raise ArtifactError(f"ssm.inner_size = {inner} is not a multiple of {heads} heads", where=str(file.path))
    groups, width = metadata.integer("ssm.group_count", 1), metadata.integer("ssm.state_size")
    taps, bias = metadata.integer("ssm.conv_kernel"), any(name.endswith("ssm_conv1d.bias") for name in file.tensors)
    return dict(zip(names, (heads, inner // heads, groups, width, taps, bias), strict=True))


_MAMBA = (
    "mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv", "mamba_conv_bias",
)  # fmt: skip
_NEMOTRON = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "use_conv_bias")


def _attends(metadata: Metadata, layers: int, file: GGUFFile) -> list[bool]:
    """Return for each layer if it has attention, by its number of key/value heads."""
    counts = metadata.get("attention.head_count_kv")
    counts = counts if isinstance(counts, list) else [counts] * layers
    if len(counts) != layers:
        raise ArtifactError(f"head_count_kv has {len(counts)} numbers for {layers} layers", where=str(file.path))
    return [bool(count) for count in counts]


def _granite_hybrid(config: dict[str, Any], metadata: Metadata, file: GGUFFile) -> None:
    rotates = metadata.get("rope.scaling.finetuned", True)
    metadata.accept_if_equal("expert_shared_feed_forward_length", config["intermediate_size"])
    mamba = _mamba(metadata, file, _MAMBA)
    inner = mamba["mamba_n_heads"] * mamba["mamba_d_head"]
    if inner % config["hidden_size"]:
        raise ArtifactError(f"ssm.inner_size = {inner} is not a multiple of the hidden size", where=str(file.path))
    config |= mamba | {"mamba_expand": inner // config["hidden_size"]}
    attends = _attends(metadata, config["num_hidden_layers"], file)
    if rotates and "partial_rotary_factor" in config:
        for key in ("embedding_scale", "residual_scale", "logit_scale"):
            metadata.accept_if_equal(key, 1.0)
        metadata.accept_if_equal("attention.scale", config["head_dim"] ** -0.5)
        config |= {
            "model_type": "bamba",
            "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
            "attn_layer_indices": [layer for layer, here in enumerate(attends) if here],
        }
        return
    _granite(config, metadata, file)
    metadata.get("rope.scaling.finetuned")
    experts, width = metadata.optional("expert_count", int) or 0, config["intermediate_size"]
    if experts:
        config["num_experts_per_tok"] = metadata.integer("expert_used_count")
        width = metadata.integer("expert_shared_feed_forward_length")
    config |= {
        "model_type": "granitemoehybrid",
        "num_local_experts": experts,
        "shared_intermediate_size": width,
        "position_embedding_type": "rope" if rotates else "nope",
        "layer_types": ["attention" if here else "mamba" for here in attends],
    }


def _falcon_h1(config: dict[str, Any], metadata: Metadata, file: GGUFFile) -> None:
    mamba = _mamba(metadata, file, _MAMBA)
    config |= mamba | {
        "model_type": "falcon_h1",
        "mamba_d_ssm": mamba["mamba_n_heads"] * mamba["mamba_d_head"],
        "mamba_rms_norm": "blk.0.ssm_norm.weight" in file.tensors,
        "mamba_norm_before_gate": False,
    }


def _nemotron_h(config: dict[str, Any], metadata: Metadata, file: GGUFFile) -> None:
    layers = config["num_hidden_layers"]
    widths = metadata.get("feed_forward_length")
    mlps = [bool(width) for width in widths] if isinstance(widths, list) else [bool(widths)] * layers
    attends = _attends(metadata, layers, file)
    if len(mlps) != layers:
        raise ArtifactError(f"feed_forward_length has {len(mlps)} numbers for {layers} layers", where=str(file.path))
    for key in ("hidden_act", "rope_parameters"):
        del config[key]
    config |= _mamba(metadata, file, _NEMOTRON) | {
        "model_type": "nemotron_h",
        "layers_block_type": [
            "full_attention" if attention else "mlp" if mlp else "linear_attention"
            for attention, mlp in zip(attends, mlps, strict=True)
        ],
        "layer_norm_epsilon": config.pop("rms_norm_eps"),
        "mlp_bias": any(name.endswith("ffn_down.bias") for name in file.tensors),
    }


def _smollm3(config: dict[str, Any], _metadata: Metadata, _file: GGUFFile) -> None:
    config["no_rope_layer_interval"] = NO_ROPE_INTERVAL


def _lfm2(config: dict[str, Any], metadata: Metadata, file: GGUFFile) -> None:
    counts = metadata.get("attention.head_count_kv")
    layers = config["num_hidden_layers"]
    if isinstance(counts, list) and len(counts) != layers:
        raise ArtifactError(f"head_count_kv has {len(counts)} numbers for {layers} layers", where=str(file.path))
    del config["hidden_act"]
    config |= {
        "norm_eps": config.pop("rms_norm_eps"),
        "layer_types": [
            "full_attention" if not isinstance(counts, list) or counts[layer] else "conv" for layer in range(layers)
        ],
        "conv_L_cache": metadata.integer("shortconv.l_cache"),
        "conv_bias": False,
        "block_auto_adjust_ff_dim": False,  # the file states the final width
    }


def _olmo2(config: dict[str, Any], metadata: Metadata, _: GGUFFile) -> None:
    slides = sliding_layers(metadata, config["num_hidden_layers"], FULL_INTERVAL)
    if metadata.window:
        full = config["rope_parameters"]
        config |= {
            "model_type": "olmo3",
            "sliding_window": metadata.window,
            "layer_types": layer_kinds(slides),
            "rope_parameters": {
                "full_attention": full,
                "sliding_attention": metadata.sliding_rope_parameters(full["rope_theta"]),
            },
        }


def _exaone4(config: dict[str, Any], metadata: Metadata, _: GGUFFile) -> None:
    layers = config["num_hidden_layers"]
    stated = metadata.optional("attention.sliding_window", int)
    window = 4096 if stated is None and layers == EXAONE4_32B_LAYERS else metadata.window
    slides = sliding_layers(metadata, layers, FULL_INTERVAL)
    metadata.accept_if_equal("rope.freq_base_swa", config["rope_parameters"]["rope_theta"])
    config |= {
        "sliding_window": window,
        "layer_types": layer_kinds(window is not None and sliding for sliding in slides),
    }


def _original_length(config: dict[str, Any]) -> int:
    length: int = config["rope_parameters"].get("original_max_position_embeddings", config["max_position_embeddings"])
    return length


def _phi3(config: dict[str, Any], metadata: Metadata, _: GGUFFile) -> None:
    metadata.get("rope.scaling.original_context_length")  # used only by longrope
    config |= {"sliding_window": metadata.window, "original_max_position_embeddings": _original_length(config)}


def _mistral3(config: dict[str, Any], metadata: Metadata, _: GGUFFile) -> None:
    beta, length = metadata.optional("attention.temperature_scale", float), _original_length(config)
    metadata.accept_if_equal("attention.temperature_length", length)
    config["rope_parameters"] |= {"llama_4_scaling_beta": beta or 0.0, "original_max_position_embeddings": length}
    config |= {"model_type": "ministral3", "sliding_window": metadata.window}


def _glm(config: dict[str, Any], _: Metadata, file: GGUFFile) -> None:
    config |= {
        "model_type": "glm" if config["model_type"] == "chatglm" else config["model_type"],
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        # Stated explicitly, because transformers' default is half of the features.
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0),
    }


def _gemma(config: dict[str, Any], *, largest: int) -> None:
    """Add the fields of Gemma 2 and 3.

    Files do not state the query scaling. It is head_dim, except in the largest model.

    Args:
        largest: number of layers of the largest model.
    """
    is_largest = config["num_hidden_layers"] == largest
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"]
    del config["hidden_act"]
    config |= {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "query_pre_attn_scalar": int(scalar)}


def _gemma2(config: dict[str, Any], metadata: Metadata, _: GGUFFile) -> None:
    _gemma(config, largest=_GEMMA2_27B_LAYERS)
    config |= {
        "sliding_window": metadata.integer("attention.sliding_window", 4096),
        "layer_types": layer_kinds(layer % 2 == 0 for layer in range(config["num_hidden_layers"])),
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
    }


def _gemma3(config: dict[str, Any], metadata: Metadata, _: GGUFFile) -> None:
    _gemma(config, largest=_GEMMA3_27B_LAYERS)
    window = metadata.optional("attention.sliding_window", int)
    slides = sliding_layers(metadata, config["num_hidden_layers"], 6)
    local = metadata.sliding_rope_parameters(10000.0)
    config |= {
        "model_type": "gemma3_text",
        "sliding_window": window,
        "layer_types": layer_kinds(bool(window) and sliding for sliding in slides),
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        "final_logit_softcapping": metadata.optional("final_logit_softcapping", float),
        "attn_logit_softcapping": metadata.optional("attn_logit_softcapping", float),
    }


def _gemma_embedding(config: dict[str, Any], metadata: Metadata, file: GGUFFile) -> None:
    _gemma3(config, metadata, file)
    metadata.get("attention.causal")  # llama.cpp attends in both directions, whatever the file says
    config |= {"use_bidirectional_attention": True}


def _bert(config: dict[str, Any], metadata: Metadata, file: GGUFFile) -> None:
    types = file.tensors.get("token_types.weight")
    if types is None:
        raise ArtifactError("the tensor token_types.weight is missing", where=str(file.path))
    _encoder(config, metadata, "layer_norm_eps", "hidden_act")
    del config["head_dim"], config["num_key_value_heads"], config["rope_parameters"]
    config["type_vocab_size"] = types.shape[0]


def _modern_bert(config: dict[str, Any], metadata: Metadata, _: GGUFFile) -> None:
    del config["hidden_act"]
    _encoder(config, metadata, "norm_eps", "hidden_activation")
    config |= {
        "model_type": "modernbert",
        "classifier_pooling": "mean",  # what llama.cpp's head reads
        "local_attention": metadata.integer("attention.sliding_window"),
        "global_attn_every_n_layers": metadata.integer("attention.sliding_window_pattern", MODERN_BERT_INTERVAL),
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": metadata.sliding_rope_parameters(10000.0),
        },
    }


def _encoder(config: dict[str, Any], metadata: Metadata, norm_eps: str, activation: str) -> None:
    metadata.get("attention.causal")  # llama.cpp's graph of an encoder has no other form
    config |= {norm_eps: config.pop("rms_norm_eps"), activation: "gelu"}
    del config["tie_word_embeddings"]


FAMILY_PARTS: dict[str, FamilyPart] = {
    "bert": _bert,
    "modern-bert": _modern_bert,
    "llama": _llama,
    "qwen35": _qwen35,
    "qwen3moe": _qwen3moe,
    "gpt-oss": _gpt_oss,
    "granite": _granite,
    "granitehybrid": _granite_hybrid,
    "falcon-h1": _falcon_h1,
    "nemotron_h": _nemotron_h,
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
    "gemma-embedding": _gemma_embedding,
    "gemma4": gemma4_config,
}
"""Architecture → function that adds the family's fields to a config. Other architectures have no such fields."""
