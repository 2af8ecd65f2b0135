"""The text model inside an image model's checkpoint: its configuration, its tensors, and what its modules are called.

A checkpoint of an image model has the text model's configuration under `text_config` and its weights under a prefix.
Here the text model alone is opened: the other parts are neither read nor counted. Three ways to name its modules meet:

    model.layers.0.…                   the text model alone, and everything inside this package
    language_model.model.layers.0.…    checkpoints on the hub, and what transformers writes
    model.language_model.layers.0.…    checkpoints too, and the modules of transformers' class, so what PEFT has

The head is `lm_head` in the first and the last, `language_model.lm_head` in the second. What the wrapper's own fields
say wins where both have them: whether the head is the embedding, and the ends of a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WRAPPERS: tuple[str, ...] = (
    "aya_vision", "gemma3", "gemma4", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "lfm2_vl",
    "mistral3", "qwen3_5", "qwen3_5_moe", "smolvlm",
)  # fmt: skip
"""Values of `model_type` of image models whose text model is opened alone. Without images each computes what its text
model computes, which the tests show for every one whose text model the decoder engine knows."""
_CALL_IT_TEXT_MODEL = ("idefics3", "smolvlm")
"""Those that call it `text_model` inside `model` of transformers' class; with the others it is `language_model`."""

_TEXT_MODELS = (
    "exaone4", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4", "gpt_oss", "granite", "granitemoehybrid", "lfm2",
    "llama", "ministral3", "mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_5_text",
    "qwen3_moe", "smollm3",
)  # fmt: skip
_CLASS_NAMES = {"granitemoehybrid": "GraniteMoeHybrid", "qwen3_5_text": "Qwen3_5", "smollm3": "SmolLM3"}
"""Where transformers' name of the class is not made of `model_type`; its own table takes a second to import."""

_INSIDE = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?P<rest>.+)")
_OLDER_TIE = "tie_embedding"
"""LFM2's older name for `tie_word_embeddings`, which wins."""
_BESIDE = {"qwen3_5_text": re.compile(r"mtp\.|model\.visual\.")}
"""Tensors in checkpoints of a text model that transformers leaves out too: they predict further tokens, or see."""

_KEYS_OF_A_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\.")
"""What checkpoints of Gemma 4 have in layers too that use another layer's keys and values, where it is unused."""

_TAKEN_FROM_OUTSIDE = ("eos_token_id", "bos_token_id", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class Wrapper:
    """The image model around a text model."""

    model_type: str  # of the whole
    prefix: str  # where transformers' class has the modules of the text model, such as `model.language_model`

    def wrapped_name(self, name: str) -> str:
        """What the whole model calls a module or tensor of the text model."""
        return f"{self.prefix}.{name.removeprefix('model.')}" if name.startswith("model.") else name


def text_name(name: str) -> str | None:
    """What the text model alone calls a module or tensor of the whole; None for what is no part of it."""
    match = _INSIDE.fullmatch(name)
    if match is None:
        return name if name.split(".", maxsplit=1)[0] == "lm_head" else None
    rest = match["rest"]
    return rest if rest.split(".")[0] == "lm_head" else f"model.{rest}"


def is_excluded(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor in a text model's checkpoint is no part of the text model, by what transformers leaves out."""
    pattern = _BESIDE.get(str(config.get("model_type")))
    if pattern is not None and pattern.match(name) is not None:
        return True
    layer = _KEYS_OF_A_LAYER.search(name) if config.get("model_type") == "gemma4_text" else None
    sharing, layers = config.get("num_kv_shared_layers"), config.get("num_hidden_layers")
    return (
        layer is not None and isinstance(sharing, int) and isinstance(layers, int) and int(layer[1]) >= layers - sharing
    )


def unwrap_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], Wrapper | None]:
    """The text model's configuration and what is around it; the configuration itself and None where nothing is."""
    model_type, text = config.get("model_type"), config.get("text_config")
    if not isinstance(model_type, str) or model_type not in WRAPPERS or not isinstance(text, Mapping):
        return dict(config), None
    inside = dict(text)
    for key in _TAKEN_FROM_OUTSIDE:
        if inside.get(key) is None and config.get(key) is not None:
            inside[key] = config[key]
    inside["tie_word_embeddings"] = _ties(config)
    inside.pop(_OLDER_TIE, None)
    inside["architectures"] = causal_class(inside.get("model_type")) or inside.get("architectures")
    return inside, Wrapper(model_type, f"model.{'text' if model_type in _CALL_IT_TEXT_MODEL else 'language'}_model")


def causal_class(model_type: object) -> list[str]:
    """What transformers calls a language model of this type, as a config lists it; empty where it has none."""
    if model_type not in _TEXT_MODELS:
        return []
    words = str(model_type).removesuffix("_text").split("_")
    return [_CLASS_NAMES.get(str(model_type), "".join(map(str.capitalize, words))) + "ForCausalLM"]


def _ties(config: Mapping[str, Any]) -> bool:
    """Whether the whole model's head is the embedding: as it says, or by its class's default."""
    stated = config.get("tie_word_embeddings")
    if config["model_type"] == "lfm2_vl":
        stated = config.get(_OLDER_TIE, stated)
    if isinstance(stated, bool):
        return stated
    from backhand.nn.decoder.config_fields import config_class

    known = config_class(str(config["model_type"]))
    return bool(known is not None and known.fields.get("tie_word_embeddings"))
