"""GGUF architectures: model types, names of tensors, and conventions. The layout of values is in `gguf_layouts`.

The names of modules are those of the gguf package's TensorNameMap, by which llama.cpp's converter names them. A GGUF
file has one tensor per layer and projection with the matrices of all experts, and one with their biases (gpt-oss).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from backhand.nn.families.family import (
    GATED_DELTA_GROUPS,
    GPT_OSS_ROUTER,
    GROUPS,
    LAYER_SCALAR,
    MLP_GROUPS,
    NORMS_BEFORE,
    PER_LAYER_GROUPS,
    PER_LAYER_MODEL,
    PER_LAYER_MODEL_NORM,
    PER_LAYER_NORM,
    PER_LAYER_TABLE,
    ROUTER,
    SHORT_CONV_GROUPS,
    SINKS,
    TRAITS,
    EncoderInputs,
    split_layer,
    ssm_groups,
)
from backhand.nn.loading.expert_tensors import parse_expert_name

_NOTHING: Mapping[str, str] = MappingProxyType({})
_ATTENTION_BIAS = {"attention_bias": "blk.0.attn_output.bias"}
_BIASES = _ATTENTION_BIAS | {"mlp_bias": "blk.0.ffn_down.bias"}
_DELTA_MODULES = (*GATED_DELTA_GROUPS[0], *GATED_DELTA_GROUPS[1], "linear_attn.conv1d", "linear_attn.norm")
_SHORT_CONV_MODULES = (*SHORT_CONV_GROUPS[0], "conv.conv", *SHORT_CONV_GROUPS[1])


def _ssm_modules(path: str) -> tuple[str, ...]:
    (in_proj,), (out_proj,) = ssm_groups(path)
    return in_proj, f"{path}.conv1d", f"{path}.norm", out_proj


def _ssm_tensors(path: str) -> dict[str, str]:
    names = {"ssm_a": "A_log", "ssm_d": "D", "ssm_dt.bias": "dt_bias", "ssm_conv1d.bias": "conv1d.bias"}
    return {stored: f"{path}.{ours}" for stored, ours in names.items()}


_PER_LAYER_MODULES = (*PER_LAYER_GROUPS[0], *PER_LAYER_GROUPS[1], PER_LAYER_NORM)
# llama.cpp gives every layer of Qwen3-MoE experts; Backhand also reads layers with an MLP.
_DENSE_MLP = {f"ffn_{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


class Architecture(NamedTuple):
    """One value of general.architecture."""

    families: tuple[str, ...]  # values of model_type whose files have this architecture
    modules: tuple[str, ...] = ()  # modules of a block in addition to those of the first family's `TRAITS`
    # GGUF name → our name of the block's tensors for which TensorNameMap has no name
    tensors: Mapping[str, str] = _NOTHING
    outside: tuple[str, ...] = ()  # modules outside of blocks in addition to embedding, final norm and head
    # fields of the config that state biases → the tensor that shows if a file has them: q, k, v and o have biases
    # together, and so have gate, up and down
    biases: Mapping[str, str] = _NOTHING
    interleaved: bool = False  # neighbouring features are rotated as a pair
    norm_offset: float = 0.0  # constant that is added to stored weights of norms
    expert_tensors: tuple[str, ...] = ()  # kinds of tensors that exist as stacks of all experts: `weight`, `bias`
    norm_eps: str = "attention.layer_norm_rms_epsilon"  # the key with the ε of the norms
    prefix: str = "model."  # prefix of the modules' names in TensorNameMap, in ours `model.`
    head: Mapping[str, str] = _NOTHING  # GGUF name → our name of the modules of an encoder's score head


_SHARED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
_LAYER_NORM_EPS = "attention.layer_norm_epsilon"
_TABLE = {
    "bert": Architecture(("bert",), norm_eps=_LAYER_NORM_EPS, head={"cls": "pooler.dense", "cls.output": "classifier"}),
    "modern-bert": Architecture(
        ("modernbert",),
        norm_eps=_LAYER_NORM_EPS,
        head={"cls": "head.dense", "cls.norm": "head.norm", "cls.output": "classifier"},
    ),
    "llama": Architecture(
        ("llama", "mistral", "mixtral"), (ROUTER,), biases=_BIASES, interleaved=True, expert_tensors=("weight",)
    ),
    "qwen2": Architecture(("qwen2",)),
    "qwen3": Architecture(("qwen3",), biases=_ATTENTION_BIAS),
    "qwen35": Architecture(
        ("qwen3_5_text",),
        _DELTA_MODULES,
        {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"},
        norm_offset=1.0,
    ),
    "qwen3moe": Architecture(("qwen3_moe",), (ROUTER,), _DENSE_MLP, biases=_ATTENTION_BIAS, expert_tensors=("weight",)),
    "gpt-oss": Architecture(
        ("gpt_oss",),
        (GPT_OSS_ROUTER,),
        {"attn_sinks.weight": SINKS},
        biases=_ATTENTION_BIAS,
        expert_tensors=("weight", "bias"),
    ),
    "granite": Architecture(("granite",), biases=_BIASES, interleaved=True),
    "falcon-h1": Architecture(
        ("falcon_h1",), _ssm_modules("mamba"), {"ffn_norm": "pre_ff_layernorm.weight"} | _ssm_tensors("mamba")
    ),
    "granitehybrid": Architecture(
        ("granite",),
        (*_ssm_modules("mamba"), GPT_OSS_ROUTER),
        _ssm_tensors("mamba")
        | {f"ffn_{module.removesuffix('_proj.weight')}_shexp.weight": f"shared_experts.{module}" for module in _SHARED},
        biases=_ATTENTION_BIAS,
        interleaved=True,
        expert_tensors=("weight",),
    ),
    "nemotron_h": Architecture(
        ("nemotron_h",),
        (*_ssm_modules("mixer"), *MLP_GROUPS[0], *MLP_GROUPS[1]),
        _ssm_tensors("mixer"),
        interleaved=True,
        prefix="backbone.",
    ),
    "lfm2": Architecture(("lfm2",), _SHORT_CONV_MODULES),
    "smollm3": Architecture(("smollm3",), biases=_BIASES, interleaved=True),
    "olmo2": Architecture(("olmo2", "olmo3"), biases=_ATTENTION_BIAS),
    "mistral3": Architecture(("ministral3",), interleaved=True),
    "exaone4": Architecture(("exaone4",)),
    "phi3": Architecture(("phi3",)),
    "chatglm": Architecture(("glm",)),
    "glm4": Architecture(("glm4",)),
    "gemma2": Architecture(("gemma2",), norm_offset=1.0),
    "gemma3": Architecture(("gemma3_text",), norm_offset=1.0),
    "gemma-embedding": Architecture(("gemma3_text",), norm_offset=1.0),
    "gemma4": Architecture(
        ("gemma4_text",),
        _PER_LAYER_MODULES,
        {"layer_output_scale.weight": LAYER_SCALAR},
        (PER_LAYER_TABLE, PER_LAYER_MODEL, PER_LAYER_MODEL_NORM),
        _ATTENTION_BIAS,
    ),
}
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(_TABLE)
"""Values of general.architecture that can be read and written."""
_EMBEDDING_GEMMA, GRANITE_HYBRID = "gemma-embedding", "granitehybrid"
_ARCHITECTURE_OF = {
    family: name
    for name, row in ARCHITECTURES.items()
    for family in row.families
    if name not in (_EMBEDDING_GEMMA, GRANITE_HYBRID)
}

_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_OF_EXPERTS = re.compile(rf"blk\.(?P<layer>\d+)\.(?P<stack>{'|'.join(_EXPERTS)})\.(?P<kind>weight|bias)")

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
SCORE_HEAD = "cls.output.weight"
"""The score head: of a decoder the rows of yes and no of the model's head, which it has as well."""
_ROTARY_TABLES = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?|rope_factors_(long|short)\.weight")


@cache
def _names_of(architecture: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return two maps from GGUF names to Hugging Face names: tensors outside of blocks, and tensors of a block."""
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    row = ARCHITECTURES[architecture]
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(MODEL_ARCH(number), 1)

    def stored(modules: Sequence[str], prefix: str = "") -> Iterator[tuple[str, str]]:
        for module in modules:
            path = prefix + module
            known = row.prefix + path.removeprefix("model.") if path.startswith("model.") else path
            if (name := names.get_name(known)) is not None:
                yield name.removeprefix("blk.0."), module

    traits = TRAITS.get(row.families[0], {})
    inputs: EncoderInputs | None = traits.get("inputs")
    ends = traits.get("embedding", "model.embed_tokens"), traits.get("final_norm", "model.norm")
    of_inputs = () if inputs is None else (inputs.norm, inputs.positions, inputs.token_types)
    modules = (name for name in (*ends, *of_inputs, *row.outside) if name is not None)
    outside = {f"{name}.weight": f"{ours}.weight" for name, ours in stored(tuple(modules))}
    block = dict(stored(_block_modules(row), f"{_layers_path(architecture)}.0."))
    inside = {f"{name}.weight": f"{ours}.weight" for name, ours in block.items()}
    if inputs is not None:
        outside |= {name.replace(".weight", ".bias"): f"{inputs.norm}.bias" for name in outside if "norm" in name}
        inside |= {f"{name}.bias": f"{ours}.bias" for name, ours in block.items()}
        heads = itertools.product(row.head.items(), ("weight", "bias"))
        return outside | {f"{name}.{kind}": f"{ours}.{kind}" for (name, ours), kind in heads}, inside
    outside["output.weight"] = "lm_head.weight"
    if architecture != "lfm2":
        with_bias = {name: ours for name, ours in block.items() if ours.endswith(("_proj", ".router"))}
        inside |= {f"{name}.bias": f"{ours}.bias" for name, ours in with_bias.items()}
    return outside, inside | dict(row.tensors)


def _layers_path(architecture: str) -> str:
    path: str = TRAITS.get(ARCHITECTURES[architecture].families[0], {}).get("layers_path", "model.layers")
    return path


def _block_modules(row: Architecture) -> list[str]:
    traits = TRAITS.get(row.families[0], {})
    norms = [name for name in traits.get("norms", NORMS_BEFORE) if name is not None]
    norms += traits.get("qk_norms", ("self_attn.q_norm", "self_attn.k_norm")) if "qk_norm" in traits else ()
    linear = [name for group in traits.get("groups", GROUPS) for name in group]
    return [*norms, *linear, *row.modules]


def gguf_architecture(config: Mapping[str, Any]) -> str | None:
    """Return the general.architecture of a model with this Hugging Face config, or None if it is not supported."""
    if config.get("model_type") == "gemma3_text" and config.get("use_bidirectional_attention"):
        return _EMBEDDING_GEMMA
    if config.get("model_type") == "bamba":
        return GRANITE_HYBRID
    if config.get("model_type") == "granitemoehybrid":
        types = config.get("layer_types")
        hybrid = not isinstance(types, list) or any(one in ("mamba", "linear_attention") for one in types)
        return GRANITE_HYBRID if hybrid else None if has_shared_mlp(config) else "granite"
    return _ARCHITECTURE_OF.get(str(config.get("model_type")))


def has_shared_mlp(config: Mapping[str, Any]) -> bool:
    """Return True if a Hugging Face config is that of a Granite 4 with experts, which has an MLP next to them."""
    # The class has experts by default.
    return config.get("model_type") == "granitemoehybrid" and bool(config.get("num_local_experts", 1))


_BAMBA_NAMES = {
    "model.final_layernorm.weight": "model.norm.weight",
    "pre_ff_layernorm.weight": "post_attention_layernorm.weight",
    **{
        f"feed_forward.{part}_proj.{kind}": f"mlp.{part}_proj.{kind}"
        for part, kind in itertools.product(("gate", "up", "down"), ("weight", "bias"))
    },
}
GRANITE_PARTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "granitemoehybrid": {
        "shared_mlp.input_linear.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "shared_mlp.output_linear.weight": ("mlp.down_proj.weight",),
    },
    "bamba": {ours: (stored,) for ours, stored in _BAMBA_NAMES.items()},
}
"""Tensors by model_type, those of a block by their names in it → Granite 3's names of the tensors in files.

A file of architecture `granite` opens as a Granite 3, with these names. One of architecture `granitehybrid` opens as a
Granite 4, whose fused tensor is then in two tensors of the file, or as a Bamba.
"""
_PARTS_OF = {ours: stored for parts in GRANITE_PARTS.values() for ours, stored in parts.items()}


def shared_name(part: str) -> str:
    """Return the name of a part of the MLP that is next to experts, given the name of the same part without experts."""
    return f"shared_experts.{module}" if (module := part.removeprefix("mlp.")) in _SHARED else part


def gguf_names(architecture: str, name: str, *, shared_mlp: bool = False) -> tuple[str, ...]:
    """Return the GGUF names of the tensors that contain a tensor, empty if the architecture has no such tensor.

    If there are several, each has the same number of the tensor's rows, in this order.

    Args:
        name: Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`. For an expert's matrix or bias the
            result is the stack of all experts.
        shared_mlp: True if the MLP is next to experts.
    """
    if (expert := parse_expert_name(name)) is not None:
        block, _, part = expert
        stack = next(stack for stack, ours in _EXPERTS.items() if ours == part)
        kind = name.rpartition(".")[2]
        exists = kind in ARCHITECTURES[architecture].expert_tensors
        return (f"blk.{block.rpartition('.')[2]}.{stack}.{kind}",) if exists else ()
    outside, inside = _names_of(architecture)
    layer, module = split_layer(name) or (None, name)
    parts = _PARTS_OF.get(module, (module,)) if architecture.startswith("granite") else (module,)
    if layer is None:
        return tuple(stored for stored, ours in outside.items() if ours in parts)
    if shared_mlp:
        parts = tuple(shared_name(part) for part in parts)
    return tuple(f"blk.{layer}.{stored}" for part in parts for stored, ours in inside.items() if ours == part)


def huggingface_names(architecture: str, name: str, shape: Sequence[int]) -> list[str]:
    """Return the Hugging Face names in a GGUF tensor: one per expert in the order of the stack, or only one."""
    match = _OF_EXPERTS.fullmatch(name)
    stacked = () if match is None else ARCHITECTURES[architecture].expert_tensors
    if match is None or match["kind"] not in stacked or len(shape) != (3 if match["kind"] == "weight" else 2):
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
    return None if ours is None else f"{_layers_path(architecture)}.{match[1]}.{ours}"


def is_skipped(architecture: str, name: str) -> bool:
    """Return True for tensors that are not read: rotary tables, which become part of the config, and rows of a head."""
    if name == SCORE_HEAD:
        return not ARCHITECTURES[architecture].head
    return _ROTARY_TABLES.fullmatch(name) is not None
