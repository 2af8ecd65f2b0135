"""Map GGUF tensor names to Hugging Face names. The layout of their values is in `gguf_layouts`.

A GGUF file has one tensor per layer and projection with the matrices of all experts, and one with their biases
(gpt-oss).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from backhand.nn.families.family import (
    LAYER_SCALAR,
    PER_LAYER_GROUPS,
    PER_LAYER_MODEL,
    PER_LAYER_MODEL_NORM,
    PER_LAYER_NORM,
    PER_LAYER_TABLE,
)
from backhand.nn.loading.expert_tensors import parse_expert_name

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_WHOLE_OF = {
    "lfm2": {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"},
    "gemma4": _WHOLE
    | {
        "per_layer_token_embd": PER_LAYER_TABLE,
        "per_layer_model_proj": PER_LAYER_MODEL,
        "per_layer_proj_norm": PER_LAYER_MODEL_NORM,
    },
}
"""Architectures with other names outside of their blocks."""

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_PROJECTIONS = _ATTENTION | {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FUSED_MLP = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_GLM = _NORMS | _ATTENTION | _FUSED_MLP
_FUSED = _NORMS | {"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"} | _FUSED_MLP
_LFM2 = _ATTENTION | {
    "attn_norm": "operator_norm",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "attn_output": "self_attn.out_proj",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.conv": "conv.conv",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
_BLOCK = _NORMS | _PROJECTIONS
_ROUTER = {"ffn_gate_inp": "mlp.gate"}

_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_OF_EXPERTS = re.compile(rf"blk\.(?P<layer>\d+)\.(?P<stack>{'|'.join(_EXPERTS)})\.(?P<kind>weight|bias)")
_WITH_EXPERTS = ("llama", "qwen3moe", "gpt-oss")
_WITH_EXPERT_BIASES = ("gpt-oss",)

_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_SANDWICH = _AFTER | {"ffn_norm": "pre_feedforward_layernorm"}

_QWEN35 = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}

_GEMMA4 = {"inp_gate": PER_LAYER_GROUPS[0][0], "proj": PER_LAYER_GROUPS[1][0], "post_norm": PER_LAYER_NORM}

_GPT_OSS = _ATTENTION | {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
}
_WHOLE_NAMES = {
    "qwen35": {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"},
    "gemma4": {"layer_output_scale.weight": LAYER_SCALAR},
    "gpt-oss": {"attn_sinks.weight": "self_attn.sinks"},
}
"""Tensors of a block that are not the weight or bias of a module, by architecture."""

_BLOCK_OF: dict[str, dict[str, str]] = {
    "llama": _BLOCK | _ROUTER,
    "qwen2": _BLOCK,
    "qwen3": _BLOCK | _QK_NORM,
    "qwen35": _PROJECTIONS | _QK_NORM | _QWEN35,
    "qwen3moe": _BLOCK | _QK_NORM | _ROUTER,
    "gpt-oss": _GPT_OSS,
    "granite": _BLOCK,
    "lfm2": _LFM2,
    "smollm3": _BLOCK,
    "olmo2": _PROJECTIONS | _QK_NORM | _AFTER,
    "mistral3": _BLOCK,
    "exaone4": _PROJECTIONS | _QK_NORM | _AFTER,
    "phi3": _FUSED,
    "chatglm": _GLM,
    "glm4": _GLM | {"post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"},
    "gemma2": _BLOCK | _SANDWICH,
    "gemma3": _BLOCK | _QK_NORM | _SANDWICH,
    "gemma4": _BLOCK | _QK_NORM | _SANDWICH | _GEMMA4,
}

ARCHITECTURES = tuple(_BLOCK_OF)
"""Values of general.architecture that can be read."""

_OF_ONE_NAME = "llama", "qwen2", "qwen3", "granite", "lfm2", "smollm3", "olmo2", "exaone4", "phi3", "glm4", "gemma2"
"""Architectures with the same name in Hugging Face and ggml."""
_ARCHITECTURE_OF = {name: name for name in _OF_ONE_NAME} | {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3_5_text": "qwen35",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "granitemoehybrid": "granite",
    "olmo3": "olmo2",
    "ministral3": "mistral3",
    "glm": "chatglm",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
}

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_SKIPPED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?|rope_factors_(long|short)\.weight")


@cache
def _names_of(architecture: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return two maps from GGUF names to Hugging Face names: tensors outside of blocks, and tensors of a block."""
    whole, block = _WHOLE_OF.get(architecture, _WHOLE), _BLOCK_OF[architecture]
    inside = {f"{stored}.weight": f"{ours}.weight" for stored, ours in block.items()}
    if architecture != "lfm2":
        with_bias = {stored: ours for stored, ours in block.items() if ours.endswith(("_proj", ".router"))}
        inside |= {f"{stored}.bias": f"{ours}.bias" for stored, ours in with_bias.items()}
    outside = {f"{stored}.weight": f"{ours}.weight" for stored, ours in whole.items()}
    return outside, inside | _WHOLE_NAMES.get(architecture, {})


def gguf_architecture(config: Mapping[str, Any]) -> str | None:
    """Return the general.architecture of a model with this Hugging Face config, or None if it is not supported."""
    return _ARCHITECTURE_OF.get(str(config.get("model_type")))


_GRANITE4_PARTS = {
    "shared_mlp.input_linear.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "shared_mlp.output_linear.weight": ("mlp.down_proj.weight",),
}
"""Tensors of Granite 4 → Granite 3's names, which the files have: gate and up are separate tensors."""


def gguf_names(architecture: str, name: str) -> tuple[str, ...]:
    """Return the GGUF names of the tensors that contain a tensor, empty if the architecture has no such tensor.

    If there are several, each has the same number of the tensor's rows, in this order.

    Args:
        name: Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`. For an expert's matrix or bias the
            result is the stack of all experts.
    """
    if (expert := parse_expert_name(name)) is not None:
        block, _, part = expert
        stack = next(stack for stack, ours in _EXPERTS.items() if ours == part)
        kind = name.rpartition(".")[2]
        exists = architecture in (_WITH_EXPERTS if kind == "weight" else _WITH_EXPERT_BIASES)
        return (f"blk.{block.rpartition('.')[2]}.{stack}.{kind}",) if exists else ()
    outside, inside = _names_of(architecture)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return tuple(stored for stored, ours in outside.items() if ours == name)
    parts = _GRANITE4_PARTS.get(match[2], (match[2],)) if architecture == "granite" else (match[2],)
    return tuple(f"blk.{match[1]}.{stored}" for part in parts for stored, ours in inside.items() if ours == part)


def huggingface_names(architecture: str, name: str, shape: Sequence[int]) -> list[str]:
    """Return the Hugging Face names in a GGUF tensor: one per expert in the order of the stack, or only one."""
    match = _OF_EXPERTS.fullmatch(name)
    dimensions = {"weight": 3, "bias": 2 if architecture in _WITH_EXPERT_BIASES else None}
    if match is None or architecture not in _WITH_EXPERTS or len(shape) != dimensions[match["kind"]]:
        only = huggingface_name(architecture, name)
        return [] if only is None else [only]
    block, part = f"model.layers.{match['layer']}", _EXPERTS[match["stack"]]
    return [f"{block}.mlp.experts.{expert}.{part}.{match['kind']}" for expert in range(shape[0])]


def huggingface_name(architecture: str, name: str) -> str | None:
    """Return the Hugging Face name of a GGUF tensor that is not a stack, or None if there is no such tensor."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    outside, inside = _names_of(architecture)
    if match is None:
        return outside.get(name)
    ours = inside.get(match[2])
    return None if ours is None else f"model.layers.{match[1]}.{ours}"


def is_skipped(name: str) -> bool:
    """Return True for tensors that are not weights: rotary frequency tables, which become part of the config."""
    return _SKIPPED.fullmatch(name) is not None
