"""A tiny model as directory and as GGUF file, made once; nothing here is on a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_adapters import SCALINGS, save_tiny_adapter
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny, tiny_model


@dataclass(frozen=True)
class Tiny:
    """A model with a tied head, the same weights in both formats, and adapters by the names of `SCALINGS`."""

    model: Any
    directory: Path
    gguf: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model("llama-tied")
    return Tiny(
        model,
        save_tiny(model, folder / "base"),
        write_tiny_gguf(model, folder / "base.gguf"),
        {name: save_tiny_adapter(model, folder / name, **lora) for name, lora in SCALINGS.items()},
    )
