"""Mixers with a state (the delta rule, Mamba-2): documents of several chunks, prefixes, tensors left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.ops.chunk_steps import CHUNK_TOKENS
from tests.support.float64_reference import without_float32_casts
from tests.support.parity import decoder_like, our_gradients, peft_gradients, peft_loss, relative_error, supervise
from tests.support.tiny_gguf import write_tiny_gguf_with_prediction
from tests.support.tiny_models import attach_lora, full_logits, save_tiny, tiny_documents, tiny_model

VARIANTS = ("qwen3_5_text", "qwen3_5_text-tied", "granite4-h", "bamba-steps", "falcon_h1", "nemotron_h")
LENGTHS = (2 * CHUNK_TOKENS + 22, 9, CHUNK_TOKENS + 6, 1)
SCALING = 1.7


def _eps(variant: str) -> str:
    return "layer_norm_epsilon" if variant == "nemotron_h" else "rms_norm_eps"


@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_of_several_chunks_equal_transformers_and_peft(variant: str) -> None:
    """In both dtypes against transformers in float64: over long documents its own float32 decays are 1e-5 from it."""
    adapted = attach_lora(tiny_model(variant, dtype=torch.float64, **{_eps(variant): 0.1}), rank=5, alpha=8.5)
    batch = supervise(tiny_documents(LENGTHS))
    with without_float32_casts(adapted):
        loss = peft_loss(adapted, batch)
    (loss / batch.supervised_tokens).backward()
    theirs = peft_gradients(adapted)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        decoder = decoder_like(adapted, SCALING, dtype=dtype)
        ours = decoder.loss_and_gradients(batch, 1 / batch.supervised_tokens)
        assert abs(ours.item() / loss.item() - 1) <= bound
        worst = {name: relative_error(found, theirs[name]) for name, found in our_gradients(decoder.lora).items()}
        assert worst.keys() == theirs.keys()
        assert max(worst.values()) <= bound, sorted(worst.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize("shared", [2, CHUNK_TOKENS + 11])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shared_prefix_is_the_same_as_its_copies(variant: str, shared: int) -> None:
    adapted = attach_lora(tiny_model(variant, dtype=torch.float64), rank=5, alpha=8.5)
    decoder = decoder_like(adapted, SCALING, dtype=torch.float64)
    prefix, *rest = tiny_documents((shared, 70, 3, 3, 1))
    together = supervise(rest)
    labels = torch.cat([torch.full_like(prefix, IGNORE_INDEX), together.labels])
    once = PackedBatch(torch.cat([prefix, together.input_ids]), labels, (shared, *together.lengths), (-1, 0, 0, 0, 0))
    pieces = zip(rest, together.labels.split(list(together.lengths)), strict=True)
    copies = [(torch.cat([prefix, ids]), torch.cat([labels[:shared], own])) for ids, own in pieces]
    apart = PackedBatch(
        torch.cat([ids for ids, _ in copies]),
        torch.cat([own for _, own in copies]),
        tuple(len(ids) for ids, _ in copies),
    )
    found = []
    for batch in (once, apart):
        decoder.lora.gradients.zero_()
        found.append((decoder.loss_and_gradients(batch, 0.1), decoder.lora.gradients.clone()))
    assert decoder.shares_prefixes
    assert relative_error(found[0][0], found[1][0]) < 1e-12
    assert relative_error(found[0][1], found[1][1]) < 1e-10


def test_layers_that_predict_further_tokens_are_left_out_with_a_note(tmp_path: Any) -> None:
    """In a directory as transformers leaves them out, in a file the blocks after the model's own."""
    model, document = tiny_model("qwen3_5_text"), tiny_documents([21])[0]
    directory = save_tiny(model, tmp_path / "model")
    path = directory / "model.safetensors"
    stored = load_file(path)
    save_file(stored | {"mtp.fc.weight": torch.ones(3, 4)}, path, metadata={"format": "pt"})
    config = directory / "config.json"
    config.write_text(config.read_text().replace("{", '{"mtp_num_hidden_layers": 1,', 1))
    for source in (open_model(directory), open_model(write_tiny_gguf_with_prediction(model, tmp_path / "model.gguf"))):
        assert not [name for name in source.tensor_names() if "mtp" in name or ".layers.4." in name]
        decoder = Decoder.from_source(source, dtype=torch.float32)
        assert any("(mtp) are left out" in note for note in decoder.config.notes)
        assert relative_error(decoder.logits(document), full_logits(model, document)) < 1e-5
