"""Tiny decoders of every family the engine knows, as data, with random weights: what block and decoder proofs run on.

No two sizes alike, fewer key/value heads than heads, heads × head_dim ≠ hidden, norm weights and biases random,
documents longer than the sliding window and than the original rope length, different local and global rotary bases.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder_weights import DecoderWeights, empty_weights, module_shapes, named_views
from backhand.nn.family import DecoderConfig, LayerConfig, RotaryConfig
from backhand.nn.lora_parameters import LoRASlot
from backhand.verify.case import Draw, Tensors

WINDOW = 4
_LLAMA3 = (
    ("rope_type", "llama3"),
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 7),
)
_FULL, _SLIDING = LayerConfig(), LayerConfig(window=WINDOW)

LLAMA = DecoderConfig(
    family="llama",
    vocab_size=23,
    hidden_size=14,
    intermediate_size=18,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    norm_eps=1e-3,
    layers=(_FULL, _FULL),
    rotary=(RotaryConfig(theta=100.0),),
    attention_scaling=0.45,
    tied_head=False,
    max_position_embeddings=64,
)

FAMILIES: dict[str, DecoderConfig] = {
    "llama": LLAMA,
    "llama 3, tied head": replace(LLAMA, tied_head=True, rotary=(RotaryConfig(500.0, _LLAMA3),)),
    "llama, biases everywhere": replace(LLAMA, qkv_bias=True, output_bias=True, mlp_bias=True),
    "mistral, window": replace(LLAMA, family="mistral", layers=(_SLIDING, _SLIDING)),
    "qwen2, qkv bias, tied head": replace(
        LLAMA, family="qwen2", qkv_bias=True, tied_head=True, layers=(_FULL, _SLIDING)
    ),
    "qwen3, q/k norm": replace(LLAMA, family="qwen3", qk_norm=True, num_heads=6, num_key_value_heads=3),
    "gemma3": replace(
        LLAMA,
        family="gemma3_text",
        tied_head=True,
        layers=(LayerConfig(window=WINDOW, rotary=1), LayerConfig(rotary=0), LayerConfig(window=WINDOW, rotary=1)),
        rotary=(RotaryConfig(1000.0, (("rope_type", "linear"), ("factor", 2.0))), RotaryConfig(10.0)),
        norm_offset=1.0,
        sandwich_norms=True,
        qk_norm=True,
        activation="gelu_tanh",
        embedding_scaling=3.7,
    ),
}


def random_weights(config: DecoderConfig, draw: Draw) -> Tensors:
    """Every frozen tensor by its Hugging Face name, float64, of sizes that keep activations near one."""
    weights: Tensors = {}
    for name, view in named_views(empty_weights(config, torch.float64), config):
        if view.ndim == 2:
            weights[name] = draw.normal(*view.shape, size=1.0 if "embed" in name else view.shape[1] ** -0.5)
        else:
            is_norm = name.endswith("norm.weight")
            weights[name] = draw.normal(*view.shape, size=0.3) + (1.0 - config.norm_offset if is_norm else 0.0)
    return weights


def engine_weights(config: DecoderConfig, tensors: Tensors) -> DecoderWeights:
    """The engine's stacked form of weights by name, in their dtype and on their device."""
    table = tensors["model.embed_tokens.weight"]
    weights = empty_weights(config, table.dtype, table.device)
    for name, view in named_views(weights, config):
        view.copy_(tensors[name])
    return weights


def adapter_slots(config: DecoderConfig, targets: tuple[str, ...] | None, dropout: float = 0.0) -> dict[str, LoRASlot]:
    """A slot for every module that ends in one of the targets (None: all but the head), of mixed ranks and scalings."""
    slots: dict[str, LoRASlot] = {}
    for index, (name, (out_features, in_features)) in enumerate(module_shapes(config).items()):
        wanted = name != "lm_head" if targets is None else name.endswith(targets)
        if wanted:
            rank, scaling = 2 + index % 3, (1.7, 0.6, 2.3)[index % 3]
            slots[name] = LoRASlot(name, in_features, out_features, rank, scaling, dropout)
    return slots


def random_factors(slots: dict[str, LoRASlot], draw: Draw) -> Tensors:
    """lora_A and lora_B of every slot, neither of them zero, float64."""
    factors: Tensors = {}
    for name, slot in slots.items():
        factors[f"{name}.lora_A"] = draw.normal(slot.rank, slot.in_features, size=slot.in_features**-0.5)
        factors[f"{name}.lora_B"] = draw.normal(slot.out_features, slot.rank, size=0.4)
    return factors


def random_batch(
    config: DecoderConfig, document_lengths: tuple[int, ...], draw: Draw, shared_prefix: int = 0
) -> PackedBatch:
    """Random documents, about a third of their positions without loss, the last one of each and the prefix always."""
    input_ids = draw.integers(config.vocab_size, shared_prefix + sum(document_lengths))
    labels = [torch.full_like(input_ids[:shared_prefix], IGNORE_INDEX)]
    for document in input_ids[shared_prefix:].split(list(document_lengths)):
        targets = torch.full_like(document, IGNORE_INDEX)
        targets[:-1] = document[1:]
        labels.append(targets.masked_fill(draw.integers(3, len(document)) == 0, IGNORE_INDEX))
    return PackedBatch(input_ids, torch.cat(labels), document_lengths, shared_prefix)
