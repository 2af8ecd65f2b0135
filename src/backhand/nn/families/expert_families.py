"""Families with mixtures of experts, read as in `nn.families.family_parsing`.

Checked against the modelling sources of transformers 5.24:

- A layer has a router and experts instead of an MLP. In Qwen3-MoE this holds for every `decoder_sparse_step`-th layer
  that is not in `mlp_only_layers`.
- A chosen expert's weight is its share among the chosen ones; in Qwen3-MoE without `norm_topk_prob`, among all.
- The number of experts is `num_experts` or `num_local_experts`, which transformers treats as one field. The width of an
  expert is `intermediate_size` in Mixtral and `moe_intermediate_size` in Qwen3-MoE.
- A sliding window applies to all layers: in Mixtral if the field is set, in Qwen3-MoE with `use_sliding_window`.
- Qwen3-MoE has Qwen3's attention.
- gpt-oss: every second layer slides, starting with the first (`layer_types`). The softmax of each head has a sink. q,
  k, v and o have biases (`attention_bias`), and router and experts always have them. A chosen expert's weight is its
  share among the chosen ones. The experts' gated unit is clamped at `swiglu_limit`, with a gain of `swiglu_alpha`
  inside the sigmoid. Without rotary fields in the config, angles are yarn's with base 150000.
- Granite 4 has experts next to its MLP; see `nn.families.mixed_families`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from backhand.errors import ArtifactError
from backhand.nn.families.common_fields import (
    MOST_ELEMENTS,
    common_fields,
    sliding_except_every,
    stated_window,
    uniform_window,
    used_window,
    window_size,
    with_biases,
    with_layers,
)
from backhand.nn.families.config_fields import ConfigFields
from backhand.nn.families.family import GPT_OSS_CLAMP, GPT_OSS_ROUTER, DecoderConfig, Mixture
from backhand.nn.families.rotary import gpt_oss_rotary
from backhand.ops.clamped_glu import Clamp


def mixtral(fields: ConfigFields) -> DecoderConfig:
    """Mixtral: experts in every layer."""
    decoder = uniform_window(fields, stated_window(fields))
    return with_experts(decoder, read_mixture(fields, "num_local_experts", decoder.intermediate_size))


def qwen3_moe(fields: ConfigFields) -> DecoderConfig:
    """Qwen3-MoE: layers with experts, and optionally some without."""
    decoder = with_biases(fields, uniform_window(fields, used_window(fields)))
    step, count = fields.integer("decoder_sparse_step"), len(decoder.layers)
    dense = fields.value("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(n, bool) or not isinstance(n, int) for n in dense):
        raise ArtifactError(f"mlp_only_layers = {dense!r:.80} is not a list of layers", where="config.json")
    mixture = read_mixture(fields, "num_experts", fields.integer("moe_intermediate_size"))
    mixture = mixture._replace(of_all=not fields.flag("norm_topk_prob", False))
    sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(count)]
    return with_experts(decoder, mixture, sparse)


_MOST_EXPERTS = 2**16
"""Upper bound: a corrupted number must not fill the memory with names."""


def gpt_oss(fields: ConfigFields) -> DecoderConfig:
    """gpt-oss: experts in every layer, attention with sinks."""
    decoder = common_fields(
        fields, window=window_size(fields), slides=sliding_except_every(2), rotary_sets=gpt_oss_rotary
    )
    mixture = read_mixture(fields, "num_local_experts", decoder.intermediate_size)
    gain = fields.number("swiglu_alpha", GPT_OSS_CLAMP.gain)
    limit = fields.number("swiglu_limit", GPT_OSS_CLAMP.limit)
    mixture = mixture._replace(router=GPT_OSS_ROUTER, bias=True, clamp=Clamp(gain, limit), interleaved=True)
    return with_experts(with_biases(fields, decoder, default=True), mixture)


def with_experts(decoder: DecoderConfig, mixture: Mixture, sparse: Sequence[bool] | None = None) -> DecoderConfig:
    """Return the decoder with experts in these layers, or in all layers if `sparse` is None."""
    sparse = [True] * len(decoder.layers) if sparse is None else sparse
    return replace(with_layers(decoder, sparse, experts=True), mixture=mixture if any(sparse) else None)


def read_mixture(fields: ConfigFields, declared: str, width: int) -> Mixture:
    """Read the number of experts, under either of its two names, and the number of experts per token.

    Args:
        declared: the name in the family's class, used if neither is set.
        width: output features of an expert's gate and of its up.

    Raises:
        ArtifactError: there are more choices than experts, or too many experts.
    """
    stated = [name for name in ("num_experts", "num_local_experts") if fields.value(name) is not None]
    experts, chosen = fields.integer(stated[0] if stated else declared), fields.integer("num_experts_per_tok")
    if chosen > experts or experts > _MOST_EXPERTS or experts * width > MOST_ELEMENTS:
        raise ArtifactError(
            f"{chosen} of {experts} experts of width {width} is not a valid mixture",
            where="config.json",
            next_step="fetch the model again",
        )
    return Mixture(experts, chosen, width)
