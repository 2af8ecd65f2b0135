"""Tiny random transformers models of every family the decoder engine knows, for parity tests.

No two sizes alike, fewer key/value heads than heads, heads × head_dim ≠ hidden, every norm weight and bias random, and
windows and original rope lengths short enough for a test's document to be longer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from tests.support.tiny_tokenizer import tiny_tokenizer

VOCAB_SIZE = 307
WINDOW = 8
"""Keys a query sees in a sliding layer, itself among them."""
ORIGINAL_LENGTH = 16
"""The original rope length of the variants with Llama 3's rule and with yarn."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 60,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}

_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}

_PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.6}

# Its class takes hidden / heads for head_dim where it looks at the lists of factors.
_PHI3_SIZES = {"hidden_size": 84, "head_dim": None}

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.6,  # eight features of fourteen
    "short_factor": [1.1, 1.3, 2.0, 1.7],
    "long_factor": [1.6, 4.0, 3.0, 7.0],
}

# More experts than a short document has tokens for, each narrower than the hidden size; torch's product of groups wants
# rows of 16 bytes.
_EXPERTS: dict[str, Any] = {"num_experts": 11, "num_experts_per_tok": 3, "moe_intermediate_size": 36}

_GRANITE4: dict[str, Any] = {
    "intermediate_size": 31,  # of experts, of which there are none
    "shared_intermediate_size": 76,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "layer_types": ["full_attention"] * 5,
    "mamba_n_heads": 4,
    "attention_multiplier": 0.37,
    "embedding_multiplier": 3.125,  # a float32 number, since the engine rounds it to one
    "residual_multiplier": 0.22,
    "logits_scaling": 1.7,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}

_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 6,
    "mamba_d_head": 20,
    "mamba_d_state": 9,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
"""Mamba-2 whose chunks in transformers are shorter than a test's document."""

# The delta rule's norm divides by what a state of few tokens answers, which in narrow heads is often next to nothing:
# rounding is then enlarged in any program. With a small epsilon transformers' own float32 is 5e-5 from its float64,
# with 1e-2 up to 1.4e-5 on some processors.
_DELTA_EPS = 1e-1

_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "llama-tied": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "llama-biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "tinyllama": (
        "llama",
        # As TinyLlama has it: head_dim is hidden / heads, and not stated.
        {"head_dim": None, "num_key_value_heads": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "mistral": (
        "mistral",
        {"sliding_window": WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-window": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen3": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_EXPERTS,
            "num_hidden_layers": 4,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen3_moe-shares": (
        "qwen3_moe",
        {
            **_EXPERTS,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "mixtral": (
        "mixtral",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    # Bounds so narrow that some gates and ups exceed them.
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 11,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 4,
            "intermediate_size": 36,
            "sliding_window": WINDOW,
            "swiglu_limit": 1.3,
            "swiglu_alpha": 1.6,
            "rope_parameters": {**_YARN_ROPE, "rope_theta": 20.0, "truncate": False},
        },
    ),
    # Of a base so small that some frequencies stay, some are divided, and some lie between.
    "qwen3-yarn": ("qwen3", {"rope_parameters": {**_YARN_ROPE, "rope_theta": 20.0, "attention_factor": 1.37}}),
    "qwen3_5_text": (
        "qwen3_5_text",
        {
            "num_hidden_layers": 4,
            "rms_norm_eps": _DELTA_EPS,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 10,
            "linear_value_head_dim": 10,
            "linear_conv_kernel_dim": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.6},
        },
    ),
    "qwen3_5_text-tied": (
        "qwen3_5_text",
        {
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "rms_norm_eps": _DELTA_EPS,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 11,
            "linear_conv_kernel_dim": 3,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": _YARN_ROPE | {"partial_rotary_factor": 0.6, "rope_theta": 20.0},
        },
    ),
    "olmo2": (
        "olmo2",
        {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 5,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "full_attention": _YARN_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "exaone4": (
        "exaone4",
        {
            "num_hidden_layers": 5,
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "exaone4-full": (
        "exaone4",
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 3,
            "tie_word_embeddings": True,
            "rope_parameters": _LLAMA3_ROPE,
        },
    ),
    "phi3": ("phi3", {**_PHI3_SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "phi3-window": (
        "phi3",
        {
            **_PHI3_SIZES,
            "sliding_window": WINDOW,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": ORIGINAL_LENGTH,
            "rope_parameters": _LONGROPE,
        },
    ),
    "phi3-longrope": (
        "phi3",
        {
            **_PHI3_SIZES,
            "num_key_value_heads": 3,
            "original_max_position_embeddings": ORIGINAL_LENGTH,
            "rope_parameters": _LONGROPE,
        },
    ),
    "ministral3": (
        "ministral3",
        {
            "rope_parameters": {
                **_YARN_ROPE,
                "rope_theta": 20.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.3,
                "max_position_embeddings": 128,
            }
        },
    ),
    "glm": ("glm", {"attention_bias": False, "rope_parameters": _PARTIAL_ROPE}),
    "glm4": ("glm4", {"tie_word_embeddings": True, "rope_parameters": _PARTIAL_ROPE}),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.37,
            "embedding_multiplier": 3.125,  # a float32 number, since the engine rounds it to one
            "residual_multiplier": 0.22,
            "logits_scaling": 1.7,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "granitemoehybrid": ("granitemoehybrid", {**_GRANITE4, "position_embedding_type": "rope"}),
    "granite4-nope": ("granitemoehybrid", {**_GRANITE4, "attention_bias": True, "tie_word_embeddings": True}),
    "granite4-h": (
        "granitemoehybrid",
        {
            **_GRANITE4,
            **_MAMBA,
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "rms_norm_eps": _DELTA_EPS,
            "tie_word_embeddings": True,
        },
    ),
    "granite4-experts": (
        "granitemoehybrid",
        {
            **_GRANITE4,
            **_MAMBA,
            "intermediate_size": 36,
            "num_local_experts": 11,
            "num_experts_per_tok": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "rms_norm_eps": _DELTA_EPS,
        },
    ),
    "bamba": (
        "bamba",
        {
            **_MAMBA,
            "head_dim": 16,
            "attn_layer_indices": [1],
            "mamba_n_groups": 3,
            "mamba_proj_bias": True,
            "mamba_d_conv": 3,
            "rms_norm_eps": _DELTA_EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    # Token by token transformers has no limits.
    "bamba-steps": (
        "bamba",
        {
            **_MAMBA,
            "head_dim": 16,
            "attn_layer_indices": [0],
            "mamba_conv_bias": False,
            "mlp_bias": True,
            "time_step_limit": [0.5, 1.1],
            "rms_norm_eps": _DELTA_EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **_MAMBA,
            "mamba_d_ssm": 108,
            "mamba_d_head": 18,
            "embedding_multiplier": 3.125,
            "lm_head_multiplier": 0.6,
            "mlp_multipliers": [0.8, 1.3],
            "ssm_multipliers": [0.9, 1.2, 0.7, 1.4, 0.8],
            "key_multiplier": 0.7,
            "attention_in_multiplier": 1.2,
            "attention_out_multiplier": 0.9,
            "ssm_in_multiplier": 1.1,
            "ssm_out_multiplier": 0.75,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
            "mamba_num_heads": 6,
            "mamba_head_dim": 18,
            "ssm_state_size": 9,
            "n_groups": 2,
            "chunk_size": 16,
            "layer_norm_epsilon": _DELTA_EPS,
            "rms_norm_eps": None,
        },
    ),
    "nemotron-biases": (
        "nemotron_h",
        {
            "layers_block_type": ["mlp", "linear_attention", "full_attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 20,
            "ssm_state_size": 7,
            "n_groups": 1,
            "conv_kernel": 3,
            "chunk_size": 16,
            "use_bias": True,
            "mlp_bias": True,
            "use_conv_bias": False,
            "time_step_min": 0.5,
            "layer_norm_epsilon": _DELTA_EPS,
            "rms_norm_eps": None,
            "rescale_prenorm_residual": False,
        },
    ),
    "falcon-norm": (
        "falcon_h1",
        {
            **_MAMBA,
            "mamba_d_ssm": None,
            "mamba_n_groups": 2,
            "mamba_conv_bias": False,
            "mamba_rms_norm": True,
            "rms_norm_eps": _DELTA_EPS,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "lfm2": (
        "lfm2",
        {
            "num_hidden_layers": 4,
            "full_attn_idxs": [1],
            "norm_eps": 1e-5,
            "rms_norm_eps": None,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "lfm2-biases": (
        "lfm2",
        {
            "full_attn_idxs": [0, 2],
            "conv_bias": True,
            "conv_L_cache": 4,
            "norm_eps": 1e-5,
            "rms_norm_eps": None,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
            "rope_parameters": _LLAMA3_ROPE,
        },
    ),
    "smollm3": (
        "smollm3",
        {"num_hidden_layers": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "smollm3-window": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "no_rope_layers": [0, 1, 0],
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 23,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.5,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 23,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            "num_hidden_layers": 7,
            "layer_types": ["sliding_attention", "full_attention"] * 3 + ["full_attention"],
            "sliding_window": WINDOW,
            "global_head_dim": 18,
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
            # Wide enough for the norm after it: of 10, which a gated unit empties, it enlarges rounding fivefold.
            "hidden_size_per_layer_input": 26,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "final_logit_softcapping": 2.5,
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    # As the largest: no shared layers and no per-layer inputs, values made of keys.
    "gemma4-keys": (
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": WINDOW,
            "global_head_dim": 18,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 3,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}

GPT_OSS_OF_LLAMA_CPP: dict[str, Any] = {
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
    "rope_parameters": {**_YARN_ROPE, "rope_theta": 20.0},
}
"""A gpt-oss with the numbers that llama.cpp has in its code, and with yarn's range rounded outward."""

VARIANTS: tuple[str, ...] = tuple(_VARIANTS)
"""Every tiny model there is; a family may have several."""

FAMILIES: tuple[str, ...] = (
    "llama",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "olmo2",
    "olmo3",
    "exaone4",
    "ministral3",
    "phi3",
    "phi3-longrope",
    "glm",
    "glm4",
    "granite",
    "granitemoehybrid",
    "granite4-h",
    "bamba",
    "falcon_h1",
    "nemotron_h",
    "lfm2",
    "smollm3",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
)
"""One variant of each family, Llama also with Llama 3's rope scaling."""


def tiny_config(variant: str, **overrides: Any) -> PreTrainedConfig:
    """The transformers config of a variant; overrides replace its fields."""
    model_type, fields = _VARIANTS[variant]
    values = {**_SIZES, **fields, **overrides}
    values = {key: value for key, value in values.items() if value is not None or key not in _SIZES}
    if values.get("layer_types") is not None:
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    # transformers fills the nested rope dictionaries in place: give it its own.
    if "rope_parameters" in values:
        values["rope_parameters"] = _copy(values["rope_parameters"])
    return transformers.AutoConfig.for_model(model_type, **values)


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def tiny_model(
    variant: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str = "eager", **overrides: Any
) -> PreTrainedModel:
    """A random model in evaluation mode; the same variant, overrides and seed give the same weights in every dtype."""
    key = repr((variant, dtype, seed, attention, sorted(overrides.items())))
    if key in _made:
        return copy.deepcopy(_made[key])
    config = tiny_config(variant, **overrides)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # drawn or copied, it leaves the generator alone
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    randomise(model, seed=seed)
    model = model.to(dtype).eval()
    if dtype == torch.float64 and expert_count(config):
        model.set_experts_implementation("eager")  # the other forms have no float64
    if model.num_parameters() < _KEPT_PARAMETERS:
        _made[key] = copy.deepcopy(model)
    return model


_made: dict[str, PreTrainedModel] = {}
"""Models as they were made: a copy takes a third of the time. Large ones are made anew."""
_KEPT_PARAMETERS = 500_000


@torch.no_grad()
def randomise(model: torch.nn.Module, *, seed: int) -> None:
    """Draw every parameter anew: weights so that activations keep their size, norms around what they multiply by."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.copy_(0.3 * drawn + float(_multiplies_plainly(model, name)))
            if type(model).__name__.startswith("Gemma4") and name.endswith(("q_norm.weight", "k_norm.weight")):
                # It does not divide scores by √d: without it in these norms attention would take one token for all,
                # and rounding would be enlarged in any program.
                parameter.mul_(parameter.numel() ** -0.25)
        elif "embed_tokens" in name or name.endswith("embeddings.weight"):
            parameter.copy_(0.4 * drawn)
        else:
            parameter.copy_(_scaled(drawn, model, name))
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.copy_(1.0 + 0.3 * torch.randn(buffer.shape, generator=generator))


def _scaled(drawn: torch.Tensor, model: torch.nn.Module, name: str) -> torch.Tensor:
    """A matrix, or those of experts, of a size that keeps activations near one; experts' biases as other biases."""
    if ".experts." not in name:
        return drawn / drawn[0].numel() ** 0.5
    if name.endswith("_bias"):
        return 0.3 * drawn
    return drawn / drawn.shape[-2 if type(model).__name__.startswith("GptOss") else -1] ** 0.5


def _multiplies_plainly(model: torch.nn.Module, name: str) -> bool:
    """Whether it is a norm's weight, and not one from which the norm makes 1 + weight."""
    if type(model).__name__.startswith("Qwen3_5"):
        return name.endswith("linear_attn.norm.weight")
    offset = type(model).__name__.startswith(("Gemma2", "Gemma3"))
    return name.endswith(("norm.weight", "norm_f.weight", "LayerNorm.weight")) and not offset


def save_tiny(model: PreTrainedModel, directory: Path, *, max_shard_size: str = "1GB", tokenizer: bool = True) -> Path:
    """Write a Hugging Face directory: config.json, safetensors (sharded if max_shard_size is small), tokenizer."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer().save_pretrained(directory)
    return directory


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int = 5,
    alpha: float = 8.5,
    target_modules: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    seed: int = 1,
    task_type: str | None = "CAUSAL_LM",
    **lora: Any,
) -> Any:
    """The model with PEFT's LoRA around it, lora_A and lora_B both random and not zero, in the model's own dtype.

    Of a mixture of experts `all-linear` is what we have for it, and the experts: PEFT would adapt the routers as well.
    """
    import peft

    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    if targets == "all-linear" and expert_count(model.config) and model.config.model_type != "granitemoehybrid":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = {"target_parameters": list(EXPERT_PARAMETERS), **lora}
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout, task_type=task_type, **lora
    )
    # PEFT refuses `out_proj` of Mamba-2, because fused kernels would not see its factors. Here are no such kernels.
    with patch("peft.tuners.tuners_utils._check_lora_target_modules_mamba"):
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    adapted.create_or_update_model_card = lambda *_: None  # a README nobody reads takes most of the time of saving
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn / max(parameter.shape) ** 0.5)
    return adapted


EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def expert_count(config: PreTrainedConfig) -> int:
    """Experts in a layer; 0 where there are none."""
    return 0 if config.model_type == "nemotron_h" else int(getattr(config, "num_local_experts", 0))


def tiny_documents(lengths: Sequence[int], *, seed: int = 2, vocab_size: int = VOCAB_SIZE) -> list[torch.Tensor]:
    """Random token ids, one int64 vector a document."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def full_logits(model: torch.nn.Module, document: torch.Tensor, *, grad: bool = False) -> torch.Tensor:
    """transformers' logits, (tokens, vocab), of one document on its own."""
    with nullcontext() if grad else torch.no_grad():
        logits: torch.Tensor = model(input_ids=document[None]).logits[0]
    return logits
