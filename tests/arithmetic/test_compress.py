"""`compress` keeps to its error at the smallest rank, by NumPy on the updates that PEFT forms."""

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

from backhand.arithmetic.combine import combine
from backhand.arithmetic.compress import compress_adapter
from backhand.arithmetic.options import CombineOptions, CompressOptions
from backhand.cli.main import main
from backhand.errors import UsageError
from tests.support.peft_adapters import FloatArray, save_with_peft, updates_by_peft
from tests.support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def adapter(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(tmp_path_factory.mktemp("adapters")) / "mine"
    return save_with_peft(model, directory, 1, r=9, use_rslora=True, alpha_pattern={"q_proj": 2})


def lost(update: FloatArray, rank: int) -> float:
    values = np.linalg.svd(update)[1]
    return float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))


@pytest.mark.parametrize("error", [0.2, 0.5, 0.8])
def test_the_smallest_rank_for_the_error(error: float, model: nn.Module, adapter: Path, tmp_path: Path) -> None:
    result = compress_adapter(CompressOptions(adapter, error, tmp_path / "small"))
    before, after = updates_by_peft(model, adapter), updates_by_peft(model, tmp_path / "small")
    squares = [0.0, 0.0]
    for name, module in result.adapter.modules.items():
        off = float(np.linalg.norm(after[name] - before[name]))
        achieved = off / float(np.linalg.norm(before[name]))
        assert achieved <= error < lost(before[name], module.factors.rank - 1)
        assert module.error == pytest.approx(achieved, rel=1e-5)
        squares = [squares[0] + off**2, squares[1] + float(np.linalg.norm(before[name])) ** 2]
    assert result.adapter.error == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-5)
    size = (tmp_path / "small" / "adapter_model.safetensors").stat().st_size
    assert result.stored_bytes == size < result.source.stored_bytes
    assert len(set(result.adapter.ranks)) > 1  # a rank of its own for every module


def test_no_error_takes_away_only_what_is_empty(model: nn.Module, adapter: Path, tmp_path: Path) -> None:
    combine(CombineOptions("concatenate", (adapter, adapter), tmp_path / "twice"))
    result = compress_adapter(CompressOptions(tmp_path / "twice", 0.0, tmp_path / "small"))
    assert result.adapter.ranks == [9] and result.adapter.error < 1e-7
    after = updates_by_peft(model, tmp_path / "small")
    for name, update in updates_by_peft(model, adapter).items():
        assert np.linalg.norm(after[name] - 2 * update) <= 2e-7 * np.linalg.norm(2 * update)


@pytest.mark.parametrize(("error", "dtype"), [(0.3, torch.bfloat16), (1e-4, torch.float32)])
def test_a_narrow_adapter_stays_narrow_where_the_error_allows(
    error: float, dtype: torch.dtype, adapter: Path, tmp_path: Path
) -> None:
    """bfloat16 rounds by up to 0.4 %: an error of 1e-4 needs float32."""
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    (narrow / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, narrow / "adapter_model.safetensors")
    result = compress_adapter(CompressOptions(narrow, error, tmp_path / "small"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "small" / "adapter_model.safetensors").values()} == {dtype}
    assert all(module.error <= error for module in result.adapter.modules.values())


def test_the_command(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compress", str(adapter), "--error", "0.5"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "Nothing is written" in shown and "new rank" in shown
    words += ["--output", str(tmp_path / "small")]
    assert main([*words, "--plot", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["stored_bytes"][1] < summary["stored_bytes"][0] and 0 < summary["error_achieved"] <= 0.5
    assert all(module["rank"][1] < module["rank"][0] == 9 for module in summary["modules"])
    assert np.ptp(imread(tmp_path / "small" / "compress.png")[..., :3], axis=-1).max() == 0  # grey
    assert main(words) == 2
    assert main([*words, "--overwrite"]) == 0
    with pytest.raises(UsageError, match="error nan"):
        compress_adapter(CompressOptions(adapter, math.nan))
