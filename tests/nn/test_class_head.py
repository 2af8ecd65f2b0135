"""Classification heads against transformers' classes with PEFT: logits, every gradient, and the files of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backhand.adapters.record import AdapterRecord
from backhand.engines.engine import BoundModel
from backhand.files import write_together
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.class_head import class_gradients, class_logits
from tests.support.class_models import bound_model, class_model, their_gradients, their_model, wider
from tests.support.no_autograd import autograd_raises
from tests.support.parity import relative_error, wholly_in_float64
from tests.support.tiny_models import tiny_documents
from tests.support.tiny_tokenizer import tiny_tokenizer

LENGTHS = (23, 9, 9, 1, 18)
LABELS = 3
MODELS: dict[str, dict[str, Any]] = {
    "bert": {},
    "modernbert": {},
    "modernbert-biases": {"classifier_pooling": "mean", "classifier_bias": True, "classifier_activation": "gelu_new"},
    "llama": {},
    "qwen3": {},
    "gemma3_text": {},
    "embeddinggemma": {},
}


def documents() -> list[torch.Tensor]:
    """Documents without the padding token at their end."""
    return [torch.cat((one, torch.tensor([7]))) for one in tiny_documents(LENGTHS)]


def packed(texts: list[torch.Tensor], pooling: str) -> PackedBatch:
    """The documents with a label at each position that the pooling reads."""
    labels = [torch.full_like(one, 1 if pooling == "mean" else IGNORE_INDEX) for one in texts]
    for one in labels:
        one[0 if pooling == "cls" else -1] = 1
    return PackedBatch(torch.cat(texts), torch.cat(labels), tuple(map(len, texts)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Directories of base models, by name."""
    place, made = tmp_path_factory.mktemp("classifiers"), {}

    def directory(name: str) -> Path:
        if name not in made:
            class_model(name, LABELS, **MODELS[name]).save_pretrained(place / name)
            tiny_tokenizer().save_pretrained(place / name)
            made[name] = place / name
        return made[name]

    return directory


def write_adapter(bound: BoundModel, directory: Path) -> None:
    record = AdapterRecord(
        classification={"problem_type": "single_label_classification", "labels": ["no", "maybe", "yes"]}
    )
    write_together(directory, bound.adapter_files(record, {}))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_transformers_and_peft(name: str, saved: Any, tmp_path: Path) -> None:
    bound = bound_model(saved(name), torch.float32, LABELS)
    write_adapter(bound, tmp_path / "adapter")
    theirs, decoder = their_model(saved(name), tmp_path / "adapter"), bound.model
    assert theirs.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    texts = documents()
    batch = packed(texts, decoder.config.class_head.pooling)
    with torch.no_grad():
        expected = torch.cat([theirs(input_ids=text[None]).logits for text in texts])
    assert relative_error(class_logits(decoder, batch), expected) <= 1e-5

    wide = wider(bound, saved(name))
    d_logits = torch.randn(len(texts), LABELS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with wholly_in_float64():
        logits = torch.cat([theirs.double()(input_ids=text[None]).logits for text in texts])
        (logits * d_logits).sum().backward()
    with autograd_raises():
        loss = class_gradients(wide, batch, lambda ours: ((ours * d_logits).sum(), d_logits))
    assert float(loss) == pytest.approx(float((logits.detach() * d_logits).sum()), rel=1e-9)
    expected = their_gradients(theirs, decoder.config.class_head.prefix)
    for tensor, _ in wide.lora.named_tensors():
        assert relative_error(wide.lora.gradient(tensor), expected[tensor]) <= 1e-9, tensor
