"""A model family as data: what the one decoder forward needs to know, read from a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RotaryConfig:
    """One set of rotary angles.

    Attributes:
        theta: the rotary base.
        scaling: None, or the parameters of a scaling rule with its `rope_type` (`linear`, `llama3`, `longrope`); the
            rules are in `rotary_frequencies`.
    """

    theta: float
    scaling: tuple[tuple[str, float | int | str | tuple[float, ...]], ...] | None = None


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer.

    Attributes:
        window: sliding-window size in tokens (a query sees itself and window - 1 tokens before it), None for full
            attention.
        rotary: index into `DecoderConfig.rotary`.
    """

    window: int | None = None
    rotary: int = 0


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides what the decoder computes; no family has a forward of its own.

    Attributes:
        norm_offset: 1.0 where the norm multiplies by 1 + weight (Gemma), else 0.0.
        sandwich_norms: norms also after attention and MLP, before the residual sum (Gemma 3).
        qk_norm: RMSNorm over head_dim of queries and keys before the rotation (Qwen3, Gemma 3).
        activation: of the gate: `silu` or `gelu_tanh`.
        attention_scaling: multiplier of query-key products.
        embedding_scaling: multiplier of the embedding's output (Gemma: √hidden), 1.0 else.
        tied_head: the head's weight is the embedding's.
        padding_id: the token whose embedding row torch, and so PEFT, never trains; None where there is none.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    layers: tuple[LayerConfig, ...]
    rotary: tuple[RotaryConfig, ...]
    attention_scaling: float
    tied_head: bool
    max_position_embeddings: int
    norm_offset: float = 0.0
    sandwich_norms: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    embedding_scaling: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    padding_id: int | None = None
