"""Weights with a merged adapter compute the same as base and adapter separately."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backhand.adapters.config import LoRAConfig
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.merging import merge_into, merged_logits
from backhand.nn.lora_parameters import LoRAParameters
from tests.support.in_memory import InMemoryModel
from tests.support.saved_adapters import resolve_slots
from tests.support.tiny_models import tiny_model

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def decoder(variant: str) -> Decoder:
    model = tiny_model(variant)
    return Decoder.from_source(InMemoryModel(model.config.to_dict(), model.state_dict()), dtype=torch.float32)


def random_adapter(model: Decoder, targets: tuple[str, ...]) -> LoRAParameters:
    config = LoRAConfig(rank=3, alpha=5.0, target_modules=targets)
    lora = LoRAParameters(resolve_slots(config, model.module_shapes()))
    lora.values.copy_(torch.randn(lora.element_count, generator=torch.Generator().manual_seed(0)) / 4)
    return lora


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "gemma3_text"])
@pytest.mark.parametrize("targets", [LINEAR, ("lm_head",), (*LINEAR, "lm_head")])
def test_merged_logits_are_those_of_base_and_adapter(variant: str, targets: tuple[str, ...]) -> None:
    base, merged = decoder(variant), decoder(variant)
    lora = random_adapter(base, targets)
    ids = torch.arange(11)
    untouched = base.logits(ids)
    base.attach(lora)
    unmerged = base.logits(ids)
    merge_into(merged, lora)
    assert float((merged.logits(ids) - unmerged).norm() / unmerged.norm()) < 1e-5
    assert float((untouched - unmerged).norm() / unmerged.norm()) > 0.01
    base.detach()
    assert torch.equal(base.logits(ids), untouched)
    batch = PackedBatch(ids, torch.full_like(ids, IGNORE_INDEX), (11,))
    block_by_block = merged_logits(base, lora, batch)
    assert float((merged.logits(ids) - block_by_block).norm() / unmerged.norm()) < 1e-6
    assert torch.equal(base.logits(ids), untouched)


def test_quantized_matrices_are_not_changed_in_place() -> None:
    model = tiny_model("llama")
    source = InMemoryModel(model.config.to_dict(), model.state_dict())
    quantized = Decoder.from_source(source, dtype=torch.float32, quantized=True)
    with pytest.raises(ValueError, match="changed in place"):
        merge_into(quantized, random_adapter(quantized, LINEAR))


def test_the_update_is_added_once_as_formed_by_hand() -> None:
    merged = decoder("llama-tied")
    name = "model.layers.1.mlp.down_proj"
    before = dict(merged.frozen_tensors())[f"{name}.weight"].clone()
    lora = random_adapter(merged, ("down_proj",))
    merge_into(merged, lora)
    expected = before + 5.0 / 3 * torch.einsum("or,ri->oi", lora.lora_B(name), lora.lora_A(name))
    assert torch.allclose(dict(merged.frozen_tensors())[f"{name}.weight"], expected, rtol=1e-6, atol=1e-7)


def test_a_tied_head_leaves_the_embedding_alone() -> None:
    merged = decoder("llama-tied")
    embedding = merged.weights.embedding.clone()
    merge_into(merged, random_adapter(merged, ("lm_head",)))
    assert torch.equal(merged.weights.embedding, embedding)
    assert not torch.equal(merged.weights.head, embedding)


def test_taking_the_update_away_again_would_not_restore_them() -> None:
    model = tiny_model("llama")
    base = Decoder.from_source(InMemoryModel(model.config.to_dict(), model.state_dict()), dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in base.frozen_tensors()}
    lora = random_adapter(base, LINEAR)
    merge_into(base, lora)
    lora.values.mul_(-1)
    for name in lora.slots:  # lora_B was negated with lora_A: once more, so that the product is negative
        lora.lora_A(name).mul_(-1)
    merge_into(base, lora)
    assert any(not torch.equal(weight, before[name]) for name, weight in base.frozen_tensors())


def test_what_is_more_than_factors_is_refused() -> None:
    base = decoder("llama")
    before = {name: weight.clone() for name, weight in base.frozen_tensors()}
    plain = random_adapter(base, ("up_proj",))
    dora = LoRAParameters([replace(slot, use_dora=True) for slot in plain.slots.values()])
    base.attach(plain)
    with pytest.raises(ValueError, match="factors"):
        merge_into(base, dora)
    assert base.lora is plain
    assert all(torch.equal(weight, before[name]) for name, weight in base.frozen_tensors())
