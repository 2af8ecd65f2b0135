"""The figures about an adapter, against the same from the matrix that is never formed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from backhand.report.adapter_changes import changes_of
from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.report.train import train
from tests.support.page import Page
from tests.support.tiny_run import TinyRun


def test_norms_of_a_real_run_are_those_of_its_base(finished: Path, tiny: TinyRun) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    changes, source, also_trained = changes_of(read_run(finished))
    assert source == "adapter" and len(changes) == 14 and also_trained == ()
    for change in changes:
        weight = model.get_submodule(change.module).weight.detach().double()
        assert change.relative_norm is not None and math.isfinite(change.relative_norm)
        assert change.norm / change.relative_norm == pytest.approx(float(torch.linalg.matrix_norm(weight)), rel=1e-5)


def test_before_the_adapter_is_published_the_newest_checkpoint_counts(finished: Path) -> None:
    expected = changes_of(read_run(finished)).modules
    shutil.rmtree(finished / "adapter")
    changes, source, _ = changes_of(read_run(finished))
    assert source == "checkpoints/step-12"
    assert [change.module for change in changes] == [change.module for change in expected]
    shutil.rmtree(finished / "checkpoints")
    assert changes_of(read_run(finished)) == ([], "there is no adapter yet", ())


def test_a_damaged_adapter_is_named(finished: Path) -> None:
    (finished / "adapter" / "adapter_model.safetensors").write_bytes(b"nonsense")
    changes, source, _ = changes_of(read_run(finished))
    assert changes == [] and source.startswith("the adapter cannot be read")


@pytest.mark.parametrize(
    ("options", "modules", "said"),
    [
        ({"use_dora": True}, 14, "the lengths of the rows of 14 weights (DoRA)"),
        ({"lora_bias": True}, 14, "the bias of lora_B in 14 modules"),
        ({"modules_to_save": ("lm_head", "model.norm")}, 14, "2 tensors trained in full"),
        ({"trainable_token_indices": (3, 5)}, 14, "single rows of 1 embedding"),
        ({"target_modules": ("embed_tokens", "v_proj")}, 3, None),
    ],
)
def test_every_kind_of_adapter_is_shown_and_what_the_norms_leave_out_is_said(
    options: dict[str, object], modules: int, said: str | None, tiny: TinyRun, tmp_path: Path
) -> None:
    train(tiny.config(tmp_path / "run", max_steps=1, **options))
    changes, source, also_trained = changes_of(read_run(tmp_path / "run"))
    assert source == "adapter" and len(changes) == modules
    assert all(change.relative_norm is not None and change.relative_norm > 0 for change in changes)
    assert also_trained == (() if said is None else (said,))
    page = Page(run_page(read_run(tmp_path / "run")))
    section = page.one("section", id="adapter").text
    assert f"of {modules} modules moved" in section
    assert ("not part of" in section) == (said is not None) and (said or "") in section
    uses = page.one("section", id="result").text  # vLLM reads factors alone, and a bias of lora_B cannot be merged
    assert "--enable-lora" not in uses and ("vllm serve merged" in uses) == ("lora_bias" not in options)
