"""Falcon-H1 with its multipliers in the weights, as llama.cpp's converter writes it: c (x Wᵀ) = x (c W)ᵀ.

The rows of a weight are multiplied, and so are those of lora_B, DoRA's magnitudes and tensors trained in full. The
model is then one whose multipliers are all 1. A tied head keeps the multipliers of embedding and logits, which are two
numbers for one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from backhand.nn.families.common_fields import nearest_float32
from backhand.nn.families.config_fields import ConfigFields
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.families.mixed_families import multipliers_of
from backhand.nn.loading.source import DerivedSource, ModelSource

_SCALARS = (
    "attention_in_multiplier", "attention_out_multiplier", "key_multiplier", "ssm_in_multiplier", "ssm_out_multiplier",
)  # fmt: skip
_LISTS = {"mlp_multipliers": 2, "ssm_multipliers": 5}
_ENDS = ("embedding_multiplier", "lm_head_multiplier")


def has_multipliers(config: Mapping[str, Any]) -> bool:
    """Return True if a Hugging Face config is that of a Falcon-H1 with a multiplier other than 1."""
    if config.get("model_type") != "falcon_h1":
        return False
    fields = ConfigFields(config, "falcon_h1")
    numbers = [fields.number(key) for key in (*_SCALARS, *_ENDS)]
    numbers += [number for key, count in _LISTS.items() for number in multipliers_of(fields, key, count)]
    return any(number != 1.0 for number in numbers)


class UnitMultipliers(DerivedSource):
    """A Falcon-H1 from a Hugging Face directory, with its multipliers in the weights."""

    def __init__(self, source: ModelSource) -> None:
        super().__init__(source)
        tied = decoder_config(source.config).tied_head
        scalars = _SCALARS if tied else (*_SCALARS, *_ENDS)
        self.config = source.config | dict.fromkeys(scalars, 1.0)
        self.config |= {key: [1.0] * count for key, count in _LISTS.items()}
        self._by_module = _row_multipliers(source.config, tied=tied)

    def row_multipliers(self, module: str) -> Tensor | None:
        """Return the multiplier of each output of a module, (out,) or (1,) float64, or None if they are 1."""
        return next((rows for end, rows in self._by_module.items() if module.endswith(end)), None)

    def load(self, name: str) -> Tensor:
        """Return the tensor with its rows multiplied, in the stored dtype."""
        tensor, rows = self.source.load(name), self.row_multipliers(name.removesuffix(".weight"))
        return tensor if rows is None else scaled_rows(tensor, rows)


def scaled_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return a tensor of its own dtype with its first axis multiplied by rows, (out,) or (1,)."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return (wide * rows.to(wide.dtype).view(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)


def _row_multipliers(config: Mapping[str, Any], *, tied: bool) -> dict[str, Tensor]:
    """Return the multipliers of the outputs of each module, by the end of its name."""
    fields = ConfigFields(config, "falcon_h1")
    attention_in, attention_out, key, ssm_in, ssm_out = map(fields.number, _SCALARS)
    gate, down = multipliers_of(fields, "mlp_multipliers", 2)
    sizes = decoder_config(config).ssm
    assert sizes is not None
    ssm = [ssm_in * nearest_float32(one) for one in multipliers_of(fields, "ssm_multipliers", 5)]
    by_module = {
        "self_attn.q_proj": [attention_in],
        "self_attn.k_proj": [attention_in * key],
        "self_attn.v_proj": [attention_in],
        "self_attn.o_proj": [attention_out],
        "feed_forward.gate_proj": [gate],
        "feed_forward.down_proj": [down],
        "mamba.in_proj": [one for one, count in zip(ssm, sizes.parts, strict=True) for _ in range(count)],
        "mamba.out_proj": [ssm_out],
    }
    if not tied:
        by_module |= {
            "model.embed_tokens": [nearest_float32(fields.number("embedding_multiplier"))],
            "lm_head": [fields.number("lm_head_multiplier")],
        }
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in by_module.items() if set(rows) != {1.0}}
