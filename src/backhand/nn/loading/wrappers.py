"""Open the text model inside an image model's checkpoint: its configuration, tensors and module names.

A checkpoint of an image model has the text model's configuration under `text_config` and its weights under a prefix.
Only the text model is opened. The other parts are neither read nor counted. Its modules have three kinds of names:

    model.layers.0.…                   the text model alone; used everywhere in Backhand
    language_model.model.layers.0.…    checkpoints on the hub and those that transformers writes
    model.language_model.layers.0.…    other checkpoints, modules of transformers' class, and therefore PEFT

The head is `lm_head` in the first and third form, and `language_model.lm_head` in the second. Fields of the outer
config take precedence for the tied head and for the tokens that end a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backhand.nn.families.config_fields import config_class
from backhand.nn.families.family_parsing import ENCODERS, FAMILIES

WRAPPERS: tuple[str, ...] = (
    "aya_vision", "gemma3", "gemma4", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "lfm2_vl",
    "mistral3", "qwen3_5", "qwen3_5_moe", "smolvlm",
)  # fmt: skip
"""Image models (`model_type`) whose text model can be opened alone. Without images each computes the same as its text
model. The tests show this for every text model that the decoder engine supports."""
_NAMED_TEXT_MODEL = ("idefics3", "smolvlm")
"""Image models whose transformers class calls the text model `model.text_model` instead of `model.language_model`."""

_CLASS_NAMES = {"granitemoehybrid": "GraniteMoeHybrid", "qwen3_5_text": "Qwen3_5", "smollm3": "SmolLM3"}
"""Class names that do not follow from `model_type`. Importing transformers' own table takes a second."""

_INSIDE = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?P<rest>.+)")
_OLDER_TIE = "tie_embedding"
"""LFM2's older name for `tie_word_embeddings`. It takes precedence."""
_EXCLUDED = {"nemotron_h": re.compile("mtp"), "qwen3_5_text": re.compile(r"mtp\.|model\.visual\.")}
"""Tensors in a text model's checkpoint that transformers ignores too: multi-token prediction and vision."""
_STORED_PREFIXES = {"nemotron_h": ("backbone.", "model.")}
"""Prefix of tensors in checkpoints → prefix in transformers' class, by model type. transformers renames them too."""

_KEY_VALUE_TENSOR = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\.")
"""Key and value tensors. Checkpoints of Gemma 4 contain them, unused, in layers that share another layer's."""

_INHERITED_KEYS = ("eos_token_id", "bos_token_id", "dtype", "torch_dtype", "transformers_version")


_ENCODER_PARTS = ("embeddings.", "encoder.", "layers.", "final_norm.")


@dataclass(frozen=True)
class Wrapper:
    """The image model around a text model, or `TRUNK`."""

    model_type: str  # model_type of the image model
    prefix: str  # path of the text model in transformers' class, such as `model.language_model`, or empty

    def wrapped_name(self, name: str) -> str:
        """Return the name in transformers' class of a module or tensor of the text model."""
        return f"{self.prefix}.{name.removeprefix('model.')}".lstrip(".") if name.startswith("model.") else name


@dataclass(frozen=True)
class EncoderWrapper(Wrapper):
    """The class of an encoder with a head for classification. The head has no prefix."""

    def wrapped_name(self, name: str) -> str:
        """Return the name of a module or tensor in the class."""
        return f"{self.prefix}.{name}" if f"{name}.".startswith((*_ENCODER_PARTS, "pooler.")) else name


TRUNK = Wrapper("", "")
"""The class of a decoder without its head, transformers' AutoModel: its names lack the prefix `model.`."""


def text_name(name: str) -> str | None:
    """Return the text model's name of a module or tensor of the image model, or None if it is not part of it."""
    match = _INSIDE.fullmatch(name)
    if match is None:
        return name if name.split(".", maxsplit=1)[0] == "lm_head" else None
    rest = match["rest"]
    return rest if rest.split(".")[0] == "lm_head" else f"model.{rest}"


_ENCODER_PREFIX = re.compile(r"^(?:bert|model)\.")
"""Prefix of an encoder's tensors in files of a model with a head for another task."""
_OLDER_NORMS = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


def class_name(config: Mapping[str, Any], name: str) -> str | None:
    """Return the name in transformers' class of a stored tensor of a model that is not wrapped.

    For an encoder, return the name without prefixes, or None if the tensor belongs to a pooler or a head. Older BERT
    files have other names for the tensors of norms.
    """
    model_type = config.get("model_type")
    if model_type not in ENCODERS:
        stored, ours = _STORED_PREFIXES.get(str(model_type), ("", ""))
        return ours + name.removeprefix(stored) if name.startswith(stored) else name
    name = without_encoder_prefix(name)
    for older, newer in _OLDER_NORMS:
        name = name.removesuffix(older) + newer if name.endswith(older) else name
    return name if name.startswith(_ENCODER_PARTS) and not name.endswith(".position_ids") else None


def without_encoder_prefix(name: str) -> str:
    """Return the name of a tensor without the path of the encoder in a model with a head."""
    return _ENCODER_PREFIX.sub("", name, count=1)


def is_excluded(config: Mapping[str, Any], name: str) -> bool:
    """Return True if a tensor in a text model's checkpoint is not part of it, in agreement with transformers."""
    pattern = _EXCLUDED.get(str(config.get("model_type")))
    if pattern is not None and pattern.match(name) is not None:
        return True
    layer = _KEY_VALUE_TENSOR.search(name) if config.get("model_type") == "gemma4_text" else None
    sharing, layers = config.get("num_kv_shared_layers"), config.get("num_hidden_layers")
    return (
        layer is not None and isinstance(sharing, int) and isinstance(layers, int) and int(layer[1]) >= layers - sharing
    )


def unwrap_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], Wrapper | None]:
    """Split a configuration into the text model's configuration and its wrapper, None for a plain text model."""
    model_type, text = config.get("model_type"), config.get("text_config")
    if not isinstance(model_type, str) or model_type not in WRAPPERS or not isinstance(text, Mapping):
        return dict(config), None
    text_config = dict(text)
    for key in _INHERITED_KEYS:
        if text_config.get(key) is None and config.get(key) is not None:
            text_config[key] = config[key]
    text_config["tie_word_embeddings"] = _ties(config)
    text_config.pop(_OLDER_TIE, None)
    text_config["architectures"] = causal_class(text_config.get("model_type")) or text_config.get("architectures")
    return text_config, Wrapper(model_type, f"model.{'text' if model_type in _NAMED_TEXT_MODEL else 'language'}_model")


def causal_class(model_type: object) -> list[str]:
    """Return a config's `architectures` for a language model of this type, empty if transformers has no class."""
    if model_type not in FAMILIES:
        return []
    words = str(model_type).removesuffix("_text").split("_")
    return [_CLASS_NAMES.get(str(model_type), "".join(map(str.capitalize, words))) + "ForCausalLM"]


def _ties(config: Mapping[str, Any]) -> bool:
    """Return True if the image model's head is the embedding, by its config or by the default of its class."""
    stated = config.get("tie_word_embeddings")
    if config["model_type"] == "lfm2_vl":
        stated = config.get(_OLDER_TIE, stated)
    if isinstance(stated, bool):
        return stated
    known = config_class(str(config["model_type"]))
    return bool(known is not None and known.fields.get("tie_word_embeddings"))
