"""Convert between the tensor layouts of GGUF files and Hugging Face. The names are in `gguf_tensors`.

- **Rotary pairs.** ggml rotates the neighbouring features 2i and 2i + 1 of a head, and Hugging Face rotates i and
  i + head_dim/2. Files of architectures `llama`, `granite`, `smollm3` and `mistral3` therefore reorder the rows and
  biases of attn_q and attn_k. So do those of `granitehybrid` and `nemotron_h`, also if nothing is rotated. Row (head,
  half, i) in Hugging Face is row (head, i, half) in GGUF. In Bamba this holds for the rotated first half of each head.
  If llama.cpp's converter wrote the file, it reordered whole heads, and llama.cpp rotates other pairs than
  transformers. Such a file is read as llama.cpp computes it.
- **Norm weights.** Gemma 2 and 3 are stored with the 1 already added. So is Qwen3.5, except for the norm of its delta
  rule's output.
- **Delta rule.** Qwen3.5 has several value heads per key head, adjacent in Hugging Face's order. ggml repeats the list
  of key heads instead: Hugging Face's value head (key head, i) is (i, key head) in GGUF. This holds for the rows of
  the projections to values, gates, rates and decays, for the channels of the convolution, and for the columns of the
  output projection. The decay's parameter A is stored as -e^A.
- **Mamba-2.** A is stored as -e^A. A and D are columns, (heads, 1), and the weight of the norm has a row per group of
  heads.
- **Convolutions.** The taps are (channels, taps) in GGUF and (channels, 1, taps) in Hugging Face.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.families.config_fields import ConfigFields, delta_sizes
from backhand.nn.families.family import DeltaSizes
from backhand.nn.families.rotary import bamba_rotary
from backhand.nn.loading.gguf_tensors import ARCHITECTURES, gguf_architecture, has_shared_mlp

_SSM_PART = re.compile(r"\.(?:mamba|mixer)\.(A_log|D|norm\.weight|conv1d\.weight)")
_GROUPS_OF_SSM = {"falcon-h1": "mamba_n_groups", "granitehybrid": "mamba_n_groups", "nemotron_h": "n_groups"}
"""Field of the config with the number of groups of Mamba-2's heads, by architecture."""


class StoredSizes(NamedTuple):
    """Sizes that determine the layout of tensors."""

    head_dim: int  # features of an attention head
    delta: DeltaSizes | None = None  # heads of the delta rule
    ssm_groups: int | None = None  # groups of Mamba-2's heads
    unrotated: int = 0  # features of an attention head after those that are rotated
    shared_mlp: bool = False  # the MLP is next to experts, and has other names in files


class TiledHeads(NamedTuple):
    """The order of value heads in a file."""

    key_heads: int  # number of key heads, whose list ggml repeats
    group: int  # value heads per key head
    width: int  # rows or columns per value head
    before: int = 0  # number of rows before the value heads, whose order is the same
    axis: int = 0  # 0 for rows, 1 for columns

    def reordered(self, values: Tensor, first: int, second: int) -> Tensor:
        """Transpose the grid of value heads from (first, second) to (second, first)."""
        rows = values.movedim(self.axis, 0)
        heads = rows[self.before :].reshape(first, second, self.width, *rows.shape[1:])
        reordered = heads.transpose(0, 1).reshape(rows[self.before :].shape)
        return torch.cat([rows[: self.before], reordered]).movedim(0, self.axis)


@dataclass(frozen=True)
class Layout:
    """Difference between the stored layout of a tensor and Hugging Face's."""

    pairs_per_head: int | None = None  # rotated features / 2 if these rows of each head are interleaved pairs
    unpaired: int = 0  # rows of each head after the pairs
    offset: float = 0.0  # constant that was added to the stored values
    tiled: TiledHeads | None = None  # the order of value heads, if it differs
    negated_exp: bool = False  # the stored values are -e^A for Hugging Face's A
    taps: bool = False  # the tensor has a convolution's taps, which have one more axis in Hugging Face
    rows: int | None = None  # a vector is stored as this number of rows; 0 for one row per element

    @property
    def is_plain(self) -> bool:
        """True if the stored layout is Hugging Face's."""
        return self == _PLAIN

    @property
    def reorders_columns(self) -> bool:
        """True if columns are reordered instead of rows."""
        return self.tiled is not None and self.tiled.axis == 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return Hugging Face's shape for a stored shape."""
        if self.rows is not None:
            return (math.prod(stored),)
        return (stored[0], 1, *stored[1:]) if self.taps else stored

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the stored shape for Hugging Face's shape."""
        if self.rows is not None:
            rows = self.rows or shape[0]
            return rows, shape[0] // rows
        return (shape[0], *shape[2:]) if self.taps else shape

    def to_huggingface(self, values: Tensor) -> Tensor:
        """Convert stored values, in the stored shape, to Hugging Face's layout. The result may be a view."""
        if self.pairs_per_head is not None:
            values = self._with_pairs_as(values, self.pairs_per_head, 2)
        if self.tiled is not None:
            values = self.tiled.reordered(values, self.tiled.group, self.tiled.key_heads)
        if self.negated_exp:
            values = torch.log(-values)
        if self.rows is not None:
            values = values.flatten()
        if self.taps:
            values = values.unsqueeze(1)
        return values - self.offset if self.offset else values

    def to_gguf(self, values: Tensor) -> Tensor:
        """Convert values from Hugging Face's layout to the stored layout. The result may be a view."""
        if self.taps:
            values = values.squeeze(1)
        if self.pairs_per_head is not None:
            values = self._with_pairs_as(values, 2, self.pairs_per_head)
        if self.tiled is not None:
            values = self.tiled.reordered(values, self.tiled.key_heads, self.tiled.group)
        if self.negated_exp:
            values = -torch.exp(values)
        if self.rows is not None:
            values = values.view(self.stored_shape(tuple(values.shape)))
        return values + self.offset if self.offset else values

    def _with_pairs_as(self, values: Tensor, first: int, second: int) -> Tensor:
        """Transpose the grid of each head's rotated rows from (first, second) to (second, first)."""
        heads = values.view(-1, first * second + self.unpaired, *values.shape[1:])
        rotated, others = heads.split([first * second, self.unpaired], dim=1)
        pairs = rotated.unflatten(1, (first, second)).transpose(1, 2).flatten(1, 2)
        return torch.cat([pairs, others], dim=1).view(values.shape)

    @property
    def factor_layouts(self) -> tuple[Layout, Layout]:
        """The layouts of lora_A, which has the matrix's columns, and of lora_B, which has its rows."""
        order = Layout(self.pairs_per_head, self.unpaired, tiled=self.tiled)
        return (order, _PLAIN) if self.reorders_columns else (_PLAIN, order)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Return the reason why a matrix of this shape cannot be reordered, or None if it can."""
        if self.pairs_per_head is not None and shape[0] % (head := 2 * self.pairs_per_head + self.unpaired):
            return f"{shape[0]} rows are not a whole number of heads of {head}"
        if self.rows is not None and (len(shape) != 2 or self.rows not in (0, shape[0])):
            return f"shape {shape} does not have {self.rows} rows"
        if self.tiled is not None:
            key_heads, group, width, before, axis = self.tiled
            if shape[axis] != before + key_heads * group * width:
                return f"{shape[axis]} {'columns' if axis else 'rows'} are not {key_heads * group} heads of {width}"
        return None


_PLAIN = Layout()


def head_dimension(config: Mapping[str, Any]) -> int:
    """Return the features of one attention head: `head_dim`, or hidden_size / num_attention_heads if it is absent.

    Raises:
        ArtifactError: if the config gives no positive integer.
    """
    stated = config.get("head_dim")
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if stated is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        stated = hidden // heads
    if not isinstance(stated, int) or stated < 1:
        raise ArtifactError("the configuration does not state the size of an attention head", where="head_dim")
    return stated


def stored_sizes(config: Mapping[str, Any]) -> StoredSizes:
    """Return the sizes that determine the order of rows in GGUF files of a model, from its Hugging Face config.

    Raises:
        ArtifactError: if the config gives no positive integer for a head's features or for the delta rule's heads.
    """
    delta = None
    if gguf_architecture(config) == "qwen35":
        delta = delta_sizes(ConfigFields(config, str(config["model_type"])))
    groups, head_dim, unrotated = None, head_dimension(config), 0
    fields = ConfigFields(config, str(config.get("model_type")))
    if (field := _GROUPS_OF_SSM.get(str(gguf_architecture(config)))) is not None:
        groups = fields.integer(field)
    if config.get("model_type") == "bamba":
        (rotary,) = bamba_rotary(fields, head_dim, fields.integer("max_position_embeddings"))
        unrotated = head_dim - (rotary.features or head_dim)
    return StoredSizes(head_dim, delta, groups, unrotated, has_shared_mlp(config))


def layout(architecture: str, name: str, sizes: StoredSizes) -> Layout:
    """Return the stored layout of the tensor with this Hugging Face name."""
    row = ARCHITECTURES[architecture]
    if row.interleaved and re.search(r"\.(?:self_attn|mixer)\.[qk]_proj\.", name):
        return Layout((sizes.head_dim - sizes.unrotated) // 2, sizes.unrotated)
    if sizes.delta is not None and ".linear_attn." in name:
        return _delta_layout(name.rpartition(".linear_attn.")[2], sizes.delta)
    if sizes.ssm_groups is not None and (part := _SSM_PART.search(name)) is not None:
        rows = {"norm.weight": sizes.ssm_groups, "conv1d.weight": None}.get(part[1], 0)
        return Layout(negated_exp=part[1] == "A_log", taps=rows is None, rows=rows)
    if row.norm_offset and name.endswith("norm.weight"):
        return Layout(offset=row.norm_offset)
    if name.endswith(".conv.conv.weight"):
        return Layout(taps=True)
    return _PLAIN


def _delta_layout(part: str, sizes: DeltaSizes) -> Layout:
    """Return the stored layout of a tensor of Qwen3.5's delta rule, given the end of its name."""
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
    same_order = min(key_heads, group) == 1
    return Layout(
        tiled=None if same_order else tiled.get(part), negated_exp=part == "A_log", taps=part == "conv1d.weight"
    )
