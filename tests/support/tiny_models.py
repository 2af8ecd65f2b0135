"""Tiny random transformers models of every family the decoder engine knows, for parity tests.

No two sizes alike, fewer key/value heads than heads, heads × head_dim ≠ hidden, every norm weight and bias random, and
windows and original rope lengths short enough for a test's document to be longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from support.tiny_tokenizer import tiny_tokenizer

VOCAB_SIZE = 307
WINDOW = 8
"""Keys a query sees in a sliding layer, itself among them."""
ORIGINAL_LENGTH = 16
"""The original rope length of the Llama 3 variant."""

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
}

VARIANTS: tuple[str, ...] = tuple(_VARIANTS)
"""Every tiny model there is; a family may have several."""

FAMILIES: tuple[str, ...] = ("llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3_text")
"""One variant of each family, Llama also with Llama 3's rope scaling."""


def tiny_config(variant: str, **overrides: Any) -> PreTrainedConfig:
    """The transformers config of a variant; overrides replace its fields."""
    model_type, fields = _VARIANTS[variant]
    values = {**_SIZES, **fields, **overrides}
    if values["head_dim"] is None:
        del values["head_dim"]
    # transformers fills the nested rope dictionaries in place: give it its own.
    values["rope_parameters"] = _copy(values["rope_parameters"])
    return transformers.AutoConfig.for_model(model_type, **values)


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def tiny_model(
    variant: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str = "eager", **overrides: Any
) -> PreTrainedModel:
    """A random model in evaluation mode; the same variant, overrides and seed give the same weights in every dtype."""
    config = tiny_config(variant, **overrides)
    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    randomise(model, seed=seed)
    return model.to(dtype).eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, *, seed: int) -> None:
    """Draw every parameter anew: weights so that activations keep their size, norms around what they multiply by."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            is_plain_norm = name.endswith("norm.weight") and not type(model).__name__.startswith("Gemma")
            parameter.copy_(0.3 * drawn + float(is_plain_norm))
        elif "embed_tokens" in name:
            parameter.copy_(0.4 * drawn)
        else:
            parameter.copy_(drawn / parameter.shape[1] ** 0.5)


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
    **lora: Any,
) -> Any:
    """The model with PEFT's LoRA around it, lora_A and lora_B both random and not zero, in the model's own dtype."""
    import peft

    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM", **lora
    )
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn / max(parameter.shape) ** 0.5)
    return adapted


def tiny_documents(lengths: Sequence[int], *, seed: int = 2, vocab_size: int = VOCAB_SIZE) -> list[torch.Tensor]:
    """Random token ids, one int64 vector a document."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def full_logits(model: torch.nn.Module, document: torch.Tensor, *, grad: bool = False) -> torch.Tensor:
    """transformers' logits, (tokens, vocab), of one document on its own."""
    with nullcontext() if grad else torch.no_grad():
        logits: torch.Tensor = model(input_ids=document[None]).logits[0]
    return logits
