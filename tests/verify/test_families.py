"""The tiny families of the block and decoder cases have no sizes or values that hide a mistake."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from backhand.nn.decoder.block import RECOMPUTE_MODES
from backhand.nn.decoder.weights import empty_weights, named_views
from backhand.nn.families.family import DecoderConfig
from backhand.verify.cases.block import BlockGrads
from backhand.verify.decoder_op import DecoderGrads
from backhand.verify.runner import COMPOSITES, load_proofs
from backhand.verify.scaffold import Draw
from backhand.verify.tiny_decoders import FAMILIES, WINDOW, adapter_slots, random_batch, random_factors, random_weights

PROOFS = [proof for name in COMPOSITES for proof in load_proofs(name)]
# A decoder's other kinds of gradient are those of the op of that name.
GRADS = {
    "block": BlockGrads._fields,
    "decoder": ("d_lora_A", "d_lora_B"),
    "decoder_kinds": DecoderGrads._fields,
}


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.op)
def test_every_gradient_has_the_standard_mutants_and_one_of_its_own(proof):
    gradients = {name for name in GRADS[proof.op] if name.startswith("d_")}
    assert {one.gradient for one in proof.mutants if one.name == "factor 1 + 1e-6"} == gradients
    assert {one.gradient for one in proof.mutants if one.name not in ("sign", "factor 1 + 1e-6")} == gradients


def test_the_families_use_every_feature_that_a_decoder_config_has():
    values = {
        field.name: {repr(getattr(config, field.name)) for config in FAMILIES.values()}
        for field in fields(DecoderConfig)
    }
    for flag in (
        "tied_head", "norm_offset", "norms", "qk_norm", "activation", "qkv_bias", "output_bias", "mlp_bias",
        "embedding_scaling", "residual_multiplier", "logits", "attention_cap", "sinks", "mixture",
        "query_scaling", "groups", "layers", "rotary",
    ):  # fmt: skip
        assert len(values[flag]) > 1, flag


@pytest.mark.parametrize("config", FAMILIES.values(), ids=list(FAMILIES))
def test_a_family_hides_nothing(config):
    assert config.num_heads * config.head_dim != config.hidden_size
    assert config.num_key_value_heads < config.num_heads
    assert len({config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim}) == 4
    assert config.attention_scaling not in (1.0, config.head_dim**-0.5)
    draw = Draw("test")
    for name, weight in random_weights(config, draw).items():
        assert (weight - 1.0).abs() > 0.01 if weight.numel() == 1 else weight.std() > 0.05, name
    for name, factor in random_factors(adapter_slots(config, None), draw).items():
        assert (factor != 0).all(), name
    batch = random_batch(config, (9, 5, 1), draw)
    assert max(batch.lengths) > WINDOW
    assert 0 < batch.supervised_tokens < len(batch.labels)


def test_every_recompute_mode_is_tried():
    names = " ".join(case.name for proof in PROOFS for case in proof.cases)
    for mode in RECOMPUTE_MODES[1:]:
        assert f"recompute {mode}" in names


def test_random_weights_have_every_tensor_of_the_engine():
    for config in FAMILIES.values():
        shapes = {name: view.shape for name, view in named_views(empty_weights(config, torch.float64), config)}
        assert {name: weight.shape for name, weight in random_weights(config, Draw("x")).items()} == shapes
