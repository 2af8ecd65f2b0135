"""Config fields that every family of decoders has, read into a `DecoderConfig`, and helpers for shared conventions."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from backhand.errors import ArtifactError
from backhand.nn.families.config_fields import ConfigFields, token_ids
from backhand.nn.families.family import TRAITS, DecoderConfig, LayerConfig, RotaryConfig
from backhand.nn.families.rotary import FULL, SLIDING, rotary
from backhand.ops.logits_rule import LogitsRule

_MOST_LAYERS = 100_000
SILU, GELU = ("hidden_act", "silu"), ("hidden_activation", "gelu_pytorch_tanh")
"""Name of a family's activation field, and the one value that the engine computes."""
MOST_ELEMENTS = 2**40
"""Upper bound of sizes: a corrupted number must not fill the memory with layers."""


def common_fields(
    fields: ConfigFields,
    *,
    window: int | None = None,
    slides: Callable[[int], bool] | None = None,
    rotary_sets: Callable[[ConfigFields, int, int], tuple[RotaryConfig, ...]] = rotary,
    norm_eps: str = "rms_norm_eps",
    activation: tuple[str, str] | None = SILU,
) -> DecoderConfig:
    """Read the fields that every family has, with the traits of the family.

    Args:
        window: sliding window in tokens, for layers that slide.
        slides: returns True for sliding layers if `layer_types` is absent. None if no layer slides.
        rotary_sets: reads one set of angles, or those of full and of sliding layers.
        norm_eps: name of that field.
        activation: name and required value of that field, or None if the family has no such field.
    """
    if activation is not None:
        fields.must_equal(*activation)
    heads = fields.integer("num_attention_heads")
    # Null, or absent without a class default: every head has its own key and value.
    key_value_heads = fields.integer("num_key_value_heads", heads)
    hidden_size = fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", max(hidden_size // heads, 1))
    max_positions = fields.integer("max_position_embeddings")
    if heads % key_value_heads:
        raise ArtifactError(f"{heads} heads cannot share {key_value_heads} key/value heads", where="config.json")
    if head_dim % 2:
        fields.problem("head_dim", f"{head_dim} is odd, and the rotary embedding rotates pairs")
    layers = fields.integer("num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise ArtifactError(f"num_hidden_layers = {layers} is not a plausible number of layers", where="config.json")
    vocab_size, intermediate_size = fields.integer("vocab_size"), fields.integer("intermediate_size")
    largest = max(vocab_size, intermediate_size, heads * head_dim) * hidden_size
    if largest > MOST_ELEMENTS or max_positions >= MOST_ELEMENTS:
        raise ArtifactError(
            f"a weight of {largest:,} elements is too large for a language model",
            where="config.json",
            why=f"hidden_size {hidden_size}, intermediate_size {intermediate_size}, vocab_size {vocab_size}, "
            f"{heads} heads of {head_dim}, {max_positions} positions",
            next_step="fetch the model again",
        )
    stated = None if slides is None else layers_of_type(fields, SLIDING, layers)
    sliding = stated or [slides is not None and slides(number) for number in range(layers)]
    if any(sliding) and window is None:
        fields.problem("sliding_window", "there are sliding layers, but no window is set")
    angles = rotary_sets(fields, head_dim, max_positions)
    family = str(fields.value("model_type"))
    config = DecoderConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        norm_eps=fields.number(norm_eps, 1e-6),
        layers=tuple(
            LayerConfig(window if slides_here else None, rotary=int(slides_here and len(angles) > 1))
            for slides_here in sliding
        ),
        rotary=angles,
        attention_scaling=head_dim**-0.5,
        tied_head=fields.flag("tie_word_embeddings", False),
        max_position_embeddings=max_positions,
        eos_token_ids=tuple(token_ids(fields.value("eos_token_id"))),
    )
    return replace(config, **TRAITS.get(family, {}))


def sliding_except_every(interval: int) -> Callable[[int], bool]:
    """Return a predicate that is False for every n-th layer, which has full attention, and True for sliding layers."""
    return lambda index: (index + 1) % interval != 0


def without_rotary(decoder: DecoderConfig, unrotated: Callable[[int], bool]) -> DecoderConfig:
    """Remove the rotary embedding from the layers for which `unrotated` is True."""
    return with_layers(decoder, map(unrotated, range(len(decoder.layers))), rotary=None)


def with_layers(decoder: DecoderConfig, which: Iterable[bool], **changes: Any) -> DecoderConfig:
    """Set these values in the layers for which `which`, one flag per layer, is True."""
    layers = (
        replace(layer, **changes) if selected else layer for layer, selected in zip(decoder.layers, which, strict=True)
    )
    return replace(decoder, layers=tuple(layers))


def uniform_window(fields: ConfigFields, window: int | None, **changes: Any) -> DecoderConfig:
    """Read a family whose layers all have the same window, or none. Arguments are passed to `common_fields`."""
    one_layer_type(fields, FULL if window is None else SLIDING)
    return common_fields(fields, window=window, slides=None if window is None else lambda _: True, **changes)


def with_biases(fields: ConfigFields, decoder: DecoderConfig, default: bool = False) -> DecoderConfig:
    """Apply `attention_bias` to q, k, v and o."""
    bias = fields.flag("attention_bias", default)
    return replace(decoder, qkv_bias=bias, output_bias=bias)


def stated_window(fields: ConfigFields) -> int | None:
    """Return `sliding_window`, or None if the field is null or absent."""
    return None if fields.value("sliding_window") is None else fields.integer("sliding_window")


def used_window(fields: ConfigFields) -> int | None:
    """Return `sliding_window`, or None if it is null or absent or `use_sliding_window` is false."""
    if fields.flag("use_sliding_window", False):
        return stated_window(fields)
    fields.neutral("sliding_window")
    return None


def window_size(fields: ConfigFields) -> int | None:
    """Return `sliding_window`, None if it is null, or the class default if it is absent (4096, in gpt-oss 128)."""
    if fields.stated("sliding_window") and fields.value("sliding_window") is None:
        return None
    return fields.integer("sliding_window")


def layers_of_type(fields: ConfigFields, kind: str, layers: int) -> list[bool] | None:
    """Return for each layer if `layer_types` gives it this type, or None if the field is absent.

    All other layers must have full attention.

    Raises:
        ArtifactError: `layer_types` does not have one entry per layer.
    """
    stated = fields.value("layer_types")
    if stated is None:
        return None
    if not isinstance(stated, list) or len(stated) != layers:
        raise ArtifactError(f"layer_types does not name a type for each of {layers} layers", where="config.json")
    if any(one not in (FULL, kind) for one in stated):
        fields.problem("layer_types", f"the engine has {FULL} and {kind}")
    return [one == kind for one in stated]


def one_layer_type(fields: ConfigFields, expected: str) -> None:
    """Check that `layer_types`, if present, names the expected type for every layer.

    These families do not read the field.
    """
    stated = fields.value("layer_types")
    if stated is not None and not (isinstance(stated, list) and all(kind == expected for kind in stated)):
        fields.problem("layer_types", f"every layer here has {expected}")


def with_multipliers(fields: ConfigFields, decoder: DecoderConfig) -> DecoderConfig:
    """Read Granite's four multipliers: of scores, the embedding, the sublayers' outputs, and logits."""
    return replace(
        decoder,
        attention_scaling=fields.number("attention_multiplier"),
        embedding_scaling=nearest_float32(fields.number("embedding_multiplier")),
        residual_multiplier=fields.number("residual_multiplier"),
        logits=LogitsRule(1 / fields.number("logits_scaling")),
    )


def nearest_float32(value: float) -> float:
    """Round to the nearest float32 number."""
    nearest: float = struct.unpack("f", struct.pack("f", value))[0]
    return nearest


def number_or_none(fields: ConfigFields, key: str) -> float | None:
    """Return a number, None if the field is null, or the class default if it is absent."""
    return None if fields.stated(key) and fields.value(key) is None else fields.number(key)
