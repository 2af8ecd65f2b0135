"""GGUF tensor names, and how each tensor is laid out there, against Hugging Face's.

Files of architecture `llama` have the rows of attn_q and attn_k in another order: ggml rotates neighbouring features 2i
and 2i + 1 of a head where Hugging Face rotates i and i + head_dim/2, so that row (head, half, i) there is row
(head, i, half) here; biases likewise. Other architectures keep the order. Gemma's norm weights are stored with the 1
already added.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from backhand.errors import ArtifactError

_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_BLOCK_OF: dict[str, dict[str, str]] = {
    "llama": _BLOCK,
    "qwen2": _BLOCK,
    "qwen3": _BLOCK | _QK_NORM,
    "gemma3": _BLOCK | _QK_NORM | _SANDWICH,
}

ARCHITECTURES = tuple(_BLOCK_OF)
"""Values of general.architecture that can be read."""

_ARCHITECTURE_OF = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}

ROPE_FACTORS = "rope_freqs.weight"

_SKIPPED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?|rope_factors_(long|short)\.weight")
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class Layout:
    """What to do with stored values to get Hugging Face's.

    Attributes:
        pairs_per_head: head_dim / 2 where the rows of each head are interleaved pairs, else None.
        offset: what was added to the values.
    """

    pairs_per_head: int | None = None
    offset: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether the stored values are the wanted ones, in the wanted order."""
        return self.pairs_per_head is None and not self.offset

    def restored(self, values: Tensor) -> Tensor:
        """Values in the stored order, in the tensor's shape, turned into Hugging Face's; perhaps a view."""
        if self.pairs_per_head is not None:
            rows = values.view(-1, self.pairs_per_head, 2, *values.shape[1:])
            values = rows.transpose(1, 2).reshape(values.shape)
        return values - self.offset if self.offset else values

    def stored(self, values: Tensor) -> Tensor:
        """The way back: Hugging Face's values in the order and with the offset of a file; perhaps a view."""
        if self.pairs_per_head is not None:
            rows = values.view(-1, 2, self.pairs_per_head, *values.shape[1:])
            values = rows.transpose(1, 2).reshape(values.shape)
        return values + self.offset if self.offset else values


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


def gguf_name(architecture: str, name: str) -> str | None:
    """The name in a file of the tensor that Hugging Face calls `name`, None if the architecture has no such tensor.

    Args:
        architecture: one of `ARCHITECTURES`.
        name: such as `model.layers.0.self_attn.q_proj.weight`.
    """
    module, _, kind = name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    block, names = "", _WHOLE
    if match is not None:
        layer, module = match.groups()
        block, names = f"blk.{layer}.", _BLOCK_OF[architecture]
    stored = next((stored for stored, ours in names.items() if ours == module), None)
    found = f"{block}{stored}.{kind}"
    return found if stored is not None and huggingface_name(architecture, found) == name else None


def huggingface_name(architecture: str, name: str) -> str | None:
    """The Hugging Face name of a tensor, None if the architecture has no such tensor.

    Args:
        architecture: one of `ARCHITECTURES`.
        name: as the file has it.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    layer, module, kind = match["layer"], match["module"], match["kind"]
    if layer is None:
        return f"{_WHOLE[module]}.weight" if module in _WHOLE and kind == "weight" else None
    in_block = _BLOCK_OF[architecture].get(module)
    if in_block is None or (kind == "bias" and not in_block.endswith("_proj")):
        return None
    return f"model.layers.{layer}.{in_block}.{kind}"


def is_skipped(name: str) -> bool:
    """Whether a tensor is no weight: tables of rotary frequencies, which the configuration states."""
    return _SKIPPED.fullmatch(name) is not None


def layout(architecture: str, name: str, head_dim: int) -> Layout:
    """How the tensor with this Hugging Face name is stored."""
    if architecture == "llama" and re.search(r"\.self_attn\.[qk]_proj\.", name):
        return Layout(pairs_per_head=head_dim // 2)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return Layout(offset=1.0)
    return Layout()
