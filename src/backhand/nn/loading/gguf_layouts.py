"""How a GGUF file's tensors are laid out, against Hugging Face's; their names are in `gguf_tensors`.

Files of architectures `llama`, `granite`, `smollm3` and `mistral3` have the rows of attn_q and attn_k in another order:
ggml rotates neighbouring features 2i and 2i + 1 of a head where Hugging Face rotates i and i + head_dim/2, so that row
(head, half, i) there is row (head, i, half) here; biases likewise. Other architectures keep the order. Norm weights of
Gemma 2 and 3 are stored with the 1 already added, and so are Qwen3.5's but for that of its delta rule's output.

Qwen3.5's delta rule has several value heads for each key head, which are neighbours in Hugging Face's order. ggml
repeats the key heads as a whole, so that in a file value head (key head, i) stands at (i, key head): in the rows of
what makes values, gates, rates and decays, in the channels of the convolution, and in the columns of the output. The
decay's rate is stored as -e^A. The taps of a convolution are (channels, taps), (channels, 1, taps) here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.decoder.config_fields import ConfigFields, delta_sizes
from backhand.nn.decoder.family import DeltaSizes
from backhand.nn.loading.gguf_tensors import gguf_architecture

_INTERLEAVED = ("llama", "granite", "smollm3", "mistral3")
"""Architectures whose heads are rotated by neighbouring pairs."""


class StoredSizes(NamedTuple):
    """By what the rows of some tensors are reordered: features of an attention head, and the delta rule's heads."""

    head_dim: int
    delta: DeltaSizes | None = None


class TiledHeads(NamedTuple):
    """Value heads in the order of a file."""

    key_heads: int  # heads that ggml repeats as a whole
    group: int  # value heads of each
    width: int  # rows, or columns, of a value head
    before: int = 0  # rows in front of the value heads' that keep their places
    axis: int = 0  # 0 for rows, 1 for columns

    def reordered(self, values: Tensor, first: int, second: int) -> Tensor:
        """Heads, counted `first` by `second`, the other way round."""
        rows = values.movedim(self.axis, 0)
        heads = rows[self.before :].reshape(first, second, self.width, *rows.shape[1:])
        reordered = heads.transpose(0, 1).reshape(rows[self.before :].shape)
        return torch.cat([rows[: self.before], reordered]).movedim(0, self.axis)


@dataclass(frozen=True)
class Layout:
    """What to do with stored values to get Hugging Face's."""

    pairs_per_head: int | None = None  # head_dim / 2 where the rows of each head are interleaved pairs, else None
    offset: float = 0.0  # what was added to the values
    tiled: TiledHeads | None = None  # where value heads stand in another order, else None
    rate: bool = False  # the values are -e^A, and A is wanted
    taps: bool = False  # whether these are the taps of a convolution, which have an axis more here

    @property
    def is_plain(self) -> bool:
        """Whether the stored values are the wanted ones, in the wanted order and shape."""
        return self == _PLAIN

    @property
    def reorders_columns(self) -> bool:
        """Whether columns stand in another order, not rows."""
        return self.tiled is not None and self.tiled.axis == 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Hugging Face's shape of a tensor that is stored with this one."""
        return (stored[0], 1, *stored[1:]) if self.taps else stored

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The way back."""
        return (shape[0], *shape[2:]) if self.taps else shape

    def to_huggingface(self, values: Tensor) -> Tensor:
        """Values in the stored order, in the tensor's shape, in Hugging Face's; perhaps a view."""
        if self.pairs_per_head is not None:
            rows = values.view(-1, self.pairs_per_head, 2, *values.shape[1:])
            values = rows.transpose(1, 2).reshape(values.shape)
        if self.tiled is not None:
            values = self.tiled.reordered(values, self.tiled.group, self.tiled.key_heads)
        if self.rate:
            values = torch.log(-values)
        if self.taps:
            values = values.unsqueeze(1)
        return values - self.offset if self.offset else values

    def to_gguf(self, values: Tensor) -> Tensor:
        """The way back: Hugging Face's values in the order and with the offset of a file; perhaps a view."""
        if self.taps:
            values = values.squeeze(1)
        if self.pairs_per_head is not None:
            rows = values.view(-1, 2, self.pairs_per_head, *values.shape[1:])
            values = rows.transpose(1, 2).reshape(values.shape)
        if self.tiled is not None:
            values = self.tiled.reordered(values, self.tiled.key_heads, self.tiled.group)
        if self.rate:
            values = -torch.exp(values)
        return values + self.offset if self.offset else values

    @property
    def factor_layouts(self) -> tuple[Layout, Layout]:
        """How lora_A, whose columns are the matrix's, and lora_B, which has its rows, lie in a file."""
        order = Layout(self.pairs_per_head, tiled=self.tiled)
        return (order, _PLAIN) if self.reorders_columns else (_PLAIN, order)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why a matrix of this shape cannot be reordered; None if it can."""
        if self.pairs_per_head is not None and shape[0] % (2 * self.pairs_per_head):
            return f"{shape[0]} rows are no whole number of heads of {2 * self.pairs_per_head}"
        if self.tiled is not None:
            key_heads, group, width, before, axis = self.tiled
            if shape[axis] != before + key_heads * group * width:
                return f"{shape[axis]} {'columns' if axis else 'rows'} are not {key_heads * group} heads of {width}"
        return None


_PLAIN = Layout()


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
        "in_proj_qkv.weight": TiledHeads(key_heads, group, sizes.value_width, before),
        "conv1d.weight": TiledHeads(key_heads, group, sizes.value_width, before),
        "in_proj_z.weight": TiledHeads(key_heads, group, sizes.value_width),
        "in_proj_b.weight": TiledHeads(key_heads, group, 1),
        "in_proj_a.weight": TiledHeads(key_heads, group, 1),
        "A_log": TiledHeads(key_heads, group, 1),
        "dt_bias": TiledHeads(key_heads, group, 1),
        "out_proj.weight": TiledHeads(key_heads, group, sizes.value_width, axis=1),
    }
    in_order = min(key_heads, group) == 1
    return Layout(tiled=None if in_order else tiled.get(part), rate=part == "A_log", taps=part == "conv1d.weight")
