"""What `inspect` finds, against NumPy on the updates that PEFT forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from torch import nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import inject
from backhand.adapters.loading import source_digests
from backhand.adapters.record import AdapterRecord
from backhand.arithmetic.inspect import effective_rank, inspect_adapter
from backhand.arithmetic.options import InspectOptions
from backhand.cli.main import main
from backhand.errors import ArtifactError, UsageError
from backhand.nn.loading import open_model
from tests.support.peft_adapters import save_with_peft, updates_by_peft
from tests.support.tiny_models import save_tiny, tiny_model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def base(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(model, Path(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def adapter(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(tmp_path_factory.mktemp("adapters")) / "mine"
    return save_with_peft(
        model, directory, 1, target_modules=["q_proj", "lm_head"], rank_pattern={"lm_head": 5}, use_rslora=True
    )


def test_every_number(model: nn.Module, base: Path, adapter: Path) -> None:
    found = inspect_adapter(InspectOptions(adapter, model=str(base), error=0.4))
    expected = updates_by_peft(model, adapter)
    assert {module.module for module in found.modules} == set(expected)
    for module in found.modules:
        update = expected[module.module]
        values = np.linalg.svd(update)[1][: module.rank]
        weight = model.get_submodule(module.module).weight.detach().double().numpy()
        assert module.shape == update.shape
        assert module.rank == (5 if module.module == "lm_head" else 3)
        assert module.alpha == 5 and module.scaling == pytest.approx(5 / math.sqrt(module.rank))
        assert module.norm == pytest.approx(np.linalg.norm(update), rel=1e-6)
        assert module.relative_norm == pytest.approx(np.linalg.norm(update) / np.linalg.norm(weight), rel=1e-6)
        assert module.singular_values == pytest.approx(values, rel=1e-6)
        shares = values / values.sum()
        assert module.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
        lost = [np.linalg.norm(values[rank:]) / np.linalg.norm(values) for rank in range(module.rank + 1)]
        assert lost[module.needed_rank] <= 0.4 < lost[module.needed_rank - 1]
        assert module.wasted_rank == module.rank - module.needed_rank
    assert any(module.wasted_rank for module in found.modules)


def test_parts_add_up_to_the_file(adapter: Path) -> None:
    found = inspect_adapter(InspectOptions(adapter))
    parts = {part.name: part for part in found.parts}
    file = adapter / "adapter_model.safetensors"
    assert sum(part.stored_bytes for part in found.parts) == file.stat().st_size
    tensors = load_file(file)
    assert parts["lora_A"].stored_bytes == sum(t.nbytes for key, t in tensors.items() if "lora_A" in key)
    assert parts["lora_A"].tensors == 4 and parts["lora_B"].tensors == 4
    assert parts["copies of base weights"].stored_bytes == 307 * 60 * 4


@pytest.mark.parametrize(
    ("values", "expected"), [([1, 1, 1, 0], 3.0), ([2, 0], 1.0), ([0, 0], 0.0), ([3, 1], math.exp(0.5623351446))]
)
def test_effective_rank_of_known_spectra(values: list[float], expected: float) -> None:
    assert effective_rank(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected)


def test_an_untrained_adapter_wastes_all_of_its_rank(base: Path, tmp_path: Path) -> None:
    inject(tiny_model("llama"), LoRAConfig(rank=3, target_modules=("q_proj",))).save(tmp_path / "fresh")
    found = inspect_adapter(InspectOptions(tmp_path / "fresh"))
    assert [(m.norm, m.effective_rank, m.needed_rank, m.wasted_rank) for m in found.modules] == [(0, 0, 0, 3)] * 3
    assert main(["inspect", str(tmp_path / "fresh"), "--plot", "--output", str(tmp_path / "out")]) == 0


def recorded(model: nn.Module, base: Path, directory: Path, base_model: str) -> Path:
    adapter = inject(tiny_model("llama"), LoRAConfig(rank=2, target_modules=("q_proj",)))
    digests = source_digests(open_model(base), [target.name for target in adapter.targets])
    return adapter.save(directory, base_model=base_model, record=AdapterRecord(**digests))


def test_the_base_that_the_adapter_names_is_used_if_it_is_here_and_the_same(
    model: nn.Module, base: Path, tmp_path: Path
) -> None:
    named = recorded(model, base, tmp_path / "named", str(base))
    found = inspect_adapter(InspectOptions(named))
    assert found.notes == () and all(module.weight_norm for module in found.modules)
    other = save_tiny(tiny_model("llama", seed=8), tmp_path / "other")
    wrong = recorded(model, base, tmp_path / "wrong", str(other))
    found = inspect_adapter(InspectOptions(wrong))
    assert len(found.notes) == 1 and "not those the adapter was trained on" in found.notes[0]
    assert all(module.weight_norm is None for module in found.modules)
    with pytest.raises(ArtifactError, match="does not belong"):
        inspect_adapter(InspectOptions(wrong, model=str(other)))
    forced = inspect_adapter(InspectOptions(wrong, model=str(other), force_base=True))
    assert "used by force" in forced.notes[0] and all(module.weight_norm for module in forced.modules)


def test_a_base_that_is_not_here_is_not_fetched(
    model: nn.Module, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backhand.nn.loading import hub

    monkeypatch.setattr(hub, "_fetched", lambda *_: pytest.fail("a base model was fetched"))
    found = inspect_adapter(InspectOptions(recorded(model, base, tmp_path / "a", "owner/absent-model")))
    assert len(found.notes) == 1 and "not in the local cache" in found.notes[0]


def test_the_command(adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", str(adapter), "--model", str(base)]
    assert main([*words, "--output", str(tmp_path / "out"), "--plot"]) == 0
    shown = capsys.readouterr().out.replace(str(adapter), "")
    assert "q_proj" in shown and "‖ΔW‖/‖W‖" in shown and "copies of base weights" in shown and "100" not in shown
    assert main([*words, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert len(summary["modules"]) == 4 and summary["modules"][0]["singular_values"]
    picture = imread(tmp_path / "out" / "inspect.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 900
    assert np.allclose(picture[..., 0], picture[..., 1]) and np.allclose(picture[..., 0], picture[..., 2])  # grey
    with pytest.raises(UsageError, match="error 1"):
        inspect_adapter(InspectOptions(adapter, error=1.0))


def test_more_than_factors_is_shown(adapter: Path, tmp_path: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((adapter / file).read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] = torch.ones(60)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    parts = {part.name: part.stored_bytes for part in inspect_adapter(InspectOptions(tmp_path)).parts}
    assert parts["whole modules"] == 240
