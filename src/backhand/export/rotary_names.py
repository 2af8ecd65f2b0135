"""A model's rotary angles also under the names from before transformers 5, for programs that know no others.

MLX-LM 0.32, for one, reads `rope_theta` and `rope_scaling` of Llama and Qwen2 models and takes its own default where
they are missing: with `rope_parameters` alone a model answers worse there, without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Hugging Face config that says its `rope_parameters` twice; what it says already under an older name stays."""
    said = dict(config)
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return said
    full = parameters.get("full_attention", parameters)  # Gemma 3 has two sets of angles
    older = {"rope_theta": full.get("rope_theta")}
    if full.get("rope_type", "default") != "default":
        older["rope_scaling"] = full
    if "sliding_attention" in parameters:
        older["rope_local_base_freq"] = parameters["sliding_attention"].get("rope_theta")
    for name, value in older.items():
        if value is not None and said.get(name) is None:
            said[name] = value
    return said
