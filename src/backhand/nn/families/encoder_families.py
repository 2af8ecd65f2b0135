"""Encoders, read as in `nn.families.family_parsing`.

Checked against the modelling sources of transformers 5.24:

- BERT: learned positions and token types, layer norms of the residual sums, biases everywhere, and an MLP without a
  gate. There is no norm after the last block. The pooler, which a sentence's embedding does not need, is part of the
  head for classification.
- ModernBERT: every third layer has full attention, beginning with the first, unless `layer_types` decides. The others
  see `local_attention` // 2 tokens to each side and have their own rotary base. The first layer has no norm before
  attention. The gate is the first half of Wi.
"""

from __future__ import annotations

from dataclasses import replace

from backhand.nn.families.class_heads import ClassHead
from backhand.nn.families.common_fields import common_fields, with_biases, without_rotary
from backhand.nn.families.config_fields import ConfigFields
from backhand.nn.families.family import DecoderConfig
from backhand.nn.families.rotary import modernbert_rotary

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
"""Names of activations in configs, with those of the engine."""

_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "embedding_dropout", "mlp_dropout",
)  # fmt: skip
_OF_HEADS = (
    "decoder_bias", "sparse_prediction", "sparse_pred_ignore_index", "deterministic_flash_attn",
    "initializer_cutoff_factor", "cls_token_id", "sep_token_id", "tie_word_embeddings",
)  # fmt: skip
"""Fields of heads for other tasks, of their training and of the tokenizer."""


def bert(fields: ConfigFields) -> DecoderConfig:
    """BERT, MiniLM and other models of their class."""
    fields.must_equal("is_decoder", False)
    fields.must_equal("add_cross_attention", False)
    fields.must_equal("position_embedding_type", "absolute")
    encoder = _encoder(fields, "hidden_act", norm_eps="layer_norm_eps", rotary_sets=lambda *_: ())
    inputs = encoder.inputs
    if inputs is not None:
        encoder = replace(encoder, inputs=inputs._replace(types=fields.integer("type_vocab_size")))
    return without_rotary(encoder, lambda _: True)


def modernbert(fields: ConfigFields) -> DecoderConfig:
    """ModernBERT."""
    fields.must_equal("rope_scaling", reason="the engine has no scaling of both kinds of layers")
    fields.must_equal("sliding_window", reason="the engine reads local_attention")
    every = fields.integer("global_attn_every_n_layers", 3)
    encoder = _encoder(
        fields,
        "hidden_activation",
        window=fields.integer("local_attention") // 2 + 1,
        slides=lambda index: bool(index % every),
        rotary_sets=modernbert_rotary,
        norm_eps="norm_eps",
    )
    encoder = replace(
        with_biases(fields, encoder), mlp_bias=fields.flag("mlp_bias", False), norm_bias=fields.flag("norm_bias", False)
    )
    first, *others = encoder.layers
    return replace(encoder, layers=(replace(first, input_norm=False), *others), class_head=_modernbert_head(fields))


def _modernbert_head(fields: ConfigFields) -> ClassHead:
    pooling, activation = fields.text("classifier_pooling", "cls"), fields.text("classifier_activation", "gelu")
    if pooling not in ("cls", "mean"):
        fields.problem("classifier_pooling", "the engine has cls and mean")
    if activation not in _ACTIVATIONS:
        fields.problem("classifier_activation", f"the engine has {', '.join(_ACTIVATIONS)}")
    return ClassHead(
        "classifier",
        output_bias=True,
        pooling="mean" if pooling == "mean" else "cls",
        dense="head.dense",
        dense_bias=fields.flag("classifier_bias", False),
        activation=_ACTIVATIONS.get(activation, "gelu"),
        norm="head.norm",
        norm_bias=fields.flag("norm_bias", False),
        prefix="model",
    )


def _encoder(fields: ConfigFields, activation: str, **options: object) -> DecoderConfig:
    """Read the fields that encoders share. Options are passed to `common_fields`."""
    fields.neutral(*_DROPOUTS, *_OF_HEADS)
    stated = fields.or_declared(activation)
    fields.neutral(activation)
    if stated not in _ACTIVATIONS:
        fields.problem(activation, f"the engine has {', '.join(_ACTIVATIONS)}")
    encoder = common_fields(fields, activation=None, **options)  # type: ignore[arg-type]
    return replace(encoder, activation=_ACTIVATIONS.get(str(stated), "gelu"))
