"""What a GGUF file of architecture qwen35 says beside what every file says: the gated delta rule and its layers.

A layer has the rule but for every fourth, or as `full_attention_interval` or `attention.recurrent_layers` say; the
value heads are as wide together as `ssm.inner_size`. Blocks behind the model's own that predict further tokens,
`nextn_predict_layers` of them, are left out.
"""

from __future__ import annotations

from typing import Any

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_metadata import Metadata

RECURRENT_LAYERS = "attention.recurrent_layers"
"""Which layers have a state; the gguf package has no name for it, and llama.cpp reads it."""
DELTA_INTERVAL = 4
"""Where a file says nothing, every fourth layer has attention."""


def own_prediction_blocks(file: GGUFFile, architecture: str) -> int:
    """How many blocks behind those of the model predict further tokens: Qwen3.5's alone may have some."""
    key = "nextn_predict_layers"
    return (Metadata(file, architecture).optional(key, int) or 0) if architecture == "qwen35" else 0


def delta_config(config: dict[str, Any], metadata: Metadata, file: GGUFFile) -> None:
    """Add what the rule needs, and whether attention has biases, to a Hugging Face config in the making."""
    layers = config["num_hidden_layers"]
    value_heads, inner = metadata.integer("ssm.time_step_rank"), metadata.integer("ssm.inner_size")
    if inner % value_heads:
        raise ArtifactError(f"{value_heads} value heads cannot be {inner} wide together", where=str(file.path))
    metadata.get("rope.dimension_sections")  # of no other use than to images
    config |= {
        "model_type": "qwen3_5_text",
        "attention_bias": any(name.endswith("attn_output.bias") for name in file.tensors),
        # A quarter of the features turns where a config is silent.
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0),
        "layer_types": ["linear_attention" if here else "full_attention" for here in _recurrent(metadata, layers)],
        "linear_num_key_heads": metadata.integer("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": metadata.integer("ssm.state_size"),
        "linear_value_head_dim": inner // value_heads,
        "linear_conv_kernel_dim": metadata.integer("ssm.conv_kernel"),
    }
    if predicted := metadata.optional("nextn_predict_layers", int):
        config["mtp_num_hidden_layers"] = predicted


def _recurrent(metadata: Metadata, layers: int) -> list[bool]:
    """Which layers have the delta rule: as the file lists them, or all but every so-manieth."""
    listed = metadata.get(RECURRENT_LAYERS)
    interval = metadata.integer("full_attention_interval", DELTA_INTERVAL)
    if isinstance(listed, bool):
        return [listed] * layers
    if isinstance(listed, list) and len(listed) >= layers:
        return [bool(item) for item in listed[:layers]]
    return [bool((layer + 1) % interval) for layer in range(layers)]


def delta_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors that Qwen3.5 alone has, or has in another shape: beside every query stands its gate."""
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    values = heads * config["linear_value_head_dim"]
    channels = values + 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    queries = 2 * config["num_attention_heads"] * config["head_dim"]
    return {
        "attn_q.weight": (queries, hidden),
        "attn_q.bias": (queries,),
        "attn_qkv.weight": (channels, hidden),
        "attn_gate.weight": (values, hidden),
        "ssm_conv1d.weight": (channels, config["linear_conv_kernel_dim"]),
        "ssm_out.weight": (hidden, values),
        "ssm_norm.weight": (config["linear_value_head_dim"],),
        **dict.fromkeys(("ssm_beta.weight", "ssm_alpha.weight"), (heads, hidden)),
        **dict.fromkeys(("ssm_a", "ssm_dt.bias"), (heads,)),
    }
