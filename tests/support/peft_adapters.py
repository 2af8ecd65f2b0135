"""Adapters written by PEFT on tiny models, and their updates as PEFT forms them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import nn

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


def save_with_peft(model: nn.Module, directory: Path, seed: int, **options: Any) -> Path:
    """An adapter with random factors on a copy of `model`; options as of `peft.LoraConfig`."""
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]} | options))
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        adapted.save_pretrained(str(directory))
    return directory


def updates_by_peft(model: nn.Module, directory: Path) -> dict[str, FloatArray]:
    """ΔW of every adapted module, in the shape of its weight, computed by PEFT in float64 from the files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(directory)).double()
    found = {}
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach().numpy()
    return found
