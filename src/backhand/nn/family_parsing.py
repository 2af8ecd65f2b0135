"""Read a Hugging Face config into a `DecoderConfig`, classing every field: used, neutral, or one fixed value.

A field that would change what the model computes and that the decoder engine does not implement is an error, never
ignored; so is a field that nobody here knows, unless it is null. Checked against the modelling sources of transformers
5.24:

- Attention: queries times keys are scaled by head_dim^-½, in Gemma 3 by query_pre_attn_scalar^-½.
- Sliding window w: a query at i sees keys at j with i - w < j ≤ i, so w of them, itself included. Mistral has it in
  every layer: 4096 where the field is absent, none where it is null. Qwen2 and Qwen3 have it where `use_sliding_window`
  is true and the layer's index ≥ `max_window_layers`; Gemma 3 in all but every sixth layer (`sliding_window_pattern`).
  `layer_types`, where given, decides instead.
- head_dim, where not stated, is hidden_size // heads; 128 in Qwen3, 256 in Gemma 3.
- Biases: Llama `attention_bias` on q, k, v and o, `mlp_bias` on gate, up and down; Qwen2 always on q, k and v, never
  on o; Qwen3 and Gemma 3 `attention_bias` on all four; Mistral none.
- Norms: float32 inside. Llama-like ones multiply by the weight after the cast back to the compute dtype, Gemma's by
  1 + weight before it.
- Gemma's embedding is multiplied by √hidden, made in float32 and then rounded to the weight's dtype:
  `embedding_scaling` is the float32 number, and whoever multiplies rounds it to the dtype of the weight.
- Rotary: see `rotary_parsing`. Full layers of Gemma 3 turn with base 1e6 and perhaps scaling, sliding ones with 1e4.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from backhand.errors import ArtifactError
from backhand.nn.config_fields import ConfigFields, UnsupportedModel
from backhand.nn.family import DecoderConfig, LayerConfig, RotaryConfig
from backhand.nn.neutral_fields import FIXED, NEUTRAL
from backhand.nn.rotary_parsing import FULL, SLIDING, gemma_rotary, rotary

_MOST_LAYERS = 100_000
"""A garbled number must not fill the memory with layers."""


@dataclass(frozen=True)
class _Defaults:
    """What transformers takes where a family's config is silent; None: the field must be there."""

    num_key_value_heads: int | None
    max_position_embeddings: int
    head_dim: int | None = None
    tied_head: bool = False
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None


def decoder_config(config: Mapping[str, object]) -> DecoderConfig:
    """What the decoder engine needs to know of a model.

    Args:
        config: the contents of config.json, of transformers 5 or older, or a GGUF file's metadata in the same terms.

    Raises:
        UnsupportedModel: for a model that the engine does not compute; it lists every field that stands in the way.
        ArtifactError: for a value that no model has, such as a negative size.
    """
    model_type = config.get("model_type")
    parse = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if parse is None:
        raise _unknown_family(config, model_type)
    fields = ConfigFields(config)
    fields.neutral(*NEUTRAL)
    for key, value in FIXED.items():
        fields.must_equal(key, value)
    fields.must_equal("quantization_config", reason="the engine reads quantized weights from GGUF files only")
    result = parse(fields)
    fields.close()
    if fields.problems:
        raise UnsupportedModel(str(model_type), fields.problems)
    return replace(result, padding_id=_padding_id(config, result.vocab_size))


def _padding_id(config: Mapping[str, object], vocab_size: int) -> int | None:
    """pad_token_id, by which transformers' embedding is made."""
    token = config.get("pad_token_id")
    return token if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size else None


def _unknown_family(config: Mapping[str, object], model_type: object) -> UnsupportedModel:
    if model_type == "gemma3" and "text_config" in config:
        return UnsupportedModel(
            str(model_type),
            ["model_type = 'gemma3': the text model lies inside an image model, where its modules have other names"],
            next_step="save the text model alone (transformers' Gemma3ForCausalLM), or use --engine transformers",
        )
    known = ", ".join(FAMILIES)
    return UnsupportedModel(str(model_type), [f"model_type = {model_type!r}: the engine knows {known}"])


def _llama(fields: ConfigFields) -> DecoderConfig:
    fields.must_equal("hidden_act", "silu")
    bias = fields.flag("attention_bias", False)
    _one_layer_type(fields, FULL)
    decoder = _decoder(fields, _Defaults(num_key_value_heads=None, max_position_embeddings=2048))
    return replace(decoder, qkv_bias=bias, output_bias=bias, mlp_bias=fields.flag("mlp_bias", False))


def _mistral(fields: ConfigFields) -> DecoderConfig:
    fields.must_equal("hidden_act", "silu")
    fields.must_equal("attention_bias", False)
    fields.must_equal("mlp_bias", False)
    window = _window(fields)
    _one_layer_type(fields, FULL if window is None else SLIDING)
    return _decoder(
        fields,
        _Defaults(num_key_value_heads=8, max_position_embeddings=131_072),
        window=window,
        is_sliding=lambda _: window is not None,
    )


def _qwen(fields: ConfigFields, defaults: _Defaults) -> DecoderConfig:
    fields.must_equal("hidden_act", "silu")
    first_sliding = fields.integer("max_window_layers", 28, minimum=0)
    window = _window(fields) if fields.flag("use_sliding_window", False) else None
    fields.neutral("sliding_window")
    return _decoder(
        fields,
        defaults,
        window=window,
        is_sliding=lambda index: window is not None and index >= first_sliding,
        reads_layer_types=True,
    )


def _qwen2(fields: ConfigFields) -> DecoderConfig:
    fields.must_equal("attention_bias", True)
    defaults = _Defaults(num_key_value_heads=32, max_position_embeddings=32_768)
    return replace(_qwen(fields, defaults), qkv_bias=True)


def _qwen3(fields: ConfigFields) -> DecoderConfig:
    bias = fields.flag("attention_bias", False)
    defaults = _Defaults(num_key_value_heads=32, max_position_embeddings=32_768, head_dim=128)
    return replace(_qwen(fields, defaults), qkv_bias=bias, output_bias=bias, qk_norm=True)


def _gemma3_text(fields: ConfigFields) -> DecoderConfig:
    for key in ("hidden_activation", "hidden_act"):
        fields.must_equal(key, "gelu_pytorch_tanh")
    fields.must_equal("attn_logit_softcapping")
    fields.must_equal("final_logit_softcapping")
    fields.must_equal("use_bidirectional_attention", False)
    bias = fields.flag("attention_bias", False)
    # A config saved by transformers 5 has the pattern under a private name, beside layer_types, which wins.
    pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    defaults = _Defaults(
        vocab_size=262_208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=131_072,
        tied_head=True,
    )
    decoder = _decoder(
        fields,
        defaults,
        window=_window(fields),
        is_sliding=lambda index: (index + 1) % pattern != 0,
        reads_layer_types=True,
        rotary_sets=gemma_rotary,
    )
    return replace(
        decoder,
        attention_scaling=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        norm_offset=1.0,
        sandwich_norms=True,
        qk_norm=True,
        activation="gelu_tanh",
        qkv_bias=bias,
        output_bias=bias,
        embedding_scaling=_float32(decoder.hidden_size**0.5),
    )


_FAMILIES: dict[str, Callable[[ConfigFields], DecoderConfig]] = {
    "gemma3_text": _gemma3_text,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""The values of `model_type` that the engine knows."""


def _decoder(
    fields: ConfigFields,
    defaults: _Defaults,
    *,
    window: int | None = None,
    is_sliding: Callable[[int], bool] = lambda _: False,
    reads_layer_types: bool = False,
    rotary_sets: Callable[[ConfigFields, int, int], tuple[RotaryConfig, RotaryConfig]] | None = None,
) -> DecoderConfig:
    """Read what every family has."""
    heads = fields.integer("num_attention_heads", defaults.num_attention_heads)
    key_value_heads = fields.integer("num_key_value_heads", _key_value_heads(fields, defaults, heads))
    hidden_size = fields.integer("hidden_size", defaults.hidden_size)
    head_dim = fields.integer("head_dim", defaults.head_dim or max(hidden_size // heads, 1))
    max_positions = fields.integer("max_position_embeddings", defaults.max_position_embeddings)
    if heads % key_value_heads:
        raise ArtifactError(f"{heads} heads cannot share {key_value_heads} key/value heads", where="config.json")
    if head_dim % 2:
        fields.problem("head_dim", f"{head_dim} is odd, and the rotary embedding turns pairs")
    layers = fields.integer("num_hidden_layers", defaults.num_hidden_layers)
    if layers > _MOST_LAYERS:
        raise ArtifactError(f"num_hidden_layers = {layers} is no number of layers", where="config.json")
    sliding = [is_sliding(index) for index in range(layers)]
    if reads_layer_types:
        sliding = _layer_types(fields, sliding)
    if any(sliding) and window is None:
        fields.problem("sliding_window", "there are sliding layers, but no window is in use")
    angles = rotary_sets(fields, head_dim, max_positions) if rotary_sets else (rotary(fields, head_dim, max_positions),)
    return DecoderConfig(
        family=str(fields.value("model_type")),
        vocab_size=fields.integer("vocab_size", defaults.vocab_size),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", defaults.intermediate_size),
        num_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        layers=tuple(
            LayerConfig(window if slides else None, rotary=int(slides and len(angles) > 1)) for slides in sliding
        ),
        rotary=angles,
        attention_scaling=head_dim**-0.5,
        tied_head=fields.flag("tie_word_embeddings", defaults.tied_head),
        max_position_embeddings=max_positions,
        eos_token_ids=_token_ids(fields),
    )


def _key_value_heads(fields: ConfigFields, defaults: _Defaults, heads: int) -> int:
    """Where it is null, or absent without a default, every head has its own key and value."""
    return heads if fields.stated("num_key_value_heads") else defaults.num_key_value_heads or heads


def _window(fields: ConfigFields) -> int | None:
    """4096 where the field is absent, no window where it is null."""
    if fields.stated("sliding_window") and fields.value("sliding_window") is None:
        return None
    return fields.integer("sliding_window", 4096)


def _layer_types(fields: ConfigFields, sliding: list[bool]) -> list[bool]:
    stated = fields.value("layer_types")
    if stated is None:
        return sliding
    if not isinstance(stated, list) or len(stated) != len(sliding):
        raise ArtifactError(f"layer_types does not name a type for each of {len(sliding)} layers", where="config.json")
    if any(kind not in (FULL, SLIDING) for kind in stated):
        fields.problem("layer_types", f"the engine has {FULL} and {SLIDING}")
    return [kind == SLIDING for kind in stated]


def _one_layer_type(fields: ConfigFields, expected: str) -> None:
    """These families do not read layer_types; where it is there, it must say what they do."""
    stated = fields.value("layer_types")
    if stated is not None and not (isinstance(stated, list) and all(kind == expected for kind in stated)):
        fields.problem("layer_types", f"every layer here has {expected}")


def _token_ids(fields: ConfigFields) -> tuple[int, ...]:
    stated = fields.value("eos_token_id")
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in ids):
        raise ArtifactError(f"eos_token_id = {stated!r} is neither a token id nor a list of them", where="config.json")
    return tuple(ids)


def _float32(value: float) -> float:
    """The nearest float32 number."""
    nearest: float = struct.unpack("f", struct.pack("f", value))[0]
    return nearest
