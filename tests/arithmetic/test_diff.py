"""What `diff` finds, against NumPy and SciPy on the updates that PEFT forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from torch import nn

from backhand.arithmetic.combine import combine
from backhand.arithmetic.compress import compress_adapter
from backhand.arithmetic.diff import diff_adapters, diff_command
from backhand.arithmetic.options import CombineOptions, CompressOptions, DiffOptions
from backhand.cli.main import main
from backhand.errors import ArtifactError, CheckError
from tests.support.peft_adapters import FloatArray, save_with_peft, updates_by_peft
from tests.support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def pair(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = Path(tmp_path_factory.mktemp("pair"))
    return (
        save_with_peft(model, folder / "one", 1, target_modules=["q_proj", "v_proj"]),
        save_with_peft(model, folder / "two", 2, r=5, use_rslora=True, target_modules=["q_proj", "o_proj"]),
    )


def angles(first: FloatArray, second: FloatArray, ranks: tuple[int, int]) -> FloatArray:
    bases = (np.linalg.svd(update)[0][:, :rank] for update, rank in zip((first, second), ranks, strict=True))
    return np.sort(np.degrees(scipy.linalg.subspace_angles(*bases)))


def test_every_number(model: nn.Module, pair: tuple[Path, Path]) -> None:
    found = diff_adapters(DiffOptions(*pair))
    one, two = (updates_by_peft(model, path) for path in pair)
    assert [module.module for module in found.modules] == [name for name in one if "q_proj" in name]
    for module in found.modules:
        first, second = one[module.module], two[module.module]
        norms = np.linalg.norm(first), np.linalg.norm(second)
        assert module.ranks == (3, 5) and module.norms == pytest.approx(norms, rel=1e-6)
        assert module.difference == pytest.approx(np.linalg.norm(first - second), rel=1e-6)
        assert module.relative == pytest.approx(np.linalg.norm(first - second) / max(norms), rel=1e-6)
        assert module.cosine == pytest.approx(float((first * second).sum()) / (norms[0] * norms[1]), rel=1e-4)
        assert module.output_angles == pytest.approx(angles(first, second, (3, 5)), rel=1e-5)
        assert module.input_angles == pytest.approx(angles(first.T, second.T, (3, 5)), rel=1e-5)
    assert {n: pytest.approx(np.linalg.norm(u), rel=1e-6) for n, u in one.items() if "v_proj" in n} == found.only_first
    assert {n: pytest.approx(np.linalg.norm(u), rel=1e-6) for n, u in two.items() if "o_proj" in n} == found.only_second


def test_an_adapter_and_a_multiple_of_it_point_the_same_way(pair: tuple[Path, Path], tmp_path: Path) -> None:
    combine(CombineOptions("scale", pair[:1], tmp_path / "scaled", weights=(-0.5,)))
    found = diff_adapters(DiffOptions(pair[0], tmp_path / "scaled"))
    assert len(found.modules) == 6 and not found.only_first and not found.only_second
    for module in found.modules:
        assert module.cosine == pytest.approx(-1, abs=1e-6)
        assert module.relative == pytest.approx(1.5, rel=1e-6)
        assert max(module.output_angles + module.input_angles) < 1e-4


def test_the_error_that_is_allowed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    combine(CombineOptions("concatenate", (pair[0], pair[0]), tmp_path / "same", weights=(0.5, 0.5)))
    diff_command(DiffOptions(pair[0], tmp_path / "same", error=1e-6, json=True))
    with pytest.raises(CheckError, match=r"differ by 1") as caught:
        diff_command(DiffOptions(*pair, error=0.9, json=True))
    assert caught.value.where is not None and caught.value.where.startswith("model.layers.")


def test_the_command(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["diff", *map(str, pair), "--output", str(tmp_path / "out")]
    assert main([*words, "--plot"]) == 0
    shown = capsys.readouterr().out
    assert "output angles" in shown and "only in one, rank 3: 3 of v_proj" in shown and "°" in shown
    picture = imread(tmp_path / "out" / "diff.png")
    assert picture.shape[0] > 500 and np.allclose(picture[..., 0], picture[..., 1])
    assert main([*words, "--json", "--error", "0.5"]) == 6
    output = capsys.readouterr()
    summary = json.loads(output.out)
    assert len(summary["modules"]) == 3 and len(summary["only_first"]) == 3
    assert summary == json.loads((tmp_path / "out" / "diff.json").read_text())
    assert summary["largest_relative_difference"]["module"] in output.err


def test_nothing_in_common_and_nothing_that_fits(
    model: nn.Module, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_with_peft(model, tmp_path / "down", 3, target_modules=["down_proj"])
    assert main(["diff", str(pair[0]), str(tmp_path / "down"), "--plot", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "only in down, rank 3: 3 of down_proj" in shown and "no module is in both adapters" in shown
    save_with_peft(tiny_model("llama", hidden_size=48), tmp_path / "narrow", 3)
    with pytest.raises(ArtifactError, match="do not fit each other"):
        diff_adapters(DiffOptions(pair[0], tmp_path / "narrow"))


def test_modules_trained_in_full_are_compared_by_their_weights(
    model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [
        save_with_peft(model, tmp_path / str(seed), seed, modules_to_save=["lm_head"], target_modules=["q_proj"])
        for seed in (1, 2)
    ]
    file = adapters[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = (key for key in tensors if key.endswith("lm_head.weight"))
    save_file(tensors | {name: tensors[name] * 0.75}, file)
    assert main(["diff", *map(str, adapters)]) == 0
    assert "trained in full: 1 tensor, relative difference of the weights 0.25" in capsys.readouterr().out
    found = diff_adapters(DiffOptions(*adapters))
    assert len(found.modules) == 3 and found.trained_in_full == {"lm_head.weight": pytest.approx(0.25)}
    tensors = load_file(adapters[0] / file.name)
    save_file(tensors | {name: tensors[name] * 0.75}, file)
    with pytest.raises(CheckError, match=r"differ by 0\.25") as caught:  # equal factors do not hide another head
        diff_command(DiffOptions(*adapters, error=0.1, json=True))
    assert caught.value.where == "lm_head.weight"
    with pytest.raises(ArtifactError, match="no update of low rank") as caught_at:
        compress_adapter(CompressOptions(adapters[0], 0.1, tmp_path / "small"))
    assert "lower --rank" in str(caught_at.value) and "merge" not in str(caught_at.value)
