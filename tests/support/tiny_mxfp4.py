"""A tiny gpt-oss as OpenAI's own checkpoints have it: a directory whose experts are MXFP4 blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.support.tiny_models import save_tiny, tiny_model

IN_BLOCKS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}
"""Sizes that divide into blocks of 32."""

QUANTIZATION = {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"}
"""What config.json says of it."""


def save_packed(directory: Path, **sizes: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Write the directory, of random blocks.

    Args:
        directory: made here.
        sizes: of the configuration, in addition to those that divide into blocks.

    Returns:
        (blocks, scales) by parameter of experts.
    """
    save_tiny(tiny_model("gpt_oss", **IN_BLOCKS, **sizes), directory)
    generator = torch.Generator().manual_seed(5)
    with safe_open(directory / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    packed = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = experts, outputs, inputs // 32
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 125, shape, dtype=torch.uint8, generator=generator)
        packed[name] = blocks, scales
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION
    (directory / "config.json").write_text(json.dumps(config))
    return packed
