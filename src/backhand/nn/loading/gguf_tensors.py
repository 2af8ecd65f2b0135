"""GGUF tensor names, and how each tensor is laid out there, against Hugging Face's.

Files of architectures `llama`, `granite`, `smollm3` and `mistral3` have the rows of attn_q and attn_k in another order:
ggml rotates neighbouring features 2i and 2i + 1 of a head where Hugging Face rotates i and i + head_dim/2, so that row
(head, half, i) there is row (head, i, half) here; biases likewise. Other architectures keep the order. Gemma's norm
weights are stored with the 1 already added, and so are Qwen3.5's but for that of its delta rule's output.

Qwen3.5's delta rule has several value heads for each key head, which are neighbours in Hugging Face's order. ggml
repeats the key heads as a whole, so that in a file value head (key head, i) stands at (i, key head): in the rows of
what makes values, gates, rates and decays, in the channels of the convolution, and in the columns of the output. The
decay's rate is stored as -e^A. The taps of a convolution are (channels, taps), (channels, 1, taps) here.

The matrices of all experts of a layer lie in one tensor a projection, and so do their biases (gpt-oss).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.decoder.config_fields import ConfigFields
from backhand.nn.decoder.delta_fields import delta_sizes
from backhand.nn.decoder.family import DeltaSizes
from backhand.nn.loading.expert_tensors import expert_of

_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

_WHOLE_OF = {
    "lfm2": {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"}
}
"""Where an architecture has other names outside of its blocks."""

_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_GLM = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}

_FUSED = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}

_LFM2 = {
    "attn_norm": "operator_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
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

_BLOCK = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"} | _PROJECTIONS

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

_GPT_OSS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
}

_WHOLE_NAMES = {
    "qwen35": {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"},
    "gpt-oss": {"attn_sinks.weight": "self_attn.sinks"},
}
"""Tensors of a block that are no weight or bias of a module, by architecture."""

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
}

ARCHITECTURES = tuple(_BLOCK_OF)
"""Values of general.architecture that can be read."""

_ARCHITECTURE_OF = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_5_text": "qwen35",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "granite": "granite",
    "granitemoehybrid": "granite",
    "lfm2": "lfm2",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "ministral3": "mistral3",
    "exaone4": "exaone4",
    "phi3": "phi3",
    "glm": "chatglm",
    "glm4": "glm4",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}

_INTERLEAVED = ("llama", "granite", "smollm3", "mistral3")
"""Architectures whose heads are rotated by neighbouring pairs."""

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_SKIPPED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?|rope_factors_(long|short)\.weight")
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+(?:\.\w+)?)\.(?P<kind>weight|bias)")


class StoredSizes(NamedTuple):
    """By what the rows of some tensors are arranged: features of an attention head, and the delta rule's heads."""

    head_dim: int
    delta: DeltaSizes | None = None


class Tiled(NamedTuple):
    """Value heads in the order of a file.

    Attributes:
        key_heads: heads that ggml repeats as a whole.
        group: value heads of each.
        width: rows, or columns, of a value head.
        before: rows in front of the value heads' that keep their places.
        axis: 0 for rows, 1 for columns.
    """

    key_heads: int
    group: int
    width: int
    before: int = 0
    axis: int = 0

    def arranged(self, values: Tensor, first: int, second: int) -> Tensor:
        """Heads, counted `first` by `second`, the other way round."""
        rows = values.movedim(self.axis, 0)
        heads = rows[self.before :].reshape(first, second, self.width, *rows.shape[1:])
        turned = heads.transpose(0, 1).reshape(rows[self.before :].shape)
        return torch.cat([rows[: self.before], turned]).movedim(0, self.axis)


@dataclass(frozen=True)
class Layout:
    """What to do with stored values to get Hugging Face's.

    Attributes:
        pairs_per_head: head_dim / 2 where the rows of each head are interleaved pairs, else None.
        offset: what was added to the values.
        tiled: where value heads stand in another order, else None.
        rate: the values are -e^A, and A is wanted.
        taps: whether these are the taps of a convolution, which have an axis more here.
    """

    pairs_per_head: int | None = None
    offset: float = 0.0
    tiled: Tiled | None = None
    rate: bool = False
    taps: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the stored values are the wanted ones, in the wanted order and shape."""
        return self == _PLAIN

    @property
    def turns_columns(self) -> bool:
        """Whether columns stand in another order, not rows."""
        return self.tiled is not None and self.tiled.axis == 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Hugging Face's shape of a tensor that is stored with this one."""
        return (stored[0], 1, *stored[1:]) if self.taps else stored

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The way back."""
        return (shape[0], *shape[2:]) if self.taps else shape

    def restored(self, values: Tensor) -> Tensor:
        """Values in the stored order, in the tensor's shape, turned into Hugging Face's; perhaps a view."""
        if self.pairs_per_head is not None:
            rows = values.view(-1, self.pairs_per_head, 2, *values.shape[1:])
            values = rows.transpose(1, 2).reshape(values.shape)
        if self.tiled is not None:
            values = self.tiled.arranged(values, self.tiled.group, self.tiled.key_heads)
        if self.rate:
            values = torch.log(-values)
        if self.taps:
            values = values.unsqueeze(1)
        return values - self.offset if self.offset else values

    def stored(self, values: Tensor) -> Tensor:
        """The way back: Hugging Face's values in the order and with the offset of a file; perhaps a view."""
        if self.taps:
            values = values.squeeze(1)
        if self.pairs_per_head is not None:
            rows = values.view(-1, 2, self.pairs_per_head, *values.shape[1:])
            values = rows.transpose(1, 2).reshape(values.shape)
        if self.tiled is not None:
            values = self.tiled.arranged(values, self.tiled.key_heads, self.tiled.group)
        if self.rate:
            values = -torch.exp(values)
        return values + self.offset if self.offset else values

    @property
    def of_factors(self) -> tuple[Layout, Layout]:
        """How lora_A, whose columns are the matrix's, and lora_B, which has its rows, lie in a file."""
        order = Layout(self.pairs_per_head, tiled=self.tiled)
        return (order, _PLAIN) if self.turns_columns else (_PLAIN, order)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why a matrix of this shape cannot be turned; None if it can."""
        if self.pairs_per_head is not None and shape[0] % (2 * self.pairs_per_head):
            return f"{shape[0]} rows are no whole number of heads of {2 * self.pairs_per_head}"
        if self.tiled is not None:
            key_heads, group, width, before, axis = self.tiled
            if shape[axis] != before + key_heads * group * width:
                return f"{shape[axis]} {'columns' if axis else 'rows'} are not {key_heads * group} heads of {width}"
        return None


_PLAIN = Layout()


def gguf_architecture(config: Mapping[str, Any]) -> str | None:
    """general.architecture of files of a model with this Hugging Face config; None if no file of it can be read."""
    return _ARCHITECTURE_OF.get(str(config.get("model_type")))


def head_dimension(config: Mapping[str, Any]) -> int:
    """Features of one attention head, which a Hugging Face config may leave to be divided.

    Raises:
        ArtifactError: the config has no whole number of them.
    """
    stated = config.get("head_dim")
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if stated is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        stated = hidden // heads
    if not isinstance(stated, int) or stated < 1:
        raise ArtifactError("the configuration does not say how large an attention head is", where="head_dim")
    return stated


def stored_sizes(config: Mapping[str, Any]) -> StoredSizes:
    """What the order of rows in files of this model depends on, from its Hugging Face config.

    Raises:
        ArtifactError: the config has no whole number of features of a head, or of the delta rule's heads.
    """
    delta = None
    if gguf_architecture(config) == "qwen35":
        delta = delta_sizes(ConfigFields(config, str(config["model_type"])))
    return StoredSizes(head_dimension(config), delta)


def gguf_name(architecture: str, name: str) -> str | None:
    """The name in a file of the tensor that Hugging Face calls `name`, None if the architecture has no such tensor.

    Args:
        architecture: one of `ARCHITECTURES`.
        name: such as `model.layers.0.self_attn.q_proj.weight`; an expert's matrix, or bias, is in a tensor of all.
    """
    if (expert := expert_of(name)) is not None:
        block, _, part = expert
        stack = next(stack for stack, ours in _EXPERTS.items() if ours == part)
        kind = name.rpartition(".")[2]
        there = architecture in (_WITH_EXPERTS if kind == "weight" else _WITH_EXPERT_BIASES)
        return f"blk.{block.rpartition('.')[2]}.{stack}.{kind}" if there else None
    module, _, kind = name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    block, names = "", _WHOLE_OF.get(architecture, _WHOLE)
    if match is not None:
        layer, module = match.groups()
        block, names = f"blk.{layer}.", _BLOCK_OF[architecture]
        singles = _WHOLE_NAMES.get(architecture, {})
        whole = next((stored for stored, ours in singles.items() if f"{module}.{kind}" == ours), None)
        if whole is not None:
            return f"{block}{whole}"
    stored = next((stored for stored, ours in names.items() if ours == module), None)
    found = f"{block}{stored}.{kind}"
    return found if stored is not None and huggingface_name(architecture, found) == name else None


_GRANITE4_PARTS = {
    "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
    "shared_mlp.output_linear": ("mlp.down_proj",),
}
"""A Granite 4 in the words of Granite 3, which its files have: gate and up one by one."""


def gguf_names(architecture: str, module: str) -> tuple[str, ...]:
    """Names in a file of the tensors that hold a module's weight: none where the architecture has no such module.

    Several hold equally many of its rows each, in this order.

    Args:
        architecture: one of `ARCHITECTURES`.
        module: such as `model.layers.0.self_attn.q_proj`.
    """
    block, _, part = module.rpartition(".shared_mlp.")
    parts = _GRANITE4_PARTS.get(f"shared_mlp.{part}") if block and architecture == "granite" else None
    names = [module] if parts is None else [f"{block}.{one}" for one in parts]
    found = [gguf_name(architecture, f"{name}.weight") for name in names]
    return tuple(name for name in found if name is not None)


def huggingface_names(architecture: str, name: str, shape: Sequence[int]) -> list[str]:
    """The Hugging Face names of what lies in a tensor, in its order: of every expert's matrix, or of the tensor alone.

    Args:
        architecture: one of `ARCHITECTURES`.
        name: as the file has it.
        shape: of the tensor.
    """
    match = _OF_EXPERTS.fullmatch(name)
    dimensions = {"weight": 3, "bias": 2 if architecture in _WITH_EXPERT_BIASES else None}
    if match is None or architecture not in _WITH_EXPERTS or len(shape) != dimensions[match["kind"]]:
        only = huggingface_name(architecture, name)
        return [] if only is None else [only]
    block, part = f"model.layers.{match['layer']}", _EXPERTS[match["stack"]]
    return [f"{block}.mlp.experts.{expert}.{part}.{match['kind']}" for expert in range(shape[0])]


def huggingface_name(architecture: str, name: str) -> str | None:
    """The Hugging Face name of a tensor that is one here too, None if the architecture has no such tensor.

    Args:
        architecture: one of `ARCHITECTURES`.
        name: as the file has it.
    """
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match is not None and (single := _WHOLE_NAMES.get(architecture, {}).get(match[2])) is not None:
        return f"model.layers.{match[1]}.{single}"
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    layer, module, kind = match["layer"], match["module"], match["kind"]
    if layer is None:
        whole = _WHOLE_OF.get(architecture, _WHOLE)
        return f"{whole[module]}.weight" if module in whole and kind == "weight" else None
    in_block = _BLOCK_OF[architecture].get(module)
    has_bias = in_block is not None and in_block.endswith(("_proj", ".router")) and architecture != "lfm2"
    if in_block is None or (kind == "bias" and not has_bias):
        return None
    return f"model.layers.{layer}.{in_block}.{kind}"


def is_skipped(name: str) -> bool:
    """Whether a tensor is no weight: tables of rotary frequencies, which the configuration states."""
    return _SKIPPED.fullmatch(name) is not None


def layout(architecture: str, name: str, sizes: StoredSizes) -> Layout:
    """How the tensor with this Hugging Face name is stored."""
    if architecture in _INTERLEAVED and re.search(r"\.self_attn\.[qk]_proj\.", name):
        return Layout(pairs_per_head=sizes.head_dim // 2)
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return Layout(offset=1.0)
    if architecture == "qwen35":
        if ".linear_attn." in name and sizes.delta is not None:
            return _delta_layout(name.rpartition(".linear_attn.")[2], sizes.delta)
        if name.endswith("norm.weight"):
            return Layout(offset=1.0)
    if name.endswith(".conv.conv.weight"):
        return Layout(taps=True)
    return _PLAIN


def _delta_layout(part: str, sizes: DeltaSizes) -> Layout:
    """Of a tensor of Qwen3.5's delta rule, by the end of its name."""
    key_heads, group = sizes.key_heads, sizes.value_heads // sizes.key_heads
    before = 2 * key_heads * sizes.key_width
    tiled = {
        "in_proj_qkv.weight": Tiled(key_heads, group, sizes.value_width, before),
        "conv1d.weight": Tiled(key_heads, group, sizes.value_width, before),
        "in_proj_z.weight": Tiled(key_heads, group, sizes.value_width),
        "in_proj_b.weight": Tiled(key_heads, group, 1),
        "in_proj_a.weight": Tiled(key_heads, group, 1),
        "A_log": Tiled(key_heads, group, 1),
        "dt_bias": Tiled(key_heads, group, 1),
        "out_proj.weight": Tiled(key_heads, group, sizes.value_width, axis=1),
    }
    in_order = min(key_heads, group) == 1
    return Layout(tiled=None if in_order else tiled.get(part), rate=part == "A_log", taps=part == "conv1d.weight")
