"""Write GGUF metadata, vocabulary included, for a model from a Hugging Face directory.

Features that a file cannot state are not detected here: callers read the file back and compare the configurations.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from backhand.errors import ArtifactError, not_none
from backhand.interop.gguf_adapter_writer import context_length, full_attention_interval, refuse_for_llama_cpp
from backhand.nn.families.family import ATTENTION, ATTENTION_AND_SSM, GATED_DELTA, MLP, DecoderConfig
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.families.rotary_frequencies import inverse_frequencies, llama3_factors, yarn_length
from backhand.nn.loading.gguf_families import DELTA_INTERVAL, RECURRENT_LAYERS
from backhand.nn.loading.gguf_gemma4 import NO_ROTATION
from backhand.nn.loading.gguf_pretokenizers import PRE_TOKENIZERS
from backhand.nn.loading.gguf_tensors import (
    GRANITE_HYBRID,
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    gguf_architecture,
)
from backhand.nn.loading.gguf_tokenizer import (
    BERT_KIND,
    BERT_NORMALIZER,
    CONTINUING,
    GEMMA4_KIND,
    LINE_PATTERN,
    stored_piece,
)
from backhand.nn.loading.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def add_model_metadata(writer: gguf.GGUFWriter, source: ModelSource) -> list[str]:
    """Add name, sizes, rotary angles, windows, and the vocabulary.

    Returns:
        tokens that have no row in the model, which the file leaves out.

    Raises:
        ArtifactError: if the kind of tokenizer is not supported, or llama.cpp cannot compute the model.
    """
    config = decoder_config(source.config)
    refuse_for_llama_cpp(config, writer.arch, str(source.path))
    writer.add_name(source.hub_id or source.path.resolve().name)
    writer.add_block_count(len(config.layers))
    writer.add_context_length(context_length(config, writer.arch))
    writer.add_embedding_length(config.hidden_size)
    sized = [config.at(layer) for layer in config.layers]
    widths = [layer.intermediate_size for layer in sized]
    if not config.has_mlp:
        widths = [width if one.mixer == MLP else 0 for width, one in zip(widths, config.layers, strict=True)]
    if config.mixture is not None and config.mixture.with_mlp:
        writer.add_expert_shared_feed_forward_length(_once(widths))
        widths = [config.mixture.width]
    writer.add_feed_forward_length(_once(widths))
    writer.add_head_count(config.num_heads)
    attends = [layer.mixer in (ATTENTION, ATTENTION_AND_SSM) for layer in config.layers]
    kv_heads = [layer.num_key_value_heads for layer in sized]
    if config.short_conv is not None or config.ssm is not None:
        kv_heads = [heads if here else 0 for heads, here in zip(kv_heads, attends, strict=True)]
    # llama.cpp reads a list of LFM2 also if all its layers have attention.
    writer.add_head_count_kv(kv_heads if config.short_conv is not None else _once(kv_heads))
    if config.short_conv is not None:
        writer.add_shortconv_l_cache(config.short_conv.taps)
    if config.rotary or config.ssm is not None:
        head_dim = _full_head_dim(config)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.rotary:
        writer.add_rope_dimension_count(config.rotary[_full_rotary(config)].features or head_dim)
        _add_rotary(writer, config)
    add_eps = writer.add_layer_norm_eps if config.norm == "layer" else writer.add_layer_norm_rms_eps
    add_eps(config.norm_eps)
    if writer.arch == "nemotron_h":
        writer.add_layer_norm_eps(config.norm_eps)  # llama.cpp requires both
    writer.add_vocab_size(config.vocab_size)
    if config.inputs is not None:
        writer.add_causal_attention(False)
        writer.add_token_type_count(max(1, config.inputs.types))
    if config.mixture is not None:
        writer.add_expert_count(config.mixture.experts)
        writer.add_expert_used_count(config.mixture.chosen)
    if config.mixture is not None and writer.arch in ("qwen3moe", "gpt-oss"):
        writer.add_expert_feed_forward_length(config.mixture.width)
    if writer.arch in ("granite", GRANITE_HYBRID):
        writer.add_attention_scale(config.attention_scaling)
        writer.add_embedding_scale(config.embedding_scaling)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(1 / config.logits.scaling)
    if config.ssm is not None:
        _add_mamba(writer, config)
    if config.delta is not None:
        _add_delta(writer, config, source.config)
    if writer.arch == "gemma4":
        _add_gemma4(writer, config)
    if config.query_scaling is not None:
        writer.add_attn_temperature_scale(config.query_scaling.beta)
    windows = {layer.window for layer in config.layers if layer.window is not None}
    if windows and writer.arch == "modern-bert":
        writer.add_sliding_window(2 * (max(windows) - 1))  # both sides together
        writer.add_sliding_window_pattern(full_attention_interval(config))
    elif windows:
        writer.add_sliding_window(max(windows))
    if writer.arch == "gemma2" and config.attention_cap is not None and config.logits.cap is not None:
        writer.add_attn_logit_softcapping(config.attention_cap)
        writer.add_final_logit_softcapping(config.logits.cap)
    # In other architectures all layers slide, or the architecture determines which.
    if windows and writer.arch in ("gemma3", "olmo2", "exaone4"):
        writer.add_sliding_window_pattern([layer.window is not None for layer in config.layers])
    return add_vocabulary(writer, source.tokenizer(), config.vocab_size, str(source.path))


def _once(numbers: list[int]) -> int | list[int]:
    """Return a list with a number per layer, or the number if all are equal."""
    return numbers if len({*numbers}) > 1 else numbers[0]


def _add_gemma4(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    """Add the second head size, sliding and sharing layers, and sizes of the per-layer embeddings.

    llama.cpp requires all of them, also if no layer slides; the window is then the whole context.
    """
    slides = [layer.window is not None for layer in config.layers]
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_rope_dimension_count_swa(config.head_dim)
    if not any(slides):
        writer.add_sliding_window(config.max_position_embeddings)
    writer.add_sliding_window_pattern(slides)
    writer.add_shared_kv_layers(sum(layer.kv_source is not None for layer in config.layers))
    writer.add_embedding_length_per_layer_input(0 if config.per_layer is None else config.per_layer.width)
    writer.add_final_logit_softcapping(config.logits.cap or 0.0)  # llama.cpp's default is a cap of 30


def _add_mamba(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    sizes = not_none(config.ssm)
    writer.add_ssm_conv_kernel(sizes.taps)
    writer.add_ssm_state_size(sizes.state_width)
    writer.add_ssm_group_count(sizes.groups)
    writer.add_ssm_time_step_rank(sizes.heads)
    writer.add_ssm_inner_size(sizes.width)
    if writer.arch == GRANITE_HYBRID:
        writer.add_rope_scaling_finetuned(any(layer.rotary is not None for layer in config.layers))


def _add_delta(writer: gguf.GGUFWriter, config: DecoderConfig, stated: Mapping[str, Any]) -> None:
    """Add sizes of the delta rule, its layers, and the sections of the rotary features for images."""
    sizes = not_none(config.delta)
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
    """Return the numbers of rotary pairs for time, height and width: as in the config, else thirds.

    For text, all three positions are equal. Remaining pairs would use a fourth position, which is 0 for text.
    """
    pairs = (config.rotary[_full_rotary(config)].features or config.head_dim) // 2
    rule = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    sections = rule.get("mrope_section")
    if isinstance(sections, list | tuple) and len(sections) == 3 and sum(sections) == pairs:
        return [int(section) for section in sections]
    return [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3]


def rope_factors(config: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Return divisors of the frequencies, (rotary features / 2,) float32 by tensor name, if the config lists them."""
    parsed = decoder_config(config)
    if not parsed.rotary:
        return {}
    rotary = parsed.rotary[_full_rotary(parsed)]
    scaling = dict(rotary.scaling or ())
    if gguf_architecture(config) == "gemma4":
        frequencies = inverse_frequencies(rotary, _full_head_dim(parsed))
        turning = int(frequencies.count_nonzero())
        factor = scaling.get("factor", 1.0) if scaling.get("rope_type") == "proportional" else 1.0
        return {
            ROPE_FACTORS: np.array([factor] * turning + [NO_ROTATION] * (len(frequencies) - turning), dtype=np.float32)
        }
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
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
            attention_factor = rotary.attention_factor / yarn_length(factor)
            if not math.isclose(attention_factor, 1.0, rel_tol=1e-9):
                writer.add_rope_scaling_attn_factors(attention_factor)
    if writer.arch == "phi3" and scaling.get("rope_type") == "longrope":
        # The original length is not read if there is only one list of factors.
        writer.add_rope_scaling_orig_ctx_len(rotary.longest_short or config.max_position_embeddings)
        writer.add_rope_scaling_attn_factors(rotary.attention_factor)
    for index, local in enumerate(config.rotary):
        if index != full:
            writer.add_rope_freq_base_swa(local.theta)


def _full_rotary(config: DecoderConfig) -> int:
    """Return the index of the rotary angles of layers with full attention, or of the only angles."""
    full = (layer.rotary for layer in config.layers if layer.window is None and layer.rotary is not None)
    return next(full, config.layers[0].rotary or 0)


def _full_head_dim(config: DecoderConfig) -> int:
    """Return the head size of layers with full attention, which in Gemma 4 differs from that of sliding layers."""
    return config.rotary_dims[_full_rotary(config)] if config.rotary else config.head_dim


# A BPE tokenizer as a GGUF file's vocabulary: byte-level, or of characters with ▁ for a space, as Gemma's.
#
# The patterns by which a byte-level tokenizer splits text are identified by a name under tokenizer.ggml.pre. It is
# found by comparing the tokenizer's patterns with those of the known names. Any other patterns are refused: a wrong
# name silently gives other token ids. Text for the second kind is split at line ends by llama.cpp, and not by the
# tokenizer. The result is the same if no token contains line ends and other characters. SentencePiece vocabularies
# with a space in front have scores, which a fast tokenizer's file lacks.


_NORMALIZERS = (None, {"type": "NFC"})
_DIGITS = r"\p{N}"
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
_NO_CUTS = (
    None,
    {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    {"type": "Split", "pattern": {"Regex": LINE_PATTERN}, "behavior": "Isolated", "invert": False},
)
"""Pre-tokenizers without an effect on text without spaces, given the tokens' characters."""
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_ALWAYS_SHOWN = (
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    '<|"|>',
)
"""Gemma 4's tokens that llama.cpp's chat must see in an answer; its converter therefore does not mark them as control
tokens."""


def add_vocabulary(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int, where: str
) -> list[str]:
    """Add tokens and their types, merges, special ids, tokens around a text, and the chat template.

    Args:
        vocab_size: rows of the embedding; rows without a token get one that is marked unused.

    Returns:
        added tokens after the last row, which the model cannot read. The file leaves them out, since llama.cpp refuses
        files with more tokens than rows.

    Raises:
        ArtifactError: if the kind of tokenizer is not supported, its patterns have no known name, or it has more other
            tokens than there are rows.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    spaced, pieces = _is_spaced(described), _is_word_piece(described)
    pre = None if spaced or pieces else _pre_tokenizer_name(described)
    if not spaced and not pieces and pre is None:
        raise ArtifactError(
            "its tokenizer cannot be written into a GGUF file here",
            where=where,
            why="supported are byte-level BPE tokenizers whose patterns have a known name, Gemma's, and WordPiece of "
            "lower-case text",
            next_step="merge into a Hugging Face directory, and run llama.cpp's convert_hf_to_gguf.py on it",
        )
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = dict(tokenizer.added_tokens_decoder)
    without_row = sorted(index for index in by_id if index >= vocab_size)
    if any(index not in added or index == tokenizer.eos_token_id for index in without_row):
        raise ArtifactError(
            f"its tokenizer has tokens up to id {without_row[-1]}, and the model has {vocab_size} rows for them",
            where=where,
            why="only added tokens that do not end a text can be left out of a GGUF file",
            next_step="use the tokenizer that belongs to the model",
        )
    writer.add_tokenizer_model(BERT_KIND if pieces else GEMMA4_KIND if pre is None else "gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    elif not pieces:
        writer.add_add_space_prefix(False)
    types = [_token_type(index, by_id, added, spaced) for index in range(vocab_size)]
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    if pieces:
        ours = zip(tokens, types, strict=True)
        tokens = [token if kind == gguf.TokenType.CONTROL else stored_piece(token) for token, kind in ours]
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = described["model"].get("merges")
    if merges:  # an empty list has no item type
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    # Encoders call the tokens around a text CLS and SEP.
    first = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    last = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    for add, index in (
        (writer.add_bos_token_id, first),
        (writer.add_eos_token_id, last),
        (writer.add_sep_token_id, tokenizer.sep_token_id),
        (writer.add_mask_token_id, tokenizer.mask_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None and index < vocab_size:
            add(index)
    around = list(tokenizer("a")["input_ids"])
    writer.add_add_bos_token(bool(around) and around[0] == first)
    writer.add_add_eos_token(bool(around) and around[-1] == last)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return [by_id[index] for index in without_row]


def _token_type(index: int, by_id: dict[int, str], added: dict[int, Any], spaced: bool) -> gguf.TokenType:
    if index not in by_id:
        return gguf.TokenType.UNUSED
    if spaced and by_id[index] in _BYTES:
        return gguf.TokenType.BYTE
    if spaced and by_id[index] in _ALWAYS_SHOWN:
        return gguf.TokenType.USER_DEFINED
    if index not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED


def _is_spaced(described: dict[str, Any]) -> bool:
    """Return True if the tokenizer is of the kind that llama.cpp calls gemma4."""
    model = described["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or model.get("ignore_merges"):
        return False
    if described.get("normalizer") != _SPACES or described.get("pre_tokenizer") not in _NO_CUTS:
        return False
    made = ("".join(merge) if not isinstance(merge, str) else merge.replace(" ", "") for merge in model["merges"])
    return set(_BYTES) <= model["vocab"].keys() and not any(re.search(r"\n[^\n]|[^\n]\n", token) for token in made)


def _is_word_piece(described: dict[str, Any]) -> bool:
    """Return True if the tokenizer is of the kind that llama.cpp calls bert."""
    model, normalizer = described["model"], described.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("strip_accents") is True:
        normalizer = {**normalizer, "strip_accents": None}  # null means: as `lowercase` says
    return bool(
        model.get("type") == "WordPiece"
        and model.get("continuing_subword_prefix") == CONTINUING
        and normalizer == BERT_NORMALIZER
        and described.get("pre_tokenizer") == {"type": "BertPreTokenizer"}
    )


def _pre_tokenizer_name(described: dict[str, Any]) -> str | None:
    model = described["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or described.get("normalizer") not in _NORMALIZERS:
        return None
    wanted = _patterns(described.get("pre_tokenizer")), bool(model.get("ignore_merges"))
    return next(
        (name for name, known in PRE_TOKENIZERS.items() if (known.patterns, known.ignore_merges) == wanted), None
    )


def _patterns(step: Any) -> tuple[str, ...] | None:
    """Return the patterns of a pre-tokenizer in their order, or None if it has another kind of step."""
    steps = step["pretokenizers"] if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
    patterns: list[str] = []
    byte_level = False
    for part in steps:
        match part:
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(_DIGITS)
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}:
                patterns.append(regex)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                byte_level = True
                if part.get("use_regex"):
                    patterns.extend(PRE_TOKENIZERS["gpt-2"].patterns)
            case _:
                return None
    return tuple(patterns) if byte_level else None
