"""Models as transformers has saved them, with what people's tools add to config.json, train by the decoder engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from backhand.nn.families.family_parsing import FAMILIES, decoder_config
from backhand.nn.loading import open_model
from backhand.nn.loading.transformers_model import load_transformers_model
from backhand.training.run import train
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import TinyRun
from tests.support.tiny_tokenizer import tiny_tokenizer

FOREIGN: dict[str, Any] = {
    "max_sequence_length": 4096,
    "unsloth_fixed": True,
    "mm_hidden_size": 1152,
    "use_flash_attn": True,
    "auto_map": {"AutoModelForCausalLM": "modeling_custom.CustomForCausalLM"},
    "quantization": None,
    "_model_name_or_path": "somebody/model",
    "unk_token_id": 0,
    "flash_attention": {"version": 2},
    "seq_length": 512,
    "tokenizer_model_max_length": 2048,
    "mm_projector_type": "mlp2x_gelu",
    "freeze_mm_mlp_adapter": False,
    "tune_mm_mlp_adapter": False,
}
"""More than a dozen fields that no language model reads."""


def add_foreign(directory: Path) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **FOREIGN}))
    return directory


# Nothing of a family that has been saved again tells from what it came.
@pytest.mark.parametrize(("family", "start"), list(zip(FAMILIES, ("directory", "gguf") * len(FAMILIES), strict=False)))
def test_every_family_saved_again_trains_by_the_engine(family: str, start: str, tiny: TinyRun, tmp_path: Path) -> None:
    # A file of architecture `llama` with a window is a Mistral here; llama.cpp reads none.
    overrides: dict[str, Any] = {"sliding_window": None} if family == "mistral" and start == "gguf" else {}
    model = tiny_model(family, **overrides)
    if start == "gguf":
        source = open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf"))
    else:
        source = open_model(save_tiny(model, tmp_path / "first"))
    saved = tmp_path / "saved"
    load_transformers_model(source, dtype=torch.float32).save_pretrained(saved)
    tiny_tokenizer().save_pretrained(saved)
    options: dict[str, Any] = {"max_steps": 2, "eval_data": (), "answers": 0}
    plain = train(tiny.config(tmp_path / "plain", model=str(saved), **options))
    read = decoder_config(open_model(saved).config)
    again = options | {"model": str(add_foreign(saved))}
    assert decoder_config(open_model(saved).config) == read
    if start == "directory":  # transformers opens it too, and computes the same
        assert transformers.AutoConfig.from_pretrained(saved).unk_token_id == 0
        # From one adapter: beginnings are drawn in the order of modules, which is another one in transformers' Phi-3.
        again |= {"from_adapter": str(tmp_path / "plain" / "adapter")}
    summary = train(tiny.config(tmp_path / "run", **again))
    assert (summary.engine, summary.engine_note) == ("backhand", None)
    if start == "gguf":
        assert summary.last_loss == plain.last_loss
    else:
        reference = train(tiny.config(tmp_path / "reference", engine="transformers", **again))
        assert reference.last_loss == pytest.approx(summary.last_loss, rel=1e-4)


@pytest.mark.smollm2
def test_smollm2_saved_by_transformers_trains_by_the_engine(tiny: TinyRun, tmp_path: Path) -> None:
    source = open_model("smollm2-135m")
    saved = tmp_path / "saved"
    load_transformers_model(source, dtype=torch.bfloat16).save_pretrained(saved)
    source.tokenizer().save_pretrained(saved)
    options: dict[str, Any] = {"max_steps": 1, "dtype": "bfloat16", "eval_data": (), "answers": 0, "batch_rows": 2}
    again = train(tiny.config(tmp_path / "run", model=str(add_foreign(saved)), **options))
    assert (again.engine, again.engine_note) == ("backhand", None)
    straight = train(tiny.config(tmp_path / "straight", model="smollm2-135m", **options))
    assert again.first_loss == straight.first_loss
