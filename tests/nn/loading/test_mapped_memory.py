"""Files that were read do not stay in memory in addition to the weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from backhand.adapters.record import base_digest
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny, tiny_model

SMAPS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells what is resident of a file")
SIZES = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 4000}


def resident_bytes(file: Path) -> int:
    """Return the resident bytes of the file's mappings."""
    total, counting = 0, False
    for line in SMAPS.read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counting = line.endswith(str(file))
        elif counting and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("kind", ["safetensors", "gguf-F16", "gguf-Q8_0"])
def test_weights_are_not_held_twice(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama", **SIZES)
    if kind == "safetensors":
        path = save_tiny(model, tmp_path / "model", tokenizer=False)
        file = path / "model.safetensors"
    else:
        file = path = tmp_path / "model.gguf"
        write_tiny_gguf(model, path, storage=GGMLQuantizationType[kind.removeprefix("gguf-")])
    source = open_model(path)
    decoder = Decoder.from_source(source, dtype=torch.float32)
    # What is left: the header, and the neighbours that the system maps along with a page.
    assert resident_bytes(file) < file.stat().st_size / 2
    once = {name: tensor.clone() for name, tensor in decoder.frozen_tensors()}
    for name, tensor in Decoder.from_source(source, dtype=torch.float32).frozen_tensors():
        assert torch.equal(tensor, once[name]), "what was given back is read again"
    assert base_digest(["model.norm.weight"], source.load) == base_digest(["model.norm.weight"], source.load)
