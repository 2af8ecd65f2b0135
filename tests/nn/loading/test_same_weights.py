"""One model in several kinds of file is one model: equal digests, equal tokenizers, equal logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as StorageType
from transformers import PreTrainedModel

from backhand.adapters.record import base_digest, text_digest, tokenizer_digest
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import ModelSource, open_model
from tests.support.in_memory import InMemoryModel
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny, tiny_documents, tiny_model


def _sources(model: PreTrainedModel, directory: Path) -> dict[str, ModelSource]:
    return {
        "directory": open_model(save_tiny(model, directory / "whole")),
        "shards": open_model(save_tiny(model, directory / "shards", max_shard_size="60KB")),
        "F32": open_model(write_tiny_gguf(model, directory / "f32.gguf")),
        "BF16": open_model(write_tiny_gguf(model, directory / "bf16.gguf", storage=StorageType.BF16)),
        "memory": InMemoryModel(model.config.to_dict(), model.state_dict()),
    }


@pytest.mark.parametrize("variant", ["llama", "llama-biases", "qwen3"])
def test_digests_and_logits_agree(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant, dtype=torch.bfloat16)
    sources = _sources(model, tmp_path)
    digests = {kind: base_digest(source.tensor_names(), source.load) for kind, source in sources.items()}
    pieces = {kind: base_digest(source.tensor_names(), source.load_in_pieces) for kind, source in sources.items()}
    assert pieces == digests
    assert len(set(digests.values())) == 1, digests
    document = tiny_documents([20])[0]
    logits = [Decoder.from_source(source, dtype=torch.float32).logits(document) for source in sources.values()]
    assert all(torch.equal(each, logits[0]) for each in logits)


def test_one_changed_number_changes_the_digest(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = open_model(save_tiny(model, tmp_path / "before", tokenizer=False))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 4] *= -1
    after = open_model(save_tiny(model, tmp_path / "after", tokenizer=False))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert base_digest([name], before.load) != base_digest([name], after.load)
    others = [other for other in before.tensor_names() if other != name]
    assert base_digest(others, before.load) == base_digest(others, after.load)


def test_tokenizers_agree(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=300)
    sources = _sources(model, tmp_path)
    tokenizers = [sources[kind].tokenizer() for kind in ("directory", "F32")]
    assert len({tokenizer_digest(tokenizer) for tokenizer in tokenizers}) == 1
    assert len({text_digest(tokenizer.chat_template) for tokenizer in tokenizers}) == 1
