"""The engine against transformers + PEFT on tiny random models of every family, and its own invariances."""

from __future__ import annotations

import pytest
import torch

from backhand.nn.batch import PackedBatch
from backhand.nn.decoder import Decoder
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot
from support.no_autograd import autograd_raises
from support.parity import decoder_like, our_gradients, peft_gradients, peft_loss, relative_error, supervise
from support.tiny_models import VARIANTS, attach_lora, tiny_documents, tiny_model

# Longer than the sliding window (8) and the original rope length (16), two of equal length, one of a single token.
LENGTHS = (23, 9, 9, 1, 18)
RANK, ALPHA = 5, 8.5
SCALING = ALPHA / RANK


def adapted_pair(variant: str, **options):
    """A tiny PEFT model, our decoder with the same numbers, and a batch."""
    adapted = attach_lora(tiny_model(variant), rank=RANK, alpha=ALPHA)
    return adapted, decoder_like(adapted, SCALING, **options), supervise(tiny_documents(LENGTHS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_and_peft(variant):
    adapted, decoder, batch = adapted_pair(variant)
    with autograd_raises():
        ours = decoder.logits(batch.input_ids, batch.document_lengths)
    with torch.no_grad():
        theirs = torch.cat([adapted(input_ids=d[None]).logits[0] for d in tiny_documents(LENGTHS)])
    assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient_equal_peft(variant):
    adapted, decoder, batch = adapted_pair(variant)
    loss = peft_loss(adapted, batch)
    (loss / batch.supervised_tokens).backward()
    with autograd_raises():
        our_loss = decoder.loss_and_gradients(batch, 1 / batch.supervised_tokens)
    assert abs(our_loss.item() / loss.item() - 1) <= 1e-5
    ours, theirs = our_gradients(decoder.lora), peft_gradients(adapted)
    assert ours.keys() == theirs.keys()
    worst = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    assert max(worst.values()) <= 1e-5, sorted(worst.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_equals_kept(variant, recompute, dropout):
    _, kept, batch = adapted_pair(variant)
    _, recomputed, _ = adapted_pair(variant, recompute=recompute)
    for decoder in (kept, recomputed):
        with_dropout(decoder, dropout)
        decoder.loss_and_gradients(batch, 0.1, dropout_seed=7)
    assert torch.equal(kept.lora.gradients, recomputed.lora.gradients)


def with_dropout(decoder: Decoder, probability: float) -> None:
    """The decoder's adapter with this dropout in every slot."""
    old = decoder.lora
    lora = LoRAParameters(
        [LoRASlot(s.name, s.in_features, s.out_features, s.rank, s.scaling, probability) for s in old.slots.values()]
    )
    lora.values.copy_(old.values)
    decoder.attach(lora)


def test_dropout_changes_the_gradient_and_follows_the_seed():
    _, decoder, batch = adapted_pair("llama")
    with_dropout(decoder, 0.3)

    def gradient(seed):
        decoder.lora.gradients.zero_()
        decoder.loss_and_gradients(batch, 0.1, dropout_seed=seed)
        return decoder.lora.gradients.clone()

    assert torch.equal(gradient(7), gradient(7))
    assert relative_error(gradient(7), gradient(8)) > 0.01
    assert relative_error(gradient(7), gradient(None)) > 0.01


def test_one_adapter_serves_decoders_of_two_dtypes():
    adapted, decoder, batch = adapted_pair("llama")
    wide = decoder_like(adapted, SCALING, dtype=torch.float64)
    expected = decoder.logits(batch.input_ids, batch.document_lengths)
    wide.attach(decoder.lora)
    assert relative_error(wide.logits(batch.input_ids, batch.document_lengths), expected) <= 1e-5
    assert torch.equal(decoder.logits(batch.input_ids, batch.document_lengths), expected)


@pytest.mark.parametrize("variant", ["llama", "mistral", "gemma3_text"])
def test_packed_equals_unpacked_and_accumulated_equals_one_batch(variant):
    _, decoder, batch = adapted_pair(variant)
    total = decoder.loss_and_gradients(batch, 0.1)
    packed = decoder.lora.gradients.clone()
    decoder.lora.gradients.zero_()
    start, separate = 0, torch.zeros((), dtype=torch.float64)
    for length in batch.document_lengths:
        part = slice(start, start + length)
        separate += decoder.loss_and_gradients(PackedBatch(batch.input_ids[part], batch.labels[part], (length,)), 0.1)
        start += length
    assert abs(total - separate).item() <= 1e-5 * total.item()
    assert relative_error(decoder.lora.gradients, packed) <= 1e-5


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_documents_never_see_each_other(share):
    _, decoder, _ = adapted_pair("llama")
    first, second = tiny_documents((17, 11))
    other = tiny_documents((17,), seed=9)[0]
    alone = decoder.token_losses(supervise([second], share=share, seed=4))
    for neighbour in (first, other):
        labels = supervise([second], share=share, seed=4).labels
        batch = PackedBatch(
            torch.cat([neighbour, second]), torch.cat([torch.full_like(neighbour, -100), labels]), (17, 11)
        )
        assert relative_error(decoder.token_losses(batch), alone) <= 1e-5


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (r"model\.layers\.1\.mlp\.down_proj", 1),
        (r"model\.layers\.2\.self_attn\.(q|k)_proj", 2),
        (r"model\.layers\.1\.mlp\.(gate|up)_proj", 2),
        (r"model\.layers\.1\.self_attn\.o_proj", 1),
        (r".*v_proj|lm_head", 4),
    ],
)
def test_parts_of_the_model_adapted(targets, expected):
    """The backward pass stops at the lowest adapted module, and a lone member of a group works."""
    adapted = attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA, target_modules=targets)
    decoder, batch = decoder_like(adapted, SCALING), supervise(tiny_documents(LENGTHS))
    peft_loss(adapted, batch).backward()
    decoder.loss_and_gradients(batch, 1.0)
    ours, theirs = our_gradients(decoder.lora), peft_gradients(adapted)
    assert ours.keys() == theirs.keys() and len(theirs) == 2 * expected
    for name, gradient in theirs.items():
        assert relative_error(ours[name], gradient) <= 1e-5, name


def test_without_supervised_tokens_the_gradient_is_zero():
    _, decoder, batch = adapted_pair("llama")
    nothing = PackedBatch(batch.input_ids, torch.full_like(batch.labels, -100), batch.document_lengths)
    assert decoder.loss_and_gradients(nothing, 1.0).item() == 0.0
    assert torch.count_nonzero(decoder.lora.gradients) == 0
    empty = PackedBatch(batch.input_ids[:0], batch.labels[:0], ())
    assert decoder.loss_and_gradients(empty, 1.0).item() == 0.0
    assert torch.count_nonzero(decoder.lora.gradients) == 0
