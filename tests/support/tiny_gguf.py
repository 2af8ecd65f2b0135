"""Tiny GGUF files from tiny transformers models, as llama.cpp's own converter would write them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as StorageType
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from support.tiny_tokenizer import tiny_tokenizer

_ARCHITECTURE = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}

_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {"post_attention_layernorm": "ffn_norm"}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

_NORMAL, _CONTROL, _UNUSED = 1, 3, 5


def write_tiny_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    storage: StorageType = StorageType.F32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    pre: str = "gpt-2",
    parts: int = 1,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a model with a byte-level tokenizer.

    Args:
        model: a tiny model; a tied head is left out, as converters do.
        path: where the file goes; with several parts, the stem before `-00001-of-0000N.gguf`.
        storage: of the matrices; vectors are always F32.
        tokenizer: a byte-level one; the tiny one if not given.
        pre: the name of its pre-tokenizer.
        parts: files to spread the tensors over.
        extra: further integer metadata, e.g. {"llama.expert_count": 8}.

    Returns:
        the path, of the first part if there are several.
    """
    writer = _writer(model, path, parts)
    add_byte_level_tokenizer(writer, tokenizer or tiny_tokenizer(), model.config.vocab_size, pre)
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value)
    for name, values in tiny_gguf_tensors(model).items():
        stored = StorageType.F32 if values.ndim == 1 else storage
        if stored == StorageType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05d}.gguf")


def _writer(model: PreTrainedModel, path: Path, parts: int) -> gguf.GGUFWriter:
    config = model.config
    tensors = len(tiny_gguf_tensors(model))
    writer = gguf.GGUFWriter(
        path, _ARCHITECTURE[config.model_type], split_max_tensors=-(-tensors // parts) if parts > 1 else 0
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rotary = config.rope_parameters
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(rotary["sliding_attention"]["rope_theta"])
        rotary = rotary["full_attention"]
    writer.add_rope_freq_base(rotary["rope_theta"])
    if rotary["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotary["factor"])
    return writer


def tiny_gguf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors by GGUF name, in float32, laid out as in a file."""
    config = model.config
    names = _MODULES | (_GEMMA_NORMS if config.model_type == "gemma3_text" else _NORMS)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, kind = name.rsplit(".", 1)
        block = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            block = f"blk.{layer}."
        values = tensor.detach().float().numpy()
        if config.model_type in ("llama", "mistral") and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            values = _interleaved(values, heads)
        if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            values = values + 1
        tensors[f"{block}{names[module]}.{kind}"] = np.ascontiguousarray(values)
    if config.model_type == "llama" and config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = _llama3_divisors(config.rope_parameters, config.head_dim)
    return tensors


def _interleaved(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows (head, half, pair) as (head, pair, half), which is how ggml rotates them."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _llama3_divisors(rule: dict[str, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """Scalar by scalar, in double precision, as the converter computes them."""
    length, low, high = rule["original_max_position_embeddings"], rule["low_freq_factor"], rule["high_freq_factor"]
    divisors = []
    for even in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rule["rope_theta"] ** (even / head_dim)
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(rule["factor"])
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rule["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def add_byte_level_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int, pre: str
) -> None:
    """The vocabulary, filled up with unused tokens to the rows of the embedding, merges, special ids and template."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])]
    special = set(tokenizer.all_special_tokens)
    types = [_CONTROL if token in special else _NORMAL for token in tokens]
    unused = vocab_size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + [f"[PAD{index}]" for index in range(unused)])
    writer.add_token_types(types + [_UNUSED] * unused)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def add_sentencepiece_tokenizer(
    writer: gguf.GGUFWriter, pieces: Sequence[tuple[str, float, int]], *, space_prefix: bool, add_bos: bool
) -> None:
    """A `llama` vocabulary of (piece, score, type), unknown, bos and eos first, as sentencepiece numbers them."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_add_space_prefix(space_prefix)


def write_vocabulary_gguf(path: Path, vocab_size: int, add_tokenizer: Any) -> Path:
    """A one-layer llama of random weights around any tokenizer, small enough for vocabularies of tens of thousands.

    Args:
        path: where the file goes.
        vocab_size: tokens in the vocabulary.
        add_tokenizer: called with the writer.
    """
    hidden, ffn = 32, 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(vocab_size)
    add_tokenizer(writer)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "token_embd": (vocab_size, hidden),
        "output_norm": (hidden,),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (16, hidden),
        "blk.0.attn_v": (16, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (ffn, hidden),
        "blk.0.ffn_up": (ffn, hidden),
        "blk.0.ffn_down": (hidden, ffn),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
