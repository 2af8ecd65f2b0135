"""Tiny adapters in PEFT's own files, for every way of saying a scaling, on tiny models."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

from tests.support.tiny_models import attach_lora

SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {"alpha": 10},
    "odd-alpha": {"alpha": 8.5},
    "rslora": {"alpha": 6, "use_rslora": True},
    "alpha-pattern": {"alpha": 10, "alpha_pattern": {"o_proj": 3.0, "layers.1.mlp.down_proj": 17}},
    "rank-pattern": {"alpha": 10, "rank_pattern": {"v_proj": 3, "layers.0.mlp.up_proj": 7}},
    "every-pattern": {
        "alpha": 6.5,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"k_proj": 2.0},
    },
}
"""By name: what `attach_lora` takes."""


def adapted(model: Any, **lora: Any) -> Any:
    """PEFT around a copy of the model, which stays as it is, with a random adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT: a tied head is adapted, the base has no name on the hub
        return attach_lora(copy.deepcopy(model), **lora)


def save_tiny_adapter(model: Any, directory: Path, **lora: Any) -> Path:
    """PEFT's own files of what `adapted` makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adapted(model, **lora).save_pretrained(str(directory))
    return directory
