"""The metadata of a GGUF file for a model that comes from a Hugging Face directory.

What a file cannot say is not noticed here: whoever writes one reads it again and compares the configurations.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np

from backhand.errors import ArtifactError
from backhand.export.gguf_vocabulary import add_vocabulary
from backhand.export.llama_cpp_limits import context_length, refuse_for_llama_cpp
from backhand.nn.family import DecoderConfig
from backhand.nn.family_parsing import decoder_config
from backhand.nn.loading.source import ModelSource
from backhand.nn.rotary_frequencies import llama3_factors


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
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_rotary(writer, config)
    windows = {layer.window for layer in config.layers if layer.window is not None}
    if windows:
        writer.add_sliding_window(max(windows))
    if config.sandwich_norms:  # Gemma 3 alternates; others slide everywhere or nowhere
        writer.add_sliding_window_pattern([layer.window is not None for layer in config.layers])
    return add_vocabulary(writer, source.tokenizer(), config.vocab_size, str(source.path))


def rope_factors(config: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """rope_freqs.weight, (head_dim / 2,): what divides the frequencies, where a list of numbers says it; else None."""
    parsed = decoder_config(config)
    rotary = parsed.rotary[_full_rotary(parsed)]
    scaling = dict(rotary.scaling or ())
    if scaling.get("rope_type") == "llama3":
        return llama3_factors(rotary.theta, parsed.head_dim, scaling).numpy()
    if scaling.get("rope_type") == "longrope":
        return np.asarray(scaling["short_factor"], dtype=np.float32)
    return None


def _add_rotary(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    full = _full_rotary(config)
    rotary = config.rotary[full]
    writer.add_rope_freq_base(rotary.theta)
    scaling = dict(rotary.scaling or ())
    if scaling.get("rope_type") == "linear":
        factor = scaling["factor"]
        if not isinstance(factor, int | float):
            raise ArtifactError(f"the rotary factor {factor!r} is no number", where="rope_parameters")
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    for index, local in enumerate(config.rotary):
        if index != full:
            writer.add_rope_freq_base_swa(local.theta)


def _full_rotary(config: DecoderConfig) -> int:
    """Index of the angles that layers with full attention turn by; of the only ones, where all layers slide."""
    return next((layer.rotary for layer in config.layers if layer.window is None), config.layers[0].rotary)
