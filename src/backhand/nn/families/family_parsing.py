"""Read a Hugging Face config into a `DecoderConfig` and classify every field: used, neutral, or one fixed value.

A field that would change what transformers computes and that the engine does not implement is an error. So is a field
that transformers might read and that is unknown here, unless it is null. A field that neither reads is reported in
a note. Absent fields have the defaults of transformers' configuration class. Checked against the modelling sources of
transformers 5.24:

- Attention: scores are scaled by head_dim^-½, in Gemma by query_pre_attn_scalar^-½, in Granite by attention_multiplier.
  Gemma 2 caps scores softly (attn_logit_softcapping), and logits (final_logit_softcapping). Granite also multiplies the
  embedding by embedding_multiplier and the output of each sublayer by residual_multiplier, and divides the logits by
  logits_scaling; otherwise it is Llama.
- Sliding window w: a query at i sees keys at j with i - w < j ≤ i, that is w keys including itself.
  - Mistral: every layer; 4096 if the field is absent, none if it is null. Phi-3 and Ministral 3: none in either case.
  - Qwen2 and Qwen3: layers with index ≥ `max_window_layers` if `use_sliding_window` is true.
  - Gemma 3: all layers but every sixth (`sliding_window_pattern`). Gemma 2: all but every second. OLMo 3 and EXAONE 4:
    all but every fourth. EXAONE 4 has no rotary embedding in the full layers, unless no layer has a window.
  - SmolLM3: the layers without rotary embedding (`no_rope_layers`; every fourth) if `use_sliding_window` is true.
  - `layer_types`, if given, decides.
- Ministral 3's queries at position p are multiplied by 1 + llama_4_scaling_beta ln(1 + ⌊p / original length⌋).
- Phi-3 has one module for q, k and v, and one for gate and up. GLM has one for gate and up.
- head_dim is hidden_size // heads if absent; 128 in Qwen3, 256 in Gemma.
- Biases: Llama and SmolLM3 have `attention_bias` on q, k, v and o, and `mlp_bias` on gate, up and down. Qwen2 always
  has biases on q, k and v, never on o. Qwen3, Gemma and OLMo have `attention_bias` on all four. Mistral, Ministral 3,
  EXAONE 4 and Phi-3 have none. GLM has `attention_bias` on q, k and v only, true if absent.
- Norms: float32 inside. Llama-like norms multiply by the weight after the cast back to the compute dtype, Gemma's by
  1 + weight before it, OLMo's by the weight before it. OLMo and EXAONE have no norms before their sublayers. OLMo has
  one norm over all of q and one over all of k.
- Gemma's embedding is multiplied by √hidden, computed in float32 and then rounded to the weight's dtype.
  `embedding_scaling` is the float32 number, and the multiplication rounds it to the dtype of the weight.
- Encoders: see `nn.families.encoder_families`. Gemma 3 with `use_bidirectional_attention` is an encoder too
  (EmbeddingGemma). `sliding_window` is then the width of the whole window, and a query sees half of it to each side.
- LFM2, Granite 4, Bamba, Nemotron-H and Qwen3.5: see `nn.families.mixed_families`. Mixtral, Qwen3-MoE and gpt-oss: see
  `nn.families.expert_families`. Gemma 4: see `nn.families.gemma4_fields`.
- Rotary: see `nn.families.rotary`. Gemma 3's full layers have base 1e6 and optional scaling, its sliding layers 1e4.
  All layers of OLMo 3 have base 5e5, and its full layers have optional scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from backhand.errors import ArtifactError
from backhand.nn.families.common_fields import (
    GELU,
    common_fields,
    nearest_float32,
    number_or_none,
    one_layer_type,
    sliding_except_every,
    stated_window,
    uniform_window,
    used_window,
    window_size,
    with_biases,
    with_multipliers,
    without_rotary,
)
from backhand.nn.families.config_fields import HEADLESS, UNREAD, ConfigFields, UnsupportedModel
from backhand.nn.families.encoder_families import bert, modernbert
from backhand.nn.families.expert_families import gpt_oss, mixtral, qwen3_moe
from backhand.nn.families.family import DecoderConfig
from backhand.nn.families.gemma4_fields import gemma4_text
from backhand.nn.families.mixed_families import bamba, falcon_h1, granite4, lfm2, nemotron_h, qwen3_5
from backhand.nn.families.neutral_fields import FIXED, NEUTRAL, QUANTIZED
from backhand.nn.families.rotary import (
    FULL,
    gemma_rotary,
    glm_rotary,
    ministral3_rotary,
    olmo3_rotary,
    phi3_rotary,
    query_scaling,
)
from backhand.ops.logits_rule import LogitsRule


def decoder_config(config: Mapping[str, object]) -> DecoderConfig:
    """Return the decoder engine's configuration of a model.

    Args:
        config: the contents of config.json, of transformers 5 or older, or a GGUF file's metadata in the same terms.

    Raises:
        UnsupportedModel: the engine does not compute this model; it lists every field that prevents it.
        ArtifactError: a value that no model has, such as a negative size.
    """
    model_type = config.get("model_type")
    parse = {**_FAMILIES, **_ENCODERS}.get(model_type) if isinstance(model_type, str) else None
    if parse is None:
        known = ", ".join((*FAMILIES, *ENCODERS))
        raise UnsupportedModel(str(model_type), [f"model_type = {model_type!r}: the engine knows {known}"])
    fields = ConfigFields(config, str(model_type))
    fields.neutral(*NEUTRAL)
    for key, value in FIXED.items():
        fields.must_equal(key, value)
    for key in QUANTIZED:
        if not _is_mxfp4(fields.value(key), str(model_type)):
            fields.must_equal(key, reason="the engine reads quantized weights from GGUF files only")
    result = parse(fields)
    if fields.value(HEADLESS):
        result = replace(result, has_head=False)
    fields.take_unread()
    fields.close()
    if fields.problems:
        raise _unsupported(fields, str(model_type))
    return replace(result, padding_id=_padding_id(fields, result.vocab_size), notes=_notes(fields, str(model_type)))


def predicts_tokens(config: Mapping[str, object]) -> bool | None:
    """Return `has_head` of `decoder_config` without reading the other fields, or None for an unknown model.

    Other fields may need their defaults in transformers, which takes seconds to import.
    """
    model_type = config.get("model_type")
    if model_type in _ENCODERS or config.get(HEADLESS):
        return False
    if model_type == "gemma3_text":
        return not config.get("use_bidirectional_attention")
    return True if model_type in _FAMILIES else None


def _is_mxfp4(quantization: object, model_type: str) -> bool:
    """Return True for OpenAI's checkpoints, whose MXFP4 blocks can be read."""
    if not isinstance(quantization, Mapping) or model_type != "gpt_oss":
        return False
    return quantization.get("quant_method") == "mxfp4"


def _unsupported(fields: ConfigFields, model_type: str) -> UnsupportedModel:
    remedy = next_step = None
    if any(fields.value(key) is not None for key in QUANTIZED):
        remedy = "The engine takes the same model as a GGUF file, or from its directory before it was quantized"
    if fields.value(UNREAD):
        next_step = "use the model's Hugging Face directory"
    return UnsupportedModel(model_type, fields.problems, remedy=remedy, next_step=next_step)


def _notes(fields: ConfigFields, model_type: str) -> tuple[str, ...]:
    notes = []
    if fields.foreign:
        shown = ", ".join(fields.foreign[:_SHOWN]) + (" …" if len(fields.foreign) > _SHOWN else "")
        count = f"{len(fields.foreign)} fields" if len(fields.foreign) > 1 else "one field"
        notes.append(f"the configuration has {count} that no {model_type} model of transformers reads: {shown}")
    notes += [
        f"{key} = {dropout!r} stays off: the base model computes as it does at inference"
        for key in ("attention_dropout", "resid_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob")
        if (dropout := fields.value(key))
    ]
    if fields.value("mtp_num_hidden_layers"):
        notes.append("layers that predict further tokens (mtp) are left out, as transformers has it")
    return tuple(notes)


_SHOWN = 6


def _padding_id(fields: ConfigFields, vocab_size: int) -> int | None:
    """Return `pad_token_id`, with which transformers creates its embedding."""
    token = fields.or_declared("pad_token_id")
    return token if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size else None


def _llama(fields: ConfigFields) -> DecoderConfig:
    one_layer_type(fields, FULL)
    return replace(with_biases(fields, common_fields(fields)), mlp_bias=fields.flag("mlp_bias", False))


def _granite(fields: ConfigFields) -> DecoderConfig:
    return with_multipliers(fields, _llama(fields))


def _mistral(fields: ConfigFields) -> DecoderConfig:
    return uniform_window(fields, window_size(fields))


def _qwen2(fields: ConfigFields) -> DecoderConfig:
    first_sliding = fields.integer("max_window_layers", minimum=0)
    window = window_size(fields) if fields.flag("use_sliding_window", False) else None
    fields.neutral("sliding_window")
    return common_fields(fields, window=window, slides=lambda index: window is not None and index >= first_sliding)


def _qwen3(fields: ConfigFields) -> DecoderConfig:
    return with_biases(fields, _qwen2(fields))


def _smollm3(fields: ConfigFields) -> DecoderConfig:
    window = used_window(fields)
    rotates = _rotated_layers(fields, fields.integer("num_hidden_layers"))
    decoder = common_fields(fields, window=window, slides=lambda index: window is not None and not rotates(index))
    decoder = replace(with_biases(fields, decoder), mlp_bias=fields.flag("mlp_bias", False))
    return without_rotary(decoder, lambda index: not rotates(index))


def _rotated_layers(fields: ConfigFields, layers: int) -> Callable[[int], bool]:
    """Return a predicate for layers with a rotary embedding.

    They are the layers whose entry in `no_rope_layers` is not 0. Without that list, they are all but every fourth.
    """
    interval = fields.integer("no_rope_layer_interval", 4)
    stated = fields.value("no_rope_layers")
    if stated is None:
        return lambda index: (index + 1) % interval != 0
    if not isinstance(stated, list) or len(stated) != layers or any(item not in (0, 1) for item in stated):
        raise ArtifactError(f"no_rope_layers is not 0 or 1 for each of {layers} layers", where="config.json")
    return lambda index: bool(stated[index])


def _olmo2(fields: ConfigFields) -> DecoderConfig:
    one_layer_type(fields, FULL)
    return with_biases(fields, common_fields(fields))


def _olmo3(fields: ConfigFields) -> DecoderConfig:
    decoder = common_fields(
        fields, window=window_size(fields), slides=sliding_except_every(4), rotary_sets=olmo3_rotary
    )
    return with_biases(fields, decoder)


def _exaone4(fields: ConfigFields) -> DecoderConfig:
    window = window_size(fields)
    # The value may be a string such as LLLG. Such files also have layer_types, which decide.
    stated = fields.value("layer_types") is not None
    fields.neutral("sliding_window_pattern")
    pattern = 1 if stated or window is None else fields.integer("sliding_window_pattern", 4)
    decoder = common_fields(fields, window=window, slides=sliding_except_every(pattern))
    return without_rotary(decoder, lambda index: window is not None and decoder.layers[index].window is None)


def _phi3(fields: ConfigFields) -> DecoderConfig:
    return uniform_window(fields, stated_window(fields), rotary_sets=phi3_rotary)


def _glm(fields: ConfigFields) -> DecoderConfig:
    one_layer_type(fields, FULL)
    bias = fields.flag("attention_bias", True)
    return replace(common_fields(fields, rotary_sets=glm_rotary), qkv_bias=bias)


def _ministral3(fields: ConfigFields) -> DecoderConfig:
    decoder = uniform_window(fields, stated_window(fields), rotary_sets=ministral3_rotary)
    return replace(decoder, query_scaling=query_scaling(fields, decoder.rotary[0]))


def _gemma2(fields: ConfigFields) -> DecoderConfig:
    fields.must_equal("use_bidirectional_attention", False)
    return replace(
        _gemma(fields, window_size(fields), sliding_except_every(2)),
        attention_cap=number_or_none(fields, "attn_logit_softcapping"),
        logits=LogitsRule(cap=number_or_none(fields, "final_logit_softcapping")),
    )


def _gemma3_text(fields: ConfigFields) -> DecoderConfig:
    fields.must_equal("attn_logit_softcapping")
    fields.must_equal("final_logit_softcapping")
    # A config saved by transformers 5 has the pattern under a private name, and layer_types, which decides.
    pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    both, window = fields.flag("use_bidirectional_attention", False), window_size(fields)
    if both and window is not None:
        window = window // 2 + 1
    decoder = _gemma(fields, window, sliding_except_every(pattern), rotary_sets=gemma_rotary)
    return replace(decoder, causal=not both, has_head=not both)


def _gemma(fields: ConfigFields, window: int | None, slides: Callable[[int], bool], **options: Any) -> DecoderConfig:
    """Read the fields that Gemma 2 and 3 share."""
    decoder = common_fields(fields, window=window, slides=slides, activation=GELU, **options)
    return replace(
        with_biases(fields, decoder),
        attention_scaling=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scaling=nearest_float32(decoder.hidden_size**0.5),
    )


_FAMILIES: dict[str, Callable[[ConfigFields], DecoderConfig]] = {
    "bamba": bamba,
    "exaone4": _exaone4,
    "falcon_h1": falcon_h1,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "gemma4_text": gemma4_text,
    "glm": _glm,
    "glm4": _glm,
    "gpt_oss": gpt_oss,
    "granite": _granite,
    "granitemoehybrid": granite4,
    "lfm2": lfm2,
    "llama": _llama,
    "ministral3": _ministral3,
    "mistral": _mistral,
    "mixtral": mixtral,
    "nemotron_h": nemotron_h,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_5_text": qwen3_5,
    "qwen3_moe": qwen3_moe,
    "smollm3": _smollm3,
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""Values of `model_type` that the engine knows."""

_ENCODERS: dict[str, Callable[[ConfigFields], DecoderConfig]] = {"bert": bert, "modernbert": modernbert}

ENCODERS: tuple[str, ...] = tuple(_ENCODERS)
"""Values of `model_type` of encoders that the engine knows. They have no language-model head."""
