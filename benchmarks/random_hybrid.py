"""A Hugging Face directory of four layers with the sizes of Granite 4 H 350M and random weights: Mamba-2 in three.

The time steps are between 0.001 and 0.1, as Mamba-2 is initialized [arXiv:2405.21060]. With transformers' own start
values for this family the decays would underflow, and both sides would compute with subnormal numbers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig

NAME = "granite-4-h"
HEADS, VOCABULARY = 48, 8192


@torch.no_grad()
def write_random_hybrid(path: Path, seed: int = 0) -> Path:
    """Write the directory, without a tokenizer."""
    config = GraniteMoeHybridConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        shared_intermediate_size=2048,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        num_attention_heads=12,
        num_key_value_heads=4,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=HEADS,
        mamba_d_head=32,
        mamba_d_state=128,
        attention_multiplier=0.015625,
        embedding_multiplier=12.0,
        residual_multiplier=0.246,
        logits_scaling=3.0,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        if layer.mamba is not None:
            steps = torch.exp(torch.empty(HEADS).uniform_(-6.9, -2.3))
            layer.mamba.dt_bias.copy_(torch.log(torch.expm1(steps)))
    model.save_pretrained(path)
    return path
