"""The engine against transformers + PEFT on tiny random models of every family, and its own invariances."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter
from backhand.errors import UsageError
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.lora_parameters import LoRAParameters
from backhand.verify.decoder_op import LOSS_SCALING, DecoderInputs
from backhand.verify.packed_tokens import unshare_prefixes
from backhand.verify.runner import MISTAKE_BOUND, load_proofs
from tests.support.no_autograd import autograd_raises
from tests.support.parity import (
    decoder_like,
    our_gradients,
    peft_gradients,
    peft_loss,
    relative_error,
    supervise,
    wholly_in_float64,
)
from tests.support.peer_faults import COMPUTED_VARIANTS
from tests.support.tiny_models import attach_lora, tiny_documents, tiny_model

# Longer than the sliding window (8) and the original rope length (16), two of equal length, one of a single token.
LENGTHS = (23, 9, 9, 1, 18)
RANK, ALPHA = 5, 8.5
SCALING = ALPHA / RANK


def adapted_pair(variant: str, dtype: torch.dtype = torch.float32, **options):
    """A tiny PEFT model without gradients, our decoder with the same numbers, and a batch."""
    adapted = _adapted(variant, dtype)
    adapted.zero_grad()
    return adapted, decoder_like(adapted, SCALING, dtype=dtype, **options), supervise(tiny_documents(LENGTHS))


@cache
def _adapted(variant: str, dtype: torch.dtype):
    adapted = attach_lora(tiny_model(variant, dtype=dtype), rank=RANK, alpha=ALPHA)
    with torch.no_grad():  # longrope computes the frequencies of long documents in the first pass, in float32
        adapted(input_ids=tiny_documents((max(LENGTHS),))[0][None])
    _AS_MADE.append((adapted, {name: tensor.clone() for name, tensor in adapted.state_dict().items()}))
    return adapted


_AS_MADE = []


@pytest.fixture(autouse=True, scope="module")
def _nothing_changes_what_tests_share():
    yield
    for adapted, before in _AS_MADE:
        assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


@pytest.mark.parametrize("variant", COMPUTED_VARIANTS)
def test_logits_equal_transformers_and_peft(variant):
    adapted, decoder, batch = adapted_pair(variant)
    with autograd_raises():
        ours = decoder.logits(batch.input_ids, batch.lengths)
    with torch.no_grad():
        theirs = torch.cat([adapted(input_ids=d[None]).logits[0] for d in tiny_documents(LENGTHS)])
    assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("variant", COMPUTED_VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
def test_loss_and_every_gradient_equal_peft(variant, dtype, bound):
    adapted, decoder, batch = adapted_pair(variant, dtype)
    with wholly_in_float64() if dtype == torch.float64 else nullcontext():
        loss = peft_loss(adapted, batch)
        (loss / batch.supervised_tokens).backward()
    with autograd_raises():
        our_loss = decoder.loss_and_gradients(batch, 1 / batch.supervised_tokens)
    assert abs(our_loss.item() / loss.item() - 1) <= bound
    ours, theirs = our_gradients(decoder.lora), peft_gradients(adapted)
    assert ours.keys() == theirs.keys()
    worst = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    assert max(worst.values()) <= bound, sorted(worst.items(), key=lambda item: -item[1])[:3]


# PEFT draws masks of its own, so that it cannot tell a wrong one.
OF_DROPOUT = {"dropout ignored", "dropout of another seed", "head's dropout ignored"}
WITH_EVERY_TRAIT = (
    "llama", "gemma3_text", "gemma4_text", "granite", "glm4", "lfm2", "ministral3", "phi3-longrope", "smollm3",
)  # fmt: skip


def test_transformers_rejects_every_mutant_of_the_decoder():
    """In float64, also where documents continue a shared prefix: a second reference, which shares no line with ours."""
    (proof,) = load_proofs("decoder")
    left = {(mutant.name, mutant.gradient): mutant for mutant in proof.mutants if mutant.name not in OF_DROPOUT}
    for variant in WITH_EVERY_TRAIT:
        adapted, decoder, plain = adapted_pair(variant, torch.float64)
        shared = PackedBatch(plain.input_ids, plain.labels, (14, 9, 9, 10, 18), (-1, 0, 0, 0, 3))
        for batch in (plain, shared) if decoder.shares_prefixes else (plain,):
            adapted.zero_grad()
            with wholly_in_float64():
                (LOSS_SCALING * peft_loss(adapted, unshare_prefixes(batch) if batch.parents else batch)).backward()
            inputs, truth = DecoderInputs(decoder, decoder.lora, batch, LOSS_SCALING, None), peft_gradients(adapted)
            for key, mutant in list(left.items()):
                gradients = getattr(mutant.spoil(proof.backward)(torch.tensor(LOSS_SCALING), inputs), mutant.gradient)
                names = [f"{name}.{mutant.gradient.removeprefix('d_')}" for name in decoder.lora.slots]
                errors = [relative_error(one, truth[name]) for name, one in zip(names, gradients, strict=True)]
                if max(errors) > MISTAKE_BOUND:
                    del left[key]
    assert not left


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize(
    "variant",
    [
        "llama",
        "qwen3",
        "gemma3_text",
        "gemma4_text",
        "lfm2",
        "qwen3_5_text",
        "bamba",
        "falcon_h1",
        "nemotron_h",
        "gpt_oss",
        "granite4-experts",
    ],
)
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
    lora = LoRAParameters(replace(slot, dropout=0.0 if slot.experts else probability) for slot in old.slots.values())
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
    expected = decoder.logits(batch.input_ids, batch.lengths)
    wide.attach(decoder.lora)
    assert relative_error(wide.logits(batch.input_ids, batch.lengths), expected) <= 1e-5
    assert torch.equal(decoder.logits(batch.input_ids, batch.lengths), expected)


@pytest.mark.parametrize(
    "variant", ["llama", "mistral", "gemma3_text", "gemma4_text", "lfm2", "qwen3_5_text", "granite4-h", "gpt_oss"]
)
def test_packed_equals_unpacked_and_accumulated_equals_one_batch(variant):
    _, decoder, batch = adapted_pair(variant)
    total = decoder.loss_and_gradients(batch, 0.1)
    packed = decoder.lora.gradients.clone()
    decoder.lora.gradients.zero_()
    start, separate = 0, torch.zeros((), dtype=torch.float64)
    for length in batch.lengths:
        part = slice(start, start + length)
        separate += decoder.loss_and_gradients(PackedBatch(batch.input_ids[part], batch.labels[part], (length,)), 0.1)
        start += length
    assert abs(total - separate).item() <= 1e-5 * total.item()
    assert relative_error(decoder.lora.gradients, packed) <= 1e-5


def test_no_prefix_is_shared_where_angles_depend_on_the_length():
    _, decoder, batch = adapted_pair("phi3-longrope")
    assert not decoder.shares_prefixes and adapted_pair("phi3")[1].shares_prefixes
    lengths = batch.lengths
    shared = PackedBatch(batch.input_ids, batch.labels, (4, lengths[0] - 4, *lengths[1:]), (-1, *(0,) * len(lengths)))
    with pytest.raises(ValueError, match="documents cannot share a prefix"):
        decoder.loss(shared)


@pytest.mark.parametrize("variant", ["llama", "gemma4_text", "lfm2", "qwen3_5_text", "bamba", "gpt_oss"])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_documents_never_see_each_other(share, variant):
    _, decoder, _ = adapted_pair(variant)
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


@pytest.mark.parametrize(
    ("variant", "targets", "expected"),
    [
        ("lfm2", r"model\.layers\.2\.conv\.in_proj", 1),
        ("lfm2", r"model\.layers\.[12]\.(conv|self_attn)\.out_proj", 2),
        ("lfm2", r"model\.layers\.1\.feed_forward\.w[13]", 2),
        ("lfm2", r"model\.layers\.3\.feed_forward\.w2", 1),
        ("qwen3_5_text", r"model\.layers\.2\.linear_attn\.in_proj_a", 1),
        ("qwen3_5_text", r"model\.layers\.1\.linear_attn\.(in_proj_z|in_proj_b|out_proj)", 3),
        ("qwen3_5_text", r"model\.layers\.3\.self_attn\.q_proj|.*2\.mlp\.down_proj", 2),
        ("granite4-h", r"model\.layers\.1\.mamba\.in_proj", 1),
        ("bamba", r"model\.layers\.2\.(mamba\.out_proj|feed_forward\.up_proj)", 2),
        ("falcon_h1", r"model\.layers\.1\.(mamba\.out_proj|self_attn\.k_proj)", 2),
        ("nemotron_h", r"model\.layers\.1\.mixer\.up_proj", 1),
        ("nemotron_h", r"model\.layers\.(3\.mixer\.out|4\.mixer\.down)_proj", 2),
    ],
)
def test_parts_of_a_model_with_other_mixers_adapted(variant, targets, expected):
    adapted = attach_lora(tiny_model(variant), rank=RANK, alpha=ALPHA, target_modules=targets)
    decoder, batch = decoder_like(adapted, SCALING), supervise(tiny_documents(LENGTHS))
    peft_loss(adapted, batch).backward()
    decoder.loss_and_gradients(batch, 1.0)
    ours, theirs = our_gradients(decoder.lora), peft_gradients(adapted)
    assert ours.keys() == theirs.keys() and len(theirs) == 2 * expected
    for name, gradient in theirs.items():
        assert relative_error(ours[name], gradient) <= 1e-5, name


@pytest.mark.parametrize("variant", ["lfm2", "lfm2-biases"])
@pytest.mark.parametrize("shared", [1, 2, 9])
def test_a_shared_prefix_with_convolutions_equals_whole_documents(variant, shared):
    """Each document goes on from the prefix's last tokens, in the convolutions too."""
    _, decoder, _ = adapted_pair(variant)
    (prefix,), endings = tiny_documents((shared,), seed=5), tiny_documents((7, 1, 4), seed=6)
    whole = [torch.cat([prefix, ending]) for ending in endings]
    labels = [torch.cat([torch.full((shared,), -100), supervise([ending], share=1.0).labels]) for ending in endings]
    apart = PackedBatch(torch.cat(whole), torch.cat(labels), tuple(len(one) for one in whole))
    ids = torch.cat([prefix, *endings])
    own = torch.cat([labels[0][:shared], *(each[shared:] for each in labels)])
    together = PackedBatch(ids, own, (shared, *(len(one) for one in endings)), (-1, 0, 0, 0))
    found = []
    for batch in (apart, together):
        decoder.lora.gradients.zero_()
        found.append((decoder.loss_and_gradients(batch, 0.1), decoder.lora.gradients.clone()))
    (loss, gradient), (shared_loss, shared_gradient) = found
    assert abs(loss - shared_loss).item() <= 1e-5 * loss.item()
    assert relative_error(shared_gradient, gradient) <= 1e-5


def test_the_convolution_itself_cannot_be_trained():
    shapes = adapted_pair("lfm2")[1].module_shapes()
    for name in ("0.conv", "conv.conv"):
        with pytest.raises(UsageError, match=r"conv\.conv\.weight cannot be trained"):
            resolve_adapter(LoRAConfig(target_modules=("w1",), modules_to_save=(name,)), shapes)


@pytest.mark.parametrize(("variant", "mixer"), [("qwen3_5_text", "linear_attn"), ("granite4-h", "mamba")])
def test_parts_around_a_state_cannot_be_trained(variant, mixer):
    shapes = adapted_pair(variant)[1].module_shapes()
    for name in (f"0.{mixer}", "conv1d"):
        with pytest.raises(UsageError, match=rf"{mixer}\.\S+ cannot be trained"):
            resolve_adapter(LoRAConfig(target_modules=("q_proj",), modules_to_save=(name,)), shapes)


def test_without_supervised_tokens_the_gradient_is_zero():
    _, decoder, batch = adapted_pair("llama")
    nothing = PackedBatch(batch.input_ids, torch.full_like(batch.labels, -100), batch.lengths)
    assert decoder.loss_and_gradients(nothing, 1.0).item() == 0.0
    assert torch.count_nonzero(decoder.lora.gradients) == 0
    empty = PackedBatch(batch.input_ids[:0], batch.labels[:0], ())
    assert decoder.loss_and_gradients(empty, 1.0).item() == 0.0
    assert torch.count_nonzero(decoder.lora.gradients) == 0
