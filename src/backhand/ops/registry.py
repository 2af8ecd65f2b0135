"""All ops by name. `backhand verify` proves each op that has a line here and a file of cases in `verify/cases`."""

from __future__ import annotations

import importlib
from types import ModuleType

# Op name → the file of `backhand.ops` that holds `<name>_forward`, `<name>_backward` and `<name>_reference`.
OPS: dict[str, str] = {
    "linear": "linear",
    "frozen_linear": "frozen_matrix",
    "lora_linear": "lora_linear",
    "lora_group": "lora_group",
    "lora_embedding": "lora_embedding",
    "lora_conv": "lora_conv",
    "lora_bias": "lora_bias",
    "dora": "dora",
    "dora_linear": "dora_linear",
    "token_embedding": "token_rows",
    "token_linear": "token_rows",
    "embedding": "embedding",
    "rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "rotary": "rotary",
    "attention": "attention",
    "attention_blocks": "attention_blocks",
    "causal_conv": "causal_conv",
    "gated_conv": "gated_conv",
    "gated_delta_rule": "gated_delta_rule",
    "decay_gate": "decay_gate",
    "ssd": "ssd",
    "time_step": "time_step",
    "glu": "glu",
    "adapted_glu": "adapted_glu",
    "clamped_glu": "clamped_glu",
    "router": "router",
    "dispatch": "expert_rows",
    "weigh": "expert_rows",
    "combine": "expert_rows",
    "expert_linear": "expert_linear",
    "expert_bias": "expert_bias",
    "dropout": "dropout",
    "relu": "elementwise",
    "tanh": "elementwise",
    "sigmoid": "elementwise",
    "gelu": "elementwise",
    "gelu_tanh": "elementwise",
    "silu": "elementwise",
    "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_divergence": "linear_divergence",
    "class_head": "class_head",
    "mse": "mse",
    "preference": "preference",
    "grpo": "grpo",
    "decide": "decide",
    "binary_cross_entropy": "binary_cross_entropy",
    "normalize": "normalize",
    "pooling": "pooling",
    "info_nce": "info_nce",
    "cosent": "cosent",
    "triplet": "triplet",
}


def op_module(name: str) -> ModuleType:
    """Return the module of an op.

    Raises:
        KeyError: for a name that is not registered.
    """
    return importlib.import_module(f"backhand.ops.{OPS[name]}")
