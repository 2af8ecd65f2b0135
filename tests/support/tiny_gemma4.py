"""The fields of a tiny Gemma 4's GGUF file in addition to those of every file, as llama.cpp's converter writes it."""

from __future__ import annotations

import json
import re
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedTokenizerFast

NAMES = {
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
}
SCALAR = "layer_output_scale.weight"
NO_ROTATION = 1e30
"""By this the frequencies of pairs that do not turn are divided."""


def add_gemma4(writer: gguf.GGUFWriter, config: Any) -> None:
    """Both sizes of heads, both widths of MLPs, which layers slide and which share, and the inputs of layers.

    The converter writes no cap where there is none, and llama.cpp takes 30 then, which every released model has.
    """
    layers, shared = config.num_hidden_layers, config.num_kv_shared_layers
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    full = _of_full_layers(config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(slides)
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_key_length(full["head_dim"])
    writer.add_value_length(full["head_dim"])
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_rope_dimension_count(full["head_dim"])
    writer.add_rope_dimension_count_swa(config.head_dim)
    f, heads = config.intermediate_size, config.num_key_value_heads
    wide = [f if layer < layers - shared else 2 * f for layer in range(layers)]
    writer.add_feed_forward_length(wide if config.use_double_wide_mlp else f)
    own = full.get("num_key_value_heads")
    writer.add_head_count_kv(heads if own is None else [heads if here else own for here in slides])
    writer.add_final_logit_softcapping(config.final_logit_softcapping or 0.0)


def add_gemma4_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    """A vocabulary of the kind `gemma4`."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types([_type(token, special) for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)


def _type(token: str, special: set[str]) -> gguf.TokenType:
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return gguf.TokenType.BYTE
    return gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL


def gemma4_frequencies(config: Any) -> np.ndarray[Any, Any]:
    """What divides the frequencies of full attention."""
    size = _of_full_layers(config)["head_dim"]
    rule = config.rope_parameters["full_attention"]
    turning = int(size * rule["partial_rotary_factor"] / 2)
    factor = rule.get("factor", 1.0)
    return np.array([factor] * turning + [NO_ROTATION] * (size // 2 - turning), dtype=np.float32)


def _of_full_layers(config: Any) -> dict[str, int]:
    """What full layers have otherwise than sliding ones."""
    own: dict[str, int] = next(iter(getattr(config, "per_layer_config", {}).values()), {"head_dim": config.head_dim})
    return own
