"""The decoder's frozen weights, stacked for few large products, and their Hugging Face names.

Projections that share an input lie in one matrix: qkv (q + 2k, hidden) and gate_up (2f, hidden). `named_views` gives
every tensor its Hugging Face name as a view into these, for loading, digests and merging alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backhand.nn.family import DecoderConfig
from backhand.nn.loading.source import ModelSource, check_shapes, fill
from backhand.nn.module_shapes import ModuleShapes


@dataclass
class BlockWeights:
    """One decoder block; biases and the extra norms are None where the family has none.

    Shapes: qkv (q + 2k, hidden), output (hidden, q), gate_up (2f, hidden), down (hidden, f); norms (hidden,), q_norm
    and k_norm (head_dim,); q = heads · head_dim, k = key/value heads · head_dim, f = intermediate size.
    """

    qkv: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    after_attention_norm: Tensor | None = None
    after_mlp_norm: Tensor | None = None


@dataclass
class DecoderWeights:
    """All frozen weights: embedding (vocab, hidden), blocks, final_norm (hidden,), head (vocab, hidden).

    A tied head is the embedding itself.
    """

    embedding: Tensor
    blocks: list[BlockWeights]
    final_norm: Tensor
    head: Tensor


def empty_weights(config: DecoderConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> DecoderWeights:
    """Unfilled buffers of the right shapes."""
    hidden, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, k = config.num_heads * head_dim, config.num_key_value_heads * head_dim

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def block() -> BlockWeights:
        return BlockWeights(
            qkv=new(q + 2 * k, hidden),
            output=new(hidden, q),
            gate_up=new(2 * ffn, hidden),
            down=new(hidden, ffn),
            attention_norm=new(hidden),
            mlp_norm=new(hidden),
            qkv_bias=new(q + 2 * k) if config.qkv_bias else None,
            output_bias=new(hidden) if config.output_bias else None,
            gate_up_bias=new(2 * ffn) if config.mlp_bias else None,
            down_bias=new(hidden) if config.mlp_bias else None,
            q_norm=new(head_dim) if config.qk_norm else None,
            k_norm=new(head_dim) if config.qk_norm else None,
            after_attention_norm=new(hidden) if config.sandwich_norms else None,
            after_mlp_norm=new(hidden) if config.sandwich_norms else None,
        )

    embedding = new(config.vocab_size, hidden)
    head = embedding if config.tied_head else new(config.vocab_size, hidden)
    return DecoderWeights(embedding, [block() for _ in config.layers], new(hidden), head)


def named_views(weights: DecoderWeights, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, view) of every tensor; a tied head appears once, as the embedding."""
    q, k, ffn = (
        config.num_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
        config.intermediate_size,
    )
    yield "model.embed_tokens.weight", weights.embedding
    for index, block in enumerate(weights.blocks):
        prefix = f"model.layers.{index}."
        for kind, qkv, gate_up in (
            ("weight", block.qkv, block.gate_up),
            ("bias", block.qkv_bias, block.gate_up_bias),
        ):
            if qkv is not None:
                for part, view in zip("qkv", qkv.split([q, k, k]), strict=True):
                    yield f"{prefix}self_attn.{part}_proj.{kind}", view
            if gate_up is not None:
                for part, view in zip(("gate", "up"), gate_up.split([ffn, ffn]), strict=True):
                    yield f"{prefix}mlp.{part}_proj.{kind}", view
        singles = {
            "self_attn.o_proj.weight": block.output,
            "self_attn.o_proj.bias": block.output_bias,
            "mlp.down_proj.weight": block.down,
            "mlp.down_proj.bias": block.down_bias,
            "self_attn.q_norm.weight": block.q_norm,
            "self_attn.k_norm.weight": block.k_norm,
            "input_layernorm.weight": block.attention_norm,
            # With sandwich norms the name post_attention_layernorm means what it says; without, the norm before the
            # MLP.
            "post_attention_layernorm.weight": block.after_attention_norm if config.sandwich_norms else block.mlp_norm,
            "pre_feedforward_layernorm.weight": block.mlp_norm if config.sandwich_norms else None,
            "post_feedforward_layernorm.weight": block.after_mlp_norm,
        }
        for name, tensor in singles.items():
            if tensor is not None:
                yield prefix + name, tensor
    yield "model.norm.weight", weights.final_norm
    if not config.tied_head:
        yield "lm_head.weight", weights.head


def load_weights(
    source: ModelSource, config: DecoderConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> DecoderWeights:
    """Read every tensor of the source once, straight into its place in the compute dtype.

    Raises:
        ArtifactError: listing every tensor that is missing or of another shape.
    """
    # Before memory is asked for: a garbled size should be an error about a tensor, not about memory.
    wanted = named_views(empty_weights(config, dtype, "meta"), config)
    check_shapes(source, {name: tuple(view.shape) for name, view in wanted})
    weights = empty_weights(config, dtype, device)
    fill(source, named_views(weights, config))
    return weights


def linear_parts(block: BlockWeights, config: DecoderConfig) -> dict[str, Tensor]:
    """(out, in) of a block's linear modules by the ends of their names, such as `self_attn.q_proj`."""
    q, k, ffn = (
        config.num_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
        config.intermediate_size,
    )
    parts = {f"self_attn.{part}_proj": view for part, view in zip("qkv", block.qkv.split([q, k, k]), strict=True)}
    gate_up = zip(("gate", "up"), block.gate_up.split([ffn, ffn]), strict=True)
    parts |= {f"mlp.{part}_proj": view for part, view in gate_up}
    return parts | {"self_attn.o_proj": block.output, "mlp.down_proj": block.down}


def module_shapes(config: DecoderConfig) -> ModuleShapes:
    """(out, in) of every linear module by dotted path, in forward order, and what else an adapter can train."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, k = config.num_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, int]] = {}
    for index in range(len(config.layers)):
        prefix = f"model.layers.{index}."
        shapes[prefix + "self_attn.q_proj"] = (q, hidden)
        shapes[prefix + "self_attn.k_proj"] = (k, hidden)
        shapes[prefix + "self_attn.v_proj"] = (k, hidden)
        shapes[prefix + "self_attn.o_proj"] = (hidden, q)
        shapes[prefix + "mlp.gate_proj"] = (ffn, hidden)
        shapes[prefix + "mlp.up_proj"] = (ffn, hidden)
        shapes[prefix + "mlp.down_proj"] = (hidden, ffn)
    shapes["lm_head"] = (config.vocab_size, hidden)
    views = named_views(empty_weights(config, torch.float32, "meta"), config)
    parameters = {name: tuple(view.shape) for name, view in views}
    parameters.setdefault("lm_head.weight", shapes["lm_head"])
    return ModuleShapes(
        shapes,
        embeddings={"model.embed_tokens": (config.vocab_size, hidden)},
        parameters=parameters,
        tied={"lm_head.weight": "model.embed_tokens.weight"} if config.tied_head else {},
    )
