"""A pass that starts at cached hidden states gives the same bits as one that starts at the token ids."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backhand.nn.batch import StartStates
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.family import PER_LAYER_MODEL
from backhand.nn.lora_parameters import LoRAParameters
from tests.support.parity import decoder_like, supervise
from tests.support.tiny_models import VARIANTS, attach_lora, tiny_documents, tiny_model

LOWEST = 1


def upper_layers(variant: str, dropout: float = 0.0, recompute: str = "none") -> Decoder:
    """A decoder whose adapter leaves out the layers below the second one."""
    adapted = attach_lora(tiny_model(variant), rank=5, alpha=8.5)
    decoder = decoder_like(adapted, 1.7, recompute=recompute)
    assert decoder.lora is not None
    whole = decoder.lora
    lora = LoRAParameters(
        [
            replace(slot, dropout=0.0 if slot.experts else dropout)
            for slot in whole.slots.values()
            if slot.name != PER_LAYER_MODEL  # which changes every layer's input
            and not any(slot.name.startswith(f"model.layers.{layer}.") for layer in range(LOWEST))
        ]
    )
    for name, view in lora.named_tensors():
        view.copy_(whole.tensor(name))
    decoder.attach(lora)
    return decoder


# Either way in every second variant.
@pytest.mark.parametrize(
    ("variant", "dropout", "recompute"),
    [(variant, *((0.0, "block"), (0.3, "none"))[number % 2]) for number, variant in enumerate(VARIANTS)],
)
def test_loss_and_gradients_are_the_same_bits(variant: str, dropout: float, recompute: str) -> None:
    decoder, batch = upper_layers(variant, dropout, recompute), supervise(tiny_documents((23, 9, 9, 1, 18)))
    assert decoder.lora is not None
    entered = replace(batch, start=StartStates(LOWEST, decoder.layer_input(batch, LOWEST)))
    found = []
    for one in (batch, entered):
        decoder.lora.gradients.zero_()
        loss = decoder.loss_and_gradients(one, 0.1, dropout_seed=7)
        found.append((loss, decoder.lora.gradients.clone(), decoder.loss(one), decoder.token_losses(one)))
    assert found[0][1].abs().max() > 0
    for whole, from_the_middle in zip(*found, strict=True):
        assert torch.equal(whole, from_the_middle)


def test_no_lower_layer_is_read() -> None:
    decoder, batch = upper_layers("llama"), supervise(tiny_documents((23, 9)))
    entered = replace(batch, start=StartStates(LOWEST, decoder.layer_input(batch, LOWEST)))
    expected = decoder.loss_and_gradients(entered, 0.1)
    below = decoder.weights.blocks[0]
    for weight in (below.input, below.gate_up, decoder.weights.embedding):
        assert isinstance(weight, torch.Tensor)
        weight.fill_(torch.nan)
    assert torch.equal(decoder.loss_and_gradients(entered, 0.1), expected)
    assert torch.isfinite(decoder.loss(entered))
    assert not torch.isfinite(decoder.loss(batch))


def test_starting_above_a_trained_layer_is_refused() -> None:
    decoder, batch = upper_layers("llama"), supervise(tiny_documents((23, 9)))
    entered = replace(batch, start=StartStates(LOWEST + 1, decoder.layer_input(batch, LOWEST + 1)))
    with pytest.raises(ValueError, match="the batch starts at layer 2, above the trained layer 1"):
        decoder.loss_and_gradients(entered, 0.1)
