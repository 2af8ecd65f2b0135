"""Tiny random encoders of transformers' classes, with our decoder of the same weights and adapter."""

from __future__ import annotations

import random
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from tests.support.tiny_models import VOCAB_SIZE, randomise, tiny_model

BERT_LINEAR = r"encoder\.layer\..*\.(query|key|value|dense)"
MODERNBERT_LINEAR = r"layers\..*\.(Wqkv|Wo|Wi)"
DECODER_LINEAR = r".*layers.*_proj"

_BERT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 60, "num_attention_heads": 5, "num_hidden_layers": 3,
    "intermediate_size": 76, "max_position_embeddings": 40, "type_vocab_size": 3, "layer_norm_eps": 1e-5,
}  # fmt: skip
_MODERNBERT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 60, "num_attention_heads": 5, "num_hidden_layers": 5,
    "intermediate_size": 44, "max_position_embeddings": 128, "local_attention": 10, "norm_eps": 1e-5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
_GEMMA: dict[str, Any] = {"use_bidirectional_attention": True, "sliding_window": 10}

ENCODERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("bert", _BERT, BERT_LINEAR),
    "bert-tanh": ("bert", {**_BERT, "hidden_act": "gelu_new", "type_vocab_size": 1}, BERT_LINEAR),
    "modernbert": ("modernbert", _MODERNBERT, MODERNBERT_LINEAR),
    "modernbert-biases": (
        "modernbert",
        {
            **_MODERNBERT,
            **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias"), True),
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_hidden_layers": 4,
        },
        MODERNBERT_LINEAR,
    ),
    "embeddinggemma": ("gemma3_text", _GEMMA, DECODER_LINEAR),
    "qwen3-embedding": ("qwen3", {}, DECODER_LINEAR),
}
"""By name: variant or model type, its sizes, and an expression for all linear modules of the blocks."""


def tiny_encoder(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model in evaluation mode. That of a decoder has its head, as our names do."""
    kind, sizes, _ = ENCODERS[name]
    if name in ("embeddinggemma", "qwen3-embedding"):
        return tiny_model(kind, dtype=dtype, seed=seed, **sizes, **overrides)
    return random_encoder(transformers.AutoConfig.for_model(kind, **{**sizes, **overrides}), dtype=dtype, seed=seed)


def random_encoder(
    config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0, auto: Any = transformers.AutoModel
) -> PreTrainedModel:
    """A random model of this configuration in evaluation mode."""
    model: PreTrainedModel = auto.from_config(config, attn_implementation="eager")
    randomise(model, seed=seed)
    return model.to(dtype).eval()


def drawn_config(kind: str, seed: int) -> PreTrainedConfig:
    """A configuration of random sizes and options."""
    draw = random.Random(f"{kind} {seed}")
    heads, layers, bias = draw.randint(1, 6), draw.randint(1, 5), draw.random() < 0.5
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "num_attention_heads": heads,
        "hidden_size": heads * draw.choice((2, 4, 10, 16, 26)),
        "intermediate_size": draw.randint(3, 90),
        "num_hidden_layers": layers,
    }
    if kind == "bert":
        activation = draw.choice(("gelu", "gelu_new", "silu"))
        sizes |= {"hidden_act": activation, "max_position_embeddings": draw.randint(23, 60), "layer_norm_eps": 1e-6}
    else:
        sizes |= {key: _MODERNBERT[key] for key in _MODERNBERT if key.endswith("_token_id")}
        sizes |= {"local_attention": draw.randint(2, 30), "norm_eps": 1e-6, "norm_bias": bias, "mlp_bias": not bias}
        sizes |= {"global_attn_every_n_layers": draw.randint(1, 4), "attention_bias": draw.random() < 0.5}
    return transformers.AutoConfig.for_model(kind, **sizes)


def states_of(model: PreTrainedModel, documents: list[torch.Tensor], **inputs: list[torch.Tensor]) -> torch.Tensor:
    """transformers' final hidden states, (tokens, hidden), document by document."""
    trunk = model.model if hasattr(model, "lm_head") else model
    each = [dict(zip(inputs, values, strict=True)) for values in zip(*inputs.values(), strict=True)]
    return torch.cat(
        [
            trunk(input_ids=document[None], **{key: value[None] for key, value in extra.items()}).last_hidden_state[0]
            for document, extra in zip(documents, each or [{}] * len(documents), strict=True)
        ]
    )
