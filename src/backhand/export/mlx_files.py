"""An adapter as MLX-LM loads it: adapters.safetensors with transposed factors, and its own adapter_config.json.

    y = x Wᵀ + scale · (x lora_a) lora_b,   lora_a (in, rank), lora_b (rank, out)        [mlx_lm/tuner/lora.py]

MLX-LM makes one rank and one scale for all, adapts every module in `keys` in each of the last `num_layers` layers, and
then loads what fits, silently. So the file holds every module that will be adapted there: smaller ranks are filled up
with zeros, other scalings folded into lora_b, and modules that the adapter leaves alone are zero.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backhand.adapters.module_factors import Factors, ModuleFactors
from backhand.adapters.safetensors_file import read_tensors, tensor_bytes
from backhand.adapters.strict_json import read_json_object
from backhand.errors import ArtifactError
from backhand.export.refusal import refuse

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapters.safetensors"
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def mlx_files(
    factors: Factors, module_shapes: Mapping[str, tuple[int, int]], *, tied_head: bool, base_model: str | None
) -> dict[str, bytes]:
    """The two files, by name.

    Args:
        factors: of linear modules.
        module_shapes: (out, in) of every linear module of the base, by dotted path.
        tied_head: whether the base's head is its embedding, so that MLX has no module for it.
        base_model: what the configuration names as the model.

    Raises:
        ArtifactError: modules that MLX cannot adapt, by name.
    """
    reasons = {}
    for module in factors:
        if module == "lm_head" and tied_head:
            reasons[module] = "the head is the embedding's matrix, and MLX has no module of its own for it"
    refuse("mlx", reasons)
    scale = Counter(one.scaling for one in factors.values()).most_common(1)[0][0]
    rank = max(one.rank for one in factors.values())
    found = {name: _IN_LAYER.fullmatch(name) for name in factors}
    keys = sorted({match[2] if match else name for name, match in found.items()})
    layers = 1 + max(int(match[1]) for name in module_shapes if (match := _IN_LAYER.fullmatch(name)))
    tensors: dict[str, Tensor] = {}
    for name, (out_features, in_features) in module_shapes.items():
        match = _IN_LAYER.fullmatch(name)
        if (match[2] if match else name) not in keys:
            continue
        one = factors.get(name)
        if one is None:
            one = ModuleFactors(torch.zeros(rank, in_features), torch.zeros(out_features, rank), scale)
        one = one.scaled_to(scale).padded_to(rank)
        tensors[f"{name}.lora_a"] = one.lora_A.T
        tensors[f"{name}.lora_b"] = one.lora_B.T
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
    if base_model:
        config["model"] = base_model
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return {TENSOR_FILE: tensor_bytes(tensors), CONFIG_FILE: text.encode("utf-8")}


def read_mlx_files(directory: Path) -> dict[str, ModuleFactors]:
    """Every module that MLX-LM would adapt, with what it would multiply.

    Raises:
        ArtifactError: not what `mlx_files` writes.
    """
    parameters = read_json_object(directory / CONFIG_FILE)["lora_parameters"]
    tensors, problems = read_tensors(directory / TENSOR_FILE)
    if problems:
        name, what = next(iter(problems.items()))
        raise ArtifactError(f"{name}: {what}", where=str(directory / TENSOR_FILE))
    modules = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return {
        name: ModuleFactors(tensors[f"{name}.lora_a"].T, tensors[f"{name}.lora_b"].T, parameters["scale"])
        for name in modules
    }
