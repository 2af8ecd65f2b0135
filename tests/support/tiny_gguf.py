"""Tiny GGUF files from tiny transformers models, as llama.cpp's own converter would write them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as StorageType
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.support.llama_cpp import quantized_rows
from tests.support.tiny_gemma4 import NAMES, SCALAR, add_gemma4, gemma4_frequencies
from tests.support.tiny_models import expert_count
from tests.support.tiny_tokenizer import tiny_tokenizer

_ARCHITECTURE = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_5_text": "qwen35",
    "qwen3_moe": "qwen3moe",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "exaone4": "exaone4",
    "ministral3": "mistral3",
    "phi3": "phi3",
    "glm": "chatglm",
    "glm4": "glm4",
    "gpt_oss": "gpt-oss",
    "granite": "granite",
    "granitemoehybrid": "granite",
    "bamba": "granitehybrid",
    "falcon_h1": "falcon-h1",
    "nemotron_h": "nemotron_h",
    "lfm2": "lfm2",
    "smollm3": "smollm3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
}

_INTERLEAVED = ("llama", "mistral", "mixtral", "ministral3", "granite", "granitemoehybrid", "smollm3", "nemotron_h")

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
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "model.embedding_norm": "token_embd_norm",
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "self_attn.out_proj": "attn_output",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    "shared_mlp.output_linear": "ffn_down",
    "block_sparse_moe.router": "ffn_gate_inp",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "model.final_layernorm": "output_norm",
    "model.embeddings": "token_embd",
    "model.norm_f": "output_norm",
    "norm": "attn_norm",
    **{f"mixer.{ours}_proj": f"attn_{stored}" for ours, stored in zip("qkvo", ("q", "k", "v", "output"), strict=True)},
    "mixer.up_proj": "ffn_up",
    "mixer.down_proj": "ffn_down",
    **{
        f"{path}.{ours}": stored
        for path in ("mamba", "mixer")
        for ours, stored in (
            ("in_proj", "ssm_in"),
            ("conv1d", "ssm_conv1d"),
            ("norm", "ssm_norm"),
            ("out_proj", "ssm_out"),
        )
    },
}
_QWEN35 = {
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
_WHOLE = {
    "A_log": "ssm_a",
    "D": "ssm_d",
    "dt_bias": "ssm_dt.bias",
    "layer_scalar": SCALAR,
    "sinks": "attn_sinks.weight",
}
_GLM4_NORMS = {
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}
_NORMS = {"post_attention_layernorm": "ffn_norm", "pre_ff_layernorm": "ffn_norm"}
_NORMS_AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_GEMMA_NORMS = _NORMS_AFTER | {"pre_feedforward_layernorm": "ffn_norm"}

_DOWN = ("down_proj.weight", "feed_forward.w2.weight", "output_linear.weight")
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5


def write_tiny_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    storage: StorageType | Callable[[str], StorageType] = StorageType.F32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    pre: str = "gpt-2",
    parts: int = 1,
    extra: dict[str, Any] | None = None,
    without: Collection[str] = (),
) -> Path:
    """Write a model with a byte-level tokenizer.

    Args:
        model: a tiny model; a tied head is left out, as converters do.
        path: where the file goes; with several parts, the stem before `-00001-of-0000N.gguf`.
        storage: of the matrices, perhaps by a tensor's name; vectors and routers are always F32.
        tokenizer: a byte-level one; the tiny one if not given.
        pre: the name of its pre-tokenizer.
        parts: files to spread the tensors over.
        extra: further metadata, e.g. {"llama.expert_count": 8}; integers are 32-bit and unsigned, floats 32-bit.
        without: keys to leave out.

    Returns:
        the path, of the first part if there are several.
    """
    writer = _writer(model, path, parts)
    add_byte_level_tokenizer(writer, tokenizer or tiny_tokenizer(), model.config.vocab_size, pre)
    for key, value in (extra or {}).items():
        if isinstance(value, bool | str | list):
            (writer.add_bool if isinstance(value, bool) else _adder(writer, value))(key, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for shard in writer.kv_data:
        for key in without:
            shard.pop(key, None)
    for name, values in tiny_gguf_tensors(model).items():
        plain = (
            values.ndim == 1
            or name.endswith(".bias")
            or any(part in name for part in ("conv.conv", "conv1d", "ffn_gate_inp", "ssm_a", "ssm_d", "ssm_norm"))
        )
        stored = StorageType.F32 if plain else storage(name) if callable(storage) else storage
        if stored == StorageType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, _quantized(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05d}.gguf")


def write_tiny_gguf_with_prediction(model: PreTrainedModel, path: Path) -> Path:
    """A file of architecture qwen35 with one block more, which predicts further tokens, as converters write it."""
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    last, more = f"blk.{layers - 1}.", f"blk.{layers}."
    plain = write_tiny_gguf(model, path.with_name("plain.gguf"), extra={"qwen35.nextn_predict_layers": 1})
    one_more = {
        tensor.name.replace(last, more): np.array(tensor.data)
        for tensor in gguf.GGUFReader(plain).tensors
        if tensor.name.startswith(last)
    }
    for name, shape in (("eh_proj", (hidden, 2 * hidden)), ("enorm", (hidden,)), ("hnorm", (hidden,))):
        one_more[f"{more}nextn.{name}.weight"] = np.ones(shape, dtype=np.float32)
    return rewritten(plain, path, changed={"qwen35.block_count": layers + 1}, tensors=one_more)


def rewritten(
    original: Path,
    path: Path,
    *,
    changed: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any] | None] | None = None,
) -> Path:
    """A file of float32 tensors with other values of metadata, and tensors more, others, or, where None, fewer."""
    plain, changed, tensors = gguf.GGUFReader(original), changed or {}, tensors or {}
    writer = gguf.GGUFWriter(path, plain.fields["general.architecture"].contents())
    for name, field in plain.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = changed.get(name, field.contents())
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    there = {tensor.name: tensor.data for tensor in plain.tensors}
    for name, data in (there | tensors).items():
        if data is not None:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _adder(writer: gguf.GGUFWriter, value: str | list[Any]) -> Callable[[str, Any], None]:
    return writer.add_string if isinstance(value, str) else writer.add_array


def _quantized(values: np.ndarray[Any, Any], kind: StorageType) -> np.ndarray[Any, Any]:
    """By the gguf package where it can, else by llama.cpp; equal rows once, and a tensor that models share."""
    key = kind, values.dtype, values.shape, hashlib.sha256(values.tobytes()).digest()
    if key not in _blocks:
        rows = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
        whole = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
        _, first, place = np.unique(whole, return_index=True, return_inverse=True)
        try:
            blocks = gguf.quants.quantize(rows[first], kind)
        except NotImplementedError:
            blocks = quantized_rows(rows[first], kind)
        _blocks[key] = blocks[place].reshape(*values.shape[:-1], -1)
        _blocks[key].setflags(write=False)
    return _blocks[key]


_blocks: dict[tuple[Any, ...], np.ndarray[Any, Any]] = {}


def _writer(model: PreTrainedModel, path: Path, parts: int) -> gguf.GGUFWriter:
    config = _readable(model.config)
    tensors = len(tiny_gguf_tensors(model))
    both = getattr(config, "use_bidirectional_attention", False)
    architecture = "gemma-embedding" if both else _ARCHITECTURE[config.model_type]
    if config.model_type == "granitemoehybrid" and _has_mamba(config):
        architecture = "granitehybrid"
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=-(-tensors // parts) if parts > 1 else 0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    # What is stored: LFM2 makes another width of what its config says.
    widths = (tensor.shape[1] for name, tensor in model.named_parameters() if name.endswith(_DOWN))
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gemma4_text":
        add_gemma4(writer, config)
    else:
        width = next(widths, config.intermediate_size)
        if config.model_type == "granitemoehybrid" and config.num_local_experts:
            writer.add_expert_shared_feed_forward_length(width)
            width = config.intermediate_size
        nemotron = config.model_type == "nemotron_h"
        by_layer = [width * (kind == "mlp") for kind in config.layers_block_type] if nemotron else width
        writer.add_feed_forward_length(by_layer)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        if not nemotron:
            writer.add_rope_dimension_count(int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)))
    if config.model_type == "lfm2":
        convolved = [kind == "conv" for kind in config.layer_types]
        writer.add_head_count_kv([0 if here else config.num_key_value_heads for here in convolved])
        writer.add_shortconv_l_cache(config.conv_L_cache)
    elif _has_mamba(config):
        _add_mamba(writer, config)
    elif config.model_type != "gemma4_text":
        writer.add_head_count_kv(config.num_key_value_heads)
    eps = {"lfm2": "norm_eps", "nemotron_h": "layer_norm_epsilon"}.get(config.model_type, "rms_norm_eps")
    writer.add_layer_norm_rms_eps(getattr(config, eps))
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "nemotron_h":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return writer
    rotary = config.rope_parameters
    if config.model_type in ("granitemoehybrid", "bamba"):
        writer.add_rope_scaling_finetuned(getattr(config, "position_embedding_type", "rope") == "rope")
    if config.model_type.startswith("granite"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "qwen3_5_text":
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
        recurrent = [kind == "linear_attention" for kind in config.layer_types]
        if recurrent == [bool((index + 1) % 4) for index in range(len(recurrent))]:
            writer.add_full_attention_interval(4)
        else:
            writer.add_array("qwen35.attention.recurrent_layers", recurrent)
        pairs = int(head_dim * config.rope_parameters["partial_rotary_factor"]) // 2
        writer.add_rope_dimension_sections([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3, 0])
    if expert_count(config):
        writer.add_expert_count(expert_count(config))
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type in ("qwen3_moe", "gpt_oss"):
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if config.model_type == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type in ("gemma3_text", "olmo3", "exaone4") and config.sliding_window is not None:
        # transformers halves the window of EmbeddingGemma when it reads the config
        writer.add_sliding_window((config.sliding_window - 1) * 2 if both else config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if "sliding_attention" in rotary:
        writer.add_rope_freq_base_swa(rotary["sliding_attention"]["rope_theta"])
        rotary = rotary["full_attention"]
    if config.model_type == "ministral3":
        writer.add_attn_temperature_scale(rotary["llama_4_scaling_beta"])
        writer.add_rope_scaling_yarn_log_mul(rotary["mscale_all_dim"])
    if config.model_type == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if rotary.get("rope_type") == "longrope":
        scale = config.max_position_embeddings / config.original_max_position_embeddings
        lengthened = math.sqrt(1 + math.log(scale) / math.log(config.original_max_position_embeddings))
        writer.add_rope_scaling_attn_factors(lengthened)
    writer.add_rope_freq_base(rotary["rope_theta"])
    if rotary["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotary["factor"])
    if rotary["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rotary["factor"])
        writer.add_rope_scaling_orig_ctx_len(rotary["original_max_position_embeddings"])
        if rotary.get("attention_factor") is not None:  # what llama.cpp multiplies its own factor by
            writer.add_rope_scaling_attn_factors(rotary["attention_factor"] / (0.1 * math.log(rotary["factor"]) + 1))
    return writer


def _has_mamba(config: Any) -> bool:
    return config.model_type in ("bamba", "falcon_h1", "nemotron_h") or "linear_attention" in (
        getattr(config, "layer_types", None) or () if config.model_type == "granitemoehybrid" else ()
    )


def _add_mamba(writer: gguf.GGUFWriter, config: Any) -> None:
    """Sizes of Mamba-2, by each family's own names, and the layers with attention."""
    old = config.model_type == "nemotron_h"
    heads = config.mamba_num_heads if old else config.mamba_n_heads
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * (config.mamba_head_dim if old else config.mamba_d_head))
    writer.add_ssm_group_count(config.n_groups if old else config.mamba_n_groups)
    writer.add_ssm_state_size(config.ssm_state_size if old else config.mamba_d_state)
    writer.add_ssm_conv_kernel(config.conv_kernel if old else config.mamba_d_conv)
    if config.model_type == "falcon_h1":
        writer.add_head_count_kv(config.num_key_value_heads)
    else:
        attends = [kind == "full_attention" for kind in config.layer_types]
        writer.add_head_count_kv([config.num_key_value_heads * here for here in attends])


def _of_mamba(values: np.ndarray[Any, Any], config: Any, name: str) -> np.ndarray[Any, Any]:
    """Convert a tensor of Mamba-2: rates for their logarithms, columns, and a row of the norm for each group."""
    if name.endswith("A_log"):
        values = -np.exp(values)
    if name.endswith(("A_log", ".D")):
        return values[:, None]
    if name.endswith("conv1d.weight"):
        return values.squeeze(1)
    groups = config.n_groups if config.model_type == "nemotron_h" else config.mamba_n_groups
    return values.reshape(groups, -1) if name.endswith(("mamba.norm.weight", "mixer.norm.weight")) else values


def _multiplied(values: np.ndarray[Any, Any], config: Any, module: str) -> np.ndarray[Any, Any]:
    """Falcon-H1's weights with its multipliers in them."""
    attention, (gate, down) = config.attention_in_multiplier, config.mlp_multipliers
    shared = config.mamba_n_groups * config.mamba_d_state
    rows = (config.mamba_d_ssm, config.mamba_d_ssm, shared, shared, config.mamba_n_heads)
    of_module = {
        "q_proj": attention,
        "k_proj": attention * config.key_multiplier,
        "v_proj": attention,
        "o_proj": config.attention_out_multiplier,
        "gate_proj": gate,
        "down_proj": down,
        "out_proj": config.ssm_out_multiplier,
        "in_proj": config.ssm_in_multiplier * np.repeat(config.ssm_multipliers, rows)[:, None],
        "embed_tokens": config.embedding_multiplier,
        "lm_head": config.lm_head_multiplier,
    }
    return np.asarray(values * of_module.get(module.rpartition(".")[2], 1.0), dtype=np.float32)


def _readable(config: Any) -> Any:
    """Gemma 4's own lets nobody ask for a size that layers differ in."""
    return SimpleNamespace(**config.to_dict()) if config.model_type == "gemma4_text" else config


def tiny_gguf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors by GGUF name, in float32, laid out as in a file."""
    config = _readable(model.config)
    norms = {
        "gemma": _GEMMA_NORMS,
        "olmo2": _NORMS_AFTER,
        "olmo3": _NORMS_AFTER,
        "exaon": _NORMS_AFTER,
        "gemma4_text": NAMES,
        "glm4": _GLM4_NORMS,
        "gpt_oss": {"post_attention_layernorm": "post_attention_norm"},
        "qwen3_5_text": _QWEN35 | {"post_attention_layernorm": "post_attention_norm"},
    }
    names = _MODULES | norms.get(config.model_type, norms.get(config.model_type[:5], _NORMS))
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".experts." in name:
            of_gpt_oss = config.model_type == "gpt_oss"
            tensors |= (_of_gpt_oss if of_gpt_oss else _of_experts)(name, tensor.detach().float())
            continue
        block, inside = "", name
        if name.startswith("model.layers."):
            _, _, layer, inside = name.split(".", 3)
            block = f"blk.{layer}."
        module, _, kind = inside.rpartition(".")
        values = tensor.detach().float().numpy()
        if config.model_type in _INTERLEAVED and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            values = interleaved(values, heads)
        if config.model_type == "bamba" and module.endswith(("q_proj", "k_proj")):
            values = interleaved_half(values, config.head_dim)
        if name.endswith("conv.conv.weight"):
            values = values.squeeze(1)
        if config.model_type in ("gemma2", "gemma3_text") and name.endswith("norm.weight"):
            values = values + 1
        if config.model_type == "qwen3_5_text":
            values = _of_qwen35(values, config, name)
        elif _has_mamba(config):
            values = _of_mamba(values, config, name)
        if config.model_type == "falcon_h1":
            values = _multiplied(values, config, module)
        shared = "_shexp" if config.model_type == "granitemoehybrid" and config.num_local_experts else ""
        if module == "shared_mlp.input_linear":  # gate and up, each a tensor of its own there
            for part, half in zip(("ffn_gate", "ffn_up"), np.split(values, 2), strict=True):
                tensors[f"{block}{part}{shared}.weight"] = np.ascontiguousarray(half)
            continue
        stored = f"{block}{names[module]}.{kind}" if module in names else f"{block}{_WHOLE[kind]}"
        if module == "pre_ff_layernorm" and config.model_type == "falcon_h1":
            stored = f"{block}ffn_norm"
        if module == "shared_mlp.output_linear":
            stored = f"{block}ffn_down{shared}.weight"
        tensors[stored] = np.ascontiguousarray(values)
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _llama3_divisors(config.rope_parameters, config.head_dim)
    if config.model_type == "gemma4_text":
        tensors["rope_freqs.weight"] = gemma4_frequencies(config)
    if rotary.get("rope_type") == "longrope":
        for length in ("short", "long"):
            factors = np.array(config.rope_parameters[f"{length}_factor"], dtype=np.float32)
            tensors[f"rope_factors_{length}.weight"] = factors
    return tensors


def _of_qwen35(values: np.ndarray[Any, Any], config: Any, name: str) -> np.ndarray[Any, Any]:
    """Convert a tensor of Qwen3.5: rates for their logarithms, 1 + weight, value head i of all key heads together."""
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return values + 1
    if ".linear_attn." not in name or name.endswith("norm.weight"):
        return values
    if name.endswith("A_log"):
        values = -np.exp(values)
    if ".conv1d." in name:
        values = values.squeeze(1)
    if name.endswith("out_proj.weight"):
        return _together(values.T, config, config.linear_value_head_dim).T
    if ".in_proj_qkv." in name or ".conv1d." in name:
        keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        return np.concatenate([values[:keys], _together(values[keys:], config, config.linear_value_head_dim)])
    return _together(values, config, config.linear_value_head_dim if ".in_proj_z." in name else 1)


def _together(values: np.ndarray[Any, Any], config: Any, width: int) -> np.ndarray[Any, Any]:
    heads = values.reshape(config.linear_num_key_heads, -1, width, *values.shape[1:])
    return heads.swapaxes(0, 1).reshape(values.shape)


def _of_experts(name: str, stack: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """A parameter of experts, gate and up apart."""
    block = f"blk.{name.split('.')[2]}."
    if name.endswith("down_proj"):
        return {f"{block}ffn_down_exps.weight": stack.numpy()}
    gate, up = (part.contiguous().numpy() for part in stack.chunk(2, dim=1))
    return {f"{block}ffn_gate_exps.weight": gate, f"{block}ffn_up_exps.weight": up}


def _of_gpt_oss(name: str, stack: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """A parameter of experts or their biases, where gate's and up's outputs take turns and matrices are transposed."""
    block, kind = f"blk.{name.split('.')[2]}.", "bias" if name.endswith("_bias") else "weight"
    stack = stack if kind == "bias" else stack.mT
    if "down_proj" in name:
        return {f"{block}ffn_down_exps.{kind}": stack.contiguous().numpy()}
    gate, up = (stack[:, first::2].contiguous().numpy() for first in (0, 1))
    return {f"{block}ffn_gate_exps.{kind}": gate, f"{block}ffn_up_exps.{kind}": up}


def interleaved(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows (head, half, pair) as (head, pair, half), which is how ggml rotates them."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def interleaved_half(values: np.ndarray[Any, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """Rows with the first half of each head, which rotates, interleaved, and the other half as it was."""
    turning, others = np.split(values.reshape(-1, head_dim, *values.shape[1:]), 2, axis=1)
    pairs = interleaved(turning.reshape(-1, *values.shape[1:]), len(turning)).reshape(turning.shape)
    return np.concatenate([pairs, others], axis=1).reshape(values.shape)


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
