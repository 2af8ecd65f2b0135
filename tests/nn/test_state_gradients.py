"""A loss of the final hidden states: `Decoder.final_states` and `Decoder.state_loss_and_gradients`."""

from __future__ import annotations

import pytest
import torch

from tests.support.no_autograd import autograd_raises
from tests.support.parity import decoder_like, our_gradients, peft_gradients, relative_error, supervise
from tests.support.tiny_models import attach_lora, tiny_documents, tiny_model

RANK, ALPHA = 5, 8.5
LENGTHS = (23, 9, 9, 1, 18)
NOT_THE_HEAD = r".*(q_proj|v_proj|o_proj|up_proj|down_proj)"
POSITIONS = torch.tensor([0, 22, 31, 40, 41, 59])
"""The first token of a document, the last of each."""


def _curved(states: torch.Tensor) -> torch.Tensor:
    """Any function of all states whose derivatives differ in size and sign."""
    places = torch.arange(1, states.numel() + 1, dtype=torch.float64).view(states.shape)
    return (torch.sin(places) * states.double() + 0.01 * states.double() ** 2).mean()


def _state_loss(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.arange(1, states.numel() + 1, dtype=torch.float64).view(states.shape)
    return _curved(states), ((torch.sin(places) + 0.02 * states.double()) / states.numel()).to(states.dtype)


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["all", "some"])
@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "qwen3"])
def test_states_and_every_gradient_equal_autograd(variant, positions):
    adapted = attach_lora(tiny_model(variant), rank=RANK, alpha=ALPHA, target_modules=NOT_THE_HEAD)
    decoder, batch = decoder_like(adapted, ALPHA / RANK), supervise(tiny_documents(LENGTHS))
    trunk = adapted.get_base_model().model
    states = torch.cat([trunk(input_ids=d[None]).last_hidden_state[0] for d in tiny_documents(LENGTHS)])
    states = states if positions is None else states[positions]
    loss = _curved(states)
    loss.backward()
    with autograd_raises():
        assert relative_error(decoder.final_states(batch, positions), states) <= 1e-5
        ours = decoder.state_loss_and_gradients(batch, _state_loss, positions)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    theirs = peft_gradients(adapted)
    worst = {name: relative_error(gradient, theirs[name]) for name, gradient in our_gradients(decoder.lora).items()}
    assert worst.keys() == theirs.keys()
    assert max(worst.values()) <= 2e-5, sorted(worst.items(), key=lambda item: -item[1])[:3]


def test_gradients_of_the_same_states_again_have_the_same_bits():
    """GradCache computes the states first, and passes ∂L/∂states in a second pass over the same batch."""
    adapted = attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA, target_modules=NOT_THE_HEAD)
    decoder, batch = decoder_like(adapted, ALPHA / RANK), supervise(tiny_documents(LENGTHS))
    decoder.state_loss_and_gradients(batch, _state_loss)
    expected = decoder.lora.gradients.clone()
    decoder.lora.gradients.zero_()
    loss, d_states = _state_loss(decoder.final_states(batch))
    assert decoder.state_loss_and_gradients(batch, lambda _states: (loss, d_states)) is loss
    assert torch.equal(decoder.lora.gradients, expected)
