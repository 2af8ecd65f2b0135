"""What transformers itself takes from a config: the fields of its classes, and what it reads beside them.

A config.json may hold anything. transformers sets what its configuration class does not declare as an attribute of that
name, which nothing reads, so that it cannot change what is computed. Exceptions are names that transformers' common
code looks for in every config (`READ_BESIDE_FIELDS`), aliases of fields (`attribute_map`) and attributes of the class.
Tests watch every attribute that transformers reads while it makes and runs a model of each family, so that a new
version of it shows there what is not classed yet.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class ConfigClass:
    """transformers' configuration class of one model type.

    Attributes:
        fields: every declared field with its default; None where it has none that JSON can say.
        others: further names that mean something to transformers.
    """

    fields: Mapping[str, object]
    others: frozenset[str]

    def reads(self, key: str) -> bool:
        """Whether a config's field of this name can matter to transformers."""
        return key in self.fields or key in self.others


READ_BESIDE_FIELDS = frozenset({
    # Set on a config by name, and read by the code that all models share.
    "attention_chunk_size", "compression_config", "default_rope_type", "default_theta", "gradient_checkpointing",
    "head_dim", "is_causal", "kv_sharing_modes", "layer_types", "mtp_layer_types", "original_max_position_embeddings",
    "partial_rotary_factor", "per_layer_config", "quantization_config", "rope_local_base_freq", "rope_scaling",
    "rope_theta", "sliding_window", "sliding_window_pattern", "vision_aspect_ratio", "vision_feature_layer",
    "vision_feature_select_strategy", "number_of_conv_states", "output_router_logits",
    # Where a model inside another would be.
    "decoder", "generator", "text_config",
    # Implementations.
    "_attn_implementation", "_experts_implementation", "_heterogeneity_spec", "_rope_type_labels",
    "attn_implementation", "experts_implementation",
})  # fmt: skip


@cache
def config_class(model_type: str) -> ConfigClass | None:
    """The class of the installed transformers, None where it has none of this type; imports transformers."""
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        found: Any = CONFIG_MAPPING[model_type]
    except KeyError:
        return None
    parameters = {**inspect.signature(PreTrainedConfig).parameters, **inspect.signature(found).parameters}
    # Neither `self` nor a catch-all has a default.
    fields = {name: _plain(entry.default) for name, entry in parameters.items() if entry.default is not entry.empty}
    attributes = {name for name in dir(found) if not name.startswith("__")}
    return ConfigClass(fields, frozenset({*READ_BESIDE_FIELDS, *found.attribute_map, *attributes}))


def _plain(default: object) -> object:
    return default if isinstance(default, bool | int | float | str) else None
