"""Families with mixtures of experts, read as in `family_parsing`.

Checked against the modelling sources of transformers 5.24:

- A layer has a router and experts in the place of an MLP; in Qwen3-MoE every `decoder_sparse_step`-th layer that is not
  among `mlp_only_layers`.
- A chosen expert's weight is its share among the chosen ones, in Qwen3-MoE without `norm_topk_prob` among all.
- The number of experts is called `num_experts` or `num_local_experts`, which transformers takes for one field. The
  width of an expert is Mixtral's `intermediate_size` and Qwen3-MoE's `moe_intermediate_size`.
- A sliding window is that of all layers: Mixtral's where the field is there, Qwen3-MoE's with `use_sliding_window`.
- Qwen3-MoE has Qwen3's attention.
- gpt-oss: every second layer slides, the first one does (`layer_types`); the softmax of each head has a sink; q, k, v
  and o have biases (`attention_bias`), and router and experts always. A chosen expert's weight is its share among the
  chosen ones. The experts' gated unit is clamped at `swiglu_limit`, with a gain of `swiglu_alpha` inside the sigmoid.
  Rotary angles are yarn's where the config is silent, of base 150000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from backhand.errors import ArtifactError
from backhand.nn.decoder.common_fields import (
    MOST_ELEMENTS,
    all_but_every,
    common_fields,
    stated_window,
    used_window,
    window_everywhere,
    window_size,
    with_biases,
    with_layers,
)
from backhand.nn.decoder.config_fields import ConfigFields
from backhand.nn.decoder.family import GPT_OSS_CLAMP, GPT_OSS_ROUTER, DecoderConfig, Mixture
from backhand.ops.clamped_glu import Clamp


def mixtral(fields: ConfigFields) -> DecoderConfig:
    """Mixtral: experts in every layer."""
    decoder = window_everywhere(fields, stated_window(fields))
    return _with_experts(decoder, _mixture(fields, "num_local_experts", decoder.intermediate_size))


def qwen3_moe(fields: ConfigFields) -> DecoderConfig:
    """Qwen3-MoE: perhaps some layers without experts."""
    decoder = with_biases(fields, window_everywhere(fields, used_window(fields)))
    step, count = fields.integer("decoder_sparse_step"), len(decoder.layers)
    dense = fields.value("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(n, bool) or not isinstance(n, int) for n in dense):
        raise ArtifactError(f"mlp_only_layers = {dense!r:.80} is no list of layers", where="config.json")
    mixture = _mixture(fields, "num_experts", fields.integer("moe_intermediate_size"))
    mixture = mixture._replace(of_all=not fields.flag("norm_topk_prob", False))
    sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(count)]
    return _with_experts(decoder, mixture, sparse)


_MOST_EXPERTS = 2**16
"""A garbled number must not fill the memory with names."""

_GPT_OSS_THETA = 150_000.0
_GPT_OSS_ROTARY = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What its class takes where a config is silent."""


def gpt_oss(fields: ConfigFields) -> DecoderConfig:
    """gpt-oss: experts in every layer, attention with sinks."""
    if fields.value("rope_scaling") is None:
        fields.assume("rope_parameters", _GPT_OSS_ROTARY)
    fields.assume("rope_theta", _GPT_OSS_THETA)
    decoder = common_fields(fields, window=window_size(fields), slides=all_but_every(2))
    mixture = _mixture(fields, "num_local_experts", decoder.intermediate_size)
    gain = fields.number("swiglu_alpha", GPT_OSS_CLAMP.gain)
    limit = fields.number("swiglu_limit", GPT_OSS_CLAMP.limit)
    mixture = mixture._replace(router=GPT_OSS_ROUTER, bias=True, clamp=Clamp(gain, limit), interleaved=True)
    return _with_experts(with_biases(fields, decoder, default=True), mixture)


def _with_experts(decoder: DecoderConfig, mixture: Mixture, sparse: Sequence[bool] | None = None) -> DecoderConfig:
    """With experts in these layers, in all if none are named."""
    sparse = [True] * len(decoder.layers) if sparse is None else sparse
    return replace(with_layers(decoder, sparse, experts=True), mixture=mixture if any(sparse) else None)


def _mixture(fields: ConfigFields, declared: str, width: int) -> Mixture:
    """Number of experts, by the one of its two names that is there, and of those that a token goes to."""
    stated = [name for name in ("num_experts", "num_local_experts") if fields.value(name) is not None]
    experts, chosen = fields.integer(stated[0] if stated else declared), fields.integer("num_experts_per_tok")
    if chosen > experts or experts > _MOST_EXPERTS or experts * width > MOST_ELEMENTS:
        raise ArtifactError(
            f"{chosen} of {experts} experts of width {width} is no mixture",
            where="config.json",
            next_step="fetch the model again",
        )
    return Mixture(experts, chosen, width)
