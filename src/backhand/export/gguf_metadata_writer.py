"""The metadata of a GGUF file for a model that comes from a Hugging Face directory.

What a file cannot say is not noticed here: whoever writes one reads it again and compares the configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from backhand.errors import ArtifactError, present
from backhand.export.gguf_adapter_writer import context_length, refuse_for_llama_cpp
from backhand.export.gguf_vocabulary import add_vocabulary
from backhand.nn.decoder.family import ATTENTION, GATED_DELTA, DecoderConfig
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.rotary import inverse_frequencies, llama3_factors, yarn_length
from backhand.nn.loading.gguf_families import DELTA_INTERVAL, RECURRENT_LAYERS
from backhand.nn.loading.gguf_gemma4 import STILL
from backhand.nn.loading.gguf_tensors import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, gguf_architecture
from backhand.nn.loading.source import ModelSource


def add_model_metadata(writer: gguf.GGUFWriter, source: ModelSource) -> list[str]:
    """Name, sizes, rotary angles, windows, and the vocabulary.

    Returns:
        tokens that have no row in the model, and that the file leaves out.

    Raises:
        ArtifactError: the tokenizer is of a kind that is not written here, or llama.cpp cannot compute the model.
    """
    config = decoder_config(source.config)
    refuse_for_llama_cpp(config, writer.arch, str(source.path))
    writer.add_name(source.hub_id or source.path.resolve().name)
    writer.add_block_count(len(config.layers))
    writer.add_context_length(context_length(config, writer.arch))
    writer.add_embedding_length(config.hidden_size)
    sized = [config.at(layer) for layer in config.layers]
    writer.add_feed_forward_length(_once([layer.intermediate_size for layer in sized]))
    writer.add_head_count(config.num_heads)
    attends = [layer.mixer == ATTENTION for layer in config.layers]
    kv_heads = config.num_key_value_heads
    by_layer = _once([layer.num_key_value_heads for layer in sized])
    writer.add_head_count_kv(by_layer if config.short_conv is None else [kv_heads if here else 0 for here in attends])
    if config.short_conv is not None:
        writer.add_shortconv_l_cache(config.short_conv.taps)
    head_dim = _full_head_dim(config)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(config.rotary[_full_rotary(config)].features or head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.mixture is not None:
        writer.add_expert_count(config.mixture.experts)
        writer.add_expert_used_count(config.mixture.chosen)
    if config.mixture is not None and writer.arch in ("qwen3moe", "gpt-oss"):
        writer.add_expert_feed_forward_length(config.mixture.width)
    if writer.arch == "granite":
        writer.add_attention_scale(config.attention_scaling)
        writer.add_embedding_scale(config.embedding_scaling)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(1 / config.logits.scaling)
    if config.delta is not None:
        _add_delta(writer, config, source.config)
    if writer.arch == "gemma4":
        _add_gemma4(writer, config)
    if config.query_scaling is not None:
        writer.add_attn_temperature_scale(config.query_scaling.beta)
    _add_rotary(writer, config)
    windows = {layer.window for layer in config.layers if layer.window is not None}
    if windows:
        writer.add_sliding_window(max(windows))
    if writer.arch == "gemma2" and config.attention_cap is not None and config.logits.cap is not None:
        writer.add_attn_logit_softcapping(config.attention_cap)
        writer.add_final_logit_softcapping(config.logits.cap)
    # Others slide everywhere, or as their architecture says.
    if windows and writer.arch in ("gemma3", "olmo2", "exaone4"):
        writer.add_sliding_window_pattern([layer.window is not None for layer in config.layers])
    return add_vocabulary(writer, source.tokenizer(), config.vocab_size, str(source.path))


def _once(numbers: list[int]) -> int | list[int]:
    """A number of each layer, or the one that all have."""
    return numbers if len({*numbers}) > 1 else numbers[0]


def _add_gemma4(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    """The other size of head, which layers slide and which share, and the inputs of layers.

    llama.cpp asks for all of it, also of a model where no layer slides; its window is the whole context then.
    """
    slides = [layer.window is not None for layer in config.layers]
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_rope_dimension_count_swa(config.head_dim)
    if not any(slides):
        writer.add_sliding_window(config.max_position_embeddings)
    writer.add_sliding_window_pattern(slides)
    writer.add_shared_kv_layers(sum(layer.keys_of is not None for layer in config.layers))
    writer.add_embedding_length_per_layer_input(0 if config.per_layer is None else config.per_layer.width)
    writer.add_final_logit_softcapping(config.logits.cap or 0.0)  # without a word llama.cpp caps at 30


def _add_delta(writer: gguf.GGUFWriter, config: DecoderConfig, stated: Mapping[str, Any]) -> None:
    """Sizes of the delta rule, the layers that have it, and which features turn by which place in an image."""
    sizes = present(config.delta)
    writer.add_ssm_conv_kernel(sizes.taps)
    writer.add_ssm_state_size(sizes.key_width)
    writer.add_ssm_group_count(sizes.key_heads)
    writer.add_ssm_time_step_rank(sizes.value_heads)
    writer.add_ssm_inner_size(sizes.value_heads * sizes.value_width)
    recurrent = [layer.mixer == GATED_DELTA for layer in config.layers]
    if recurrent == [bool((index + 1) % DELTA_INTERVAL) for index in range(len(recurrent))]:
        writer.add_full_attention_interval(DELTA_INTERVAL)
    else:
        writer.add_array(f"{writer.arch}.{RECURRENT_LAYERS}", recurrent)
    writer.add_rope_dimension_sections([*_image_sections(config, stated), 0])


def _image_sections(config: DecoderConfig, stated: Mapping[str, Any]) -> list[int]:
    """How many turning pairs go by time, height and width: as the config has it, else in thirds.

    Of a text all three are alike; what is left over would turn by a fourth place, which is 0 there.
    """
    pairs = (config.rotary[_full_rotary(config)].features or config.head_dim) // 2
    rule = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    sections = rule.get("mrope_section")
    if isinstance(sections, list | tuple) and len(sections) == 3 and sum(sections) == pairs:
        return [int(section) for section in sections]
    return [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3]


def rope_factors(config: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """What divides the frequencies, (turning features / 2,) float32 by the tensor's name, where lists say it."""
    parsed = decoder_config(config)
    rotary = parsed.rotary[_full_rotary(parsed)]
    scaling = dict(rotary.scaling or ())
    if gguf_architecture(config) == "gemma4":
        frequencies = inverse_frequencies(rotary, _full_head_dim(parsed))
        turning = int(frequencies.count_nonzero())
        factor = scaling.get("factor", 1.0) if scaling.get("rope_type") == "proportional" else 1.0
        return {ROPE_FACTORS: np.array([factor] * turning + [STILL] * (len(frequencies) - turning), dtype=np.float32)}
    if scaling.get("rope_type") == "llama3":
        return {ROPE_FACTORS: llama3_factors(rotary.theta, parsed.head_dim, scaling).numpy()}
    if scaling.get("rope_type") == "longrope":
        short = np.asarray(scaling["short_factor"], dtype=np.float32)
        if parsed.family != "phi3":
            return {ROPE_FACTORS: short}
        long = np.asarray(scaling.get("long_factor", scaling["short_factor"]), dtype=np.float32)
        return {SHORT_FACTORS: short, LONG_FACTORS: long}
    return {}


def _add_rotary(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    full = _full_rotary(config)
    rotary = config.rotary[full]
    writer.add_rope_freq_base(rotary.theta)
    scaling = dict(rotary.scaling or ())
    if scaling.get("rope_type") in ("linear", "yarn"):
        factor = scaling["factor"]
        if not isinstance(factor, int | float):
            raise ArtifactError(f"the rotary factor {factor!r} is no number", where="rope_parameters")
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(factor)
        if scaling["rope_type"] == "yarn":
            _add_yarn(writer, scaling, rotary.attention_factor / yarn_length(factor))
    if writer.arch == "phi3" and scaling.get("rope_type") == "longrope":
        # Nobody reads the length where there is one list; a file without it has no place for it.
        writer.add_rope_scaling_orig_ctx_len(rotary.longest_short or config.max_position_embeddings)
        writer.add_rope_scaling_attn_factors(rotary.attention_factor)
    for index, local in enumerate(config.rotary):
        if index != full:
            writer.add_rope_freq_base_swa(local.theta)


def _add_yarn(writer: gguf.GGUFWriter, scaling: Mapping[str, Any], attention_factor: float) -> None:
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
    if not math.isclose(attention_factor, 1.0, rel_tol=1e-9):
        writer.add_rope_scaling_attn_factors(attention_factor)


def _full_rotary(config: DecoderConfig) -> int:
    """Index of the angles that layers with full attention turn by; of the only ones, where all layers slide."""
    full = (layer.rotary for layer in config.layers if layer.window is None and layer.rotary is not None)
    return next(full, config.layers[0].rotary or 0)


def _full_head_dim(config: DecoderConfig) -> int:
    """Features of a head in layers with full attention, which in Gemma 4 are others than in sliding layers."""
    return config.rotary_dims[_full_rotary(config)]
