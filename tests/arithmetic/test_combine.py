"""Arithmetic on adapters against dense arithmetic on the updates that PEFT forms, before and after."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from backhand.adapters.module_factors import ModuleFactors
from backhand.arithmetic import combine as combine_module
from backhand.arithmetic.combine import Combination, combine, reduced, side_by_side
from backhand.arithmetic.options import CombineOptions
from backhand.cli.main import main
from backhand.errors import ArtifactError, UsageError
from tests.support.peft_adapters import FloatArray, save_with_peft, updates_by_peft
from tests.support.tiny_models import tiny_model

PREFIX = "base_model.model."


class AllKinds(nn.Module):
    """An embedding, a linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(19, 11)
        self.inner = nn.ModuleDict({"linear": nn.Linear(11, 13)})
        self.conv = nn.Conv2d(5, 7, 3)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def three(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Mixed ranks, patterns, rank-stabilised scaling, and modules that not all of them adapt."""
    folder = Path(tmp_path_factory.mktemp("three"))
    return (
        save_with_peft(model, folder / "one", 1, rank_pattern={"up_proj": 5}, alpha_pattern={r"layers\.1\..*": 9}),
        save_with_peft(model, folder / "two", 2, r=4, lora_alpha=7, use_rslora=True),
        save_with_peft(model, folder / "three", 3, r=2, target_modules=["v_proj", "q_proj"]),
    )


def run(operation: Any, adapters: tuple[Path, ...], output: Path, **options: Any) -> Combination:
    return combine(CombineOptions(operation, adapters, output, **options))


def total(model: nn.Module, adapters: tuple[Path, ...], coefficients: tuple[float, ...]) -> dict[str, FloatArray]:
    sums: dict[str, FloatArray] = {}
    for coefficient, adapter in zip(coefficients, adapters, strict=True):
        for name, update in updates_by_peft(model, adapter).items():
            sums[name] = sums.get(name, 0.0) + coefficient * update
    return sums


def relative(found: FloatArray, expected: FloatArray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


LINEAR: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "add": ({}, (1, 1, 1)),
    "subtract": ({}, (1, -1, -1)),
    "average": ({}, (1 / 3, 1 / 3, 1 / 3)),
    "concatenate": ({"weights": (0.5, -2.0, 1.5)}, (0.5, -2.0, 1.5)),
    "svd": ({"weights": (0.25, 1.0, 3.0)}, (0.25, 1.0, 3.0)),
}


@pytest.mark.parametrize("operation", LINEAR)
def test_linear_operations_are_exact(operation: str, model: nn.Module, three: tuple[Path, ...], tmp_path: Path) -> None:
    options, coefficients = LINEAR[operation]
    result = run(operation, three, tmp_path / "new", **options)
    expected, found = total(model, three, coefficients), updates_by_peft(model, tmp_path / "new")
    assert set(found) == set(expected) and len(found) == 9
    for name, update in expected.items():
        assert relative(found[name], update) <= 2e-7
        computed = result.adapter.modules[name]
        assert computed.norm == pytest.approx(np.linalg.norm(update), rel=1e-6)
        assert computed.error == pytest.approx(relative(found[name], update), rel=0.01)
    ranks = {name.rsplit(".", 1)[1]: module.factors.rank for name, module in result.adapter.modules.items()}
    assert ranks == {"q_proj": 9, "up_proj": 9, "v_proj": 2}
    assert result.adapter.error < 1e-7


def test_weights_of_average_and_subtract(model: nn.Module, three: tuple[Path, ...], tmp_path: Path) -> None:
    run("average", three, tmp_path / "average", weights=(1.0, 2.0, 5.0))
    expected = total(model, three, (1 / 8, 2 / 8, 5 / 8))
    assert all(relative(u, expected[n]) < 2e-7 for n, u in updates_by_peft(model, tmp_path / "average").items())
    run("subtract", three[:2], tmp_path / "less", weights=(2.0, 0.5))
    expected = total(model, three[:2], (2.0, -0.5))
    assert all(relative(u, expected[n]) < 2e-7 for n, u in updates_by_peft(model, tmp_path / "less").items())


def test_scale_keeps_lora_A_as_it_is(model: nn.Module, three: tuple[Path, ...], tmp_path: Path) -> None:
    run("scale", three[:1], tmp_path / "new", weights=(-0.3,))
    expected = total(model, three[:1], (-0.3,))
    assert all(relative(u, expected[n]) < 2e-7 for n, u in updates_by_peft(model, tmp_path / "new").items())
    before, after = (load_file(path / "adapter_model.safetensors") for path in (three[0], tmp_path / "new"))
    assert all(torch.equal(after[key], before[key]) for key in before if "lora_A" in key)


def test_concatenated_rows_are_those_of_the_adapters(three: tuple[Path, ...], tmp_path: Path) -> None:
    run("concatenate", three, tmp_path / "new")
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    files = [load_file(path / "adapter_model.safetensors")[key] for path in three]
    assert torch.equal(load_file(tmp_path / "new" / "adapter_model.safetensors")[key], torch.cat(files))


@pytest.mark.parametrize("operation", ["add", "svd", "average"])
def test_a_smaller_rank_is_the_best_of_that_rank_and_says_what_is_lost(
    operation: str, model: nn.Module, three: tuple[Path, ...], tmp_path: Path
) -> None:
    result = run(operation, three[:2], tmp_path / "new", rank=4)
    factor = 0.5 if operation == "average" else 1.0
    expected, found = total(model, three[:2], (factor, factor)), updates_by_peft(model, tmp_path / "new")
    lost = norm = 0.0
    for name, update in expected.items():
        left, values, right = np.linalg.svd(update)
        best = (left[:, :4] * values[:4]) @ right[:4]
        assert relative(found[name], best) <= 1e-6
        computed = result.adapter.modules[name]
        assert computed.factors.rank == 4
        assert computed.error == pytest.approx(relative(found[name], update), rel=1e-6)
        lost, norm = lost + float(np.sum((found[name] - update) ** 2)), norm + float(np.sum(update**2))
    assert result.adapter.error == pytest.approx(math.sqrt(lost / norm), rel=1e-6)
    assert result.adapter.error > 0.1


def test_what_repeats_takes_no_more_rank_and_what_cancels_none(
    model: nn.Module, three: tuple[Path, ...], tmp_path: Path
) -> None:
    one = three[0]
    doubled = run("add", (one, one), tmp_path / "doubled")
    assert doubled.adapter.ranks == [3, 5]
    expected = total(model, (one,), (2.0,))
    assert all(relative(u, expected[n]) < 2e-7 for n, u in updates_by_peft(model, tmp_path / "doubled").items())
    nothing = run("subtract", (one, one), tmp_path / "nothing")
    assert nothing.adapter.ranks == [1] and nothing.adapter.error == 0.0
    assert not any(update.any() for update in updates_by_peft(model, tmp_path / "nothing").values())


def test_embeddings_and_convolutions(tmp_path: Path) -> None:
    model = AllKinds()
    targets = ["table", "linear", "conv"]
    pair = (
        save_with_peft(model, tmp_path / "one", 1, r=2, target_modules=targets),
        save_with_peft(model, tmp_path / "two", 2, r=3, use_rslora=True, target_modules=targets),
    )
    run("add", pair, tmp_path / "new", weights=(0.7, -1.2))
    expected, found = total(model, pair, (0.7, -1.2)), updates_by_peft(model, tmp_path / "new")
    assert set(found) == {"table", "inner.linear", "conv"}
    for name, update in expected.items():
        assert found[name].shape == update.shape
        assert relative(found[name], update) <= 3e-7


def test_pefts_linear_combination_is_not_a_sum_and_ours_is(model: nn.Module, tmp_path: Path) -> None:
    """√w s B + … times √w A + …: the cross terms B_i A_j are as large as what was asked for."""
    pair = tuple(save_with_peft(model, tmp_path / name, seed, r=4) for seed, name in enumerate(("one", "two"), 1))
    expected = total(model, pair, (1.0, 1.0))
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(pair[0]), adapter_name="one")
    theirs.load_adapter(str(pair[1]), adapter_name="two")
    theirs.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", combination_type="linear")
    run("add", pair, tmp_path / "new")
    ours = updates_by_peft(model, tmp_path / "new")
    for name, update in expected.items():
        linear = theirs.base_model.model.get_submodule(name).get_delta_weight("both").detach().double().numpy()
        assert 0.85 <= relative(linear, update) <= 1.15
        assert relative(ours[name], update) <= 2e-7


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        sizes = [tensor.numel() for tensor in made if isinstance(tensor, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("operation", [side_by_side, lambda weighted: reduced(weighted, 2)])
def test_the_update_is_never_formed(operation: Any) -> None:
    one, other = (
        ModuleFactors(torch.randn(3, 700), torch.randn(900, 3), 1.5),
        ModuleFactors(torch.randn(2, 700), torch.randn(900, 2), 0.5),
    )
    with LargestTensor() as largest:
        operation([(1.0, one), (-2.0, other)])
    assert 0 < largest.elements <= 900 * 2 * 5


def trimmed(update: FloatArray, density: float) -> FloatArray:
    kept = round(density * update.size)
    threshold = np.sort(np.abs(update).ravel())[-kept]
    return np.where(np.abs(update) >= threshold, update, 0.0)


def ties_by_numpy(updates: list[FloatArray], density: float) -> FloatArray:
    """Entry by entry, as algorithm 1 of the paper is written."""
    kept = [trimmed(update, density) for update in updates]
    elected = np.sign(sum(kept))
    merged = np.zeros_like(updates[0])
    for place in np.ndindex(*merged.shape):
        agreeing = [update[place] for update in kept if update[place] and np.sign(update[place]) == elected[place]]
        merged[place] = np.mean(agreeing) if agreeing else 0.0
    return merged


def test_ties(model: nn.Module, three: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged: dict[str, Tensor] = {}
    ours = combine_module.ties

    def remembered(updates: list[Tensor], density: float) -> Tensor:
        result = ours(updates, density)
        merged[str(len(merged))] = result
        return result

    monkeypatch.setattr(combine_module, "ties", remembered)
    result = run("ties", three, tmp_path / "new", weights=(1.0, -0.5, 2.0), density=0.3)
    found = updates_by_peft(model, tmp_path / "new")
    by_adapter = [updates_by_peft(model, path) for path in three]
    for number, (name, computed) in enumerate(result.adapter.modules.items()):
        weighted = zip((1.0, -0.5, 2.0), by_adapter, strict=True)
        expected = ties_by_numpy([weight * updates[name] for weight, updates in weighted if name in updates], 0.3)
        assert relative(merged[str(number)].double().numpy(), expected) <= 1e-6
        left, values, right = np.linalg.svd(expected)
        rank = computed.factors.rank
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert rank == {"q_proj": 4, "up_proj": 5, "v_proj": 2}[name.rsplit(".", 1)[1]]
        assert relative(found[name], best) <= 1e-5
        assert computed.norm == pytest.approx(np.linalg.norm(expected), rel=1e-6)
        assert computed.error == pytest.approx(relative(found[name], expected), rel=1e-5)


def test_ties_at_full_rank_loses_nothing(model: nn.Module, three: tuple[Path, ...], tmp_path: Path) -> None:
    result = run("ties", three[:2], tmp_path / "new", rank=1000)
    assert result.adapter.error < 1e-6
    q_proj = result.adapter.modules["model.layers.0.self_attn.q_proj"].factors
    assert q_proj.rank == min(q_proj.shape)


def test_dare_keeps_its_share_rescales_it_and_is_repeatable(
    model: nn.Module, three: tuple[Path, ...], tmp_path: Path
) -> None:
    options = {"density": 0.25, "rank": 1000, "seed": 7}
    run("dare", three[2:] * 2, tmp_path / "new", **options)
    found = updates_by_peft(model, tmp_path / "new")
    shares = []
    for name, update in updates_by_peft(model, three[2]).items():
        # The same update twice, dropped independently: 0, once or twice the update over the density.
        counts = found[name] / (update / 0.25)
        assert np.abs(counts - np.round(counts)).max() <= 1e-2
        shares += [np.mean(np.round(counts) == number) for number in (0, 1, 2)]
    mean = np.mean(np.reshape(shares, (-1, 3)), axis=0)
    assert mean == pytest.approx([0.75**2, 2 * 0.25 * 0.75, 0.25**2], abs=0.02)
    run("dare", three[2:] * 2, tmp_path / "again", **options)
    run("dare", three[2:] * 2, tmp_path / "other", **options | {"seed": 8})
    same, again, other = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("new", "again", "other")
    )
    assert same == again != other


def test_dare_with_everything_kept_is_the_sum(model: nn.Module, three: tuple[Path, ...], tmp_path: Path) -> None:
    run("dare", three[:2], tmp_path / "new", density=1.0, rank=1000, weights=(2.0, -1.0))
    expected = total(model, three[:2], (2.0, -1.0))
    assert all(relative(u, expected[n]) < 1e-6 for n, u in updates_by_peft(model, tmp_path / "new").items())


def test_dora_and_whole_modules_are_refused_by_name(model: nn.Module, three: tuple[Path, ...], tmp_path: Path) -> None:
    more = {
        "dora": save_with_peft(model, tmp_path / "dora", 4, use_dora=True),
        "saved": save_with_peft(model, tmp_path / "saved", 5, modules_to_save=["lm_head"]),
    }
    for name, shown in (("dora", "dora|DoRA"), ("saved", "modules_to_save|lm_head")):
        with pytest.raises(ArtifactError, match=shown) as error:
            run("add", (three[0], more[name]), tmp_path / "new")
        assert "--from-adapter" in str(error.value.next_step)
    assert not (tmp_path / "new").exists()


def test_parts_that_are_no_update_are_refused_by_name(three: tuple[Path, ...], tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in three[0].iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copied / "adapter_model.safetensors")
    tensors[f"{PREFIX}lm_head.weight"] = torch.ones(3, 3)
    tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.bias"] = torch.ones(3)
    tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(3)
    save_file(tensors, copied / "adapter_model.safetensors")
    with pytest.raises(ArtifactError) as caught:
        run("add", (three[1], copied), tmp_path / "new")
    text = str(caught.value)
    assert "lm_head.weight: a whole module" in text and "lora_B.bias: a trained bias" in text
    assert "lora_magnitude_vector: DoRA" in text


def test_adapters_that_do_not_fit_each_other(model: nn.Module, three: tuple[Path, ...], tmp_path: Path) -> None:
    wide = save_with_peft(tiny_model("llama", hidden_size=48), tmp_path / "wide", 4)
    with pytest.raises(ArtifactError, match="do not fit each other in 6 modules") as caught:
        run("add", (three[0], wide), tmp_path / "new")
    assert "60" in str(caught.value) and "48" in str(caught.value)


@pytest.mark.parametrize(
    ("operation", "count", "options", "where"),
    [
        ("add", 1, {}, "adapters"),
        ("scale", 2, {"weights": (1.0, 2.0)}, "adapters"),
        ("scale", 1, {}, "weights"),
        ("add", 2, {"weights": (1.0,)}, "weights"),
        ("add", 2, {"weights": (1.0, math.nan)}, "weights"),
        ("add", 2, {"weights": (1.0, 0.0)}, "weights"),
        ("average", 2, {"weights": (1.0, -1.0)}, "weights"),
        ("add", 2, {"rank": 0}, "rank"),
        ("concatenate", 2, {"rank": 3}, "rank"),
        ("add", 2, {"density": 0.5}, "density"),
        ("ties", 2, {"density": 0.0}, "density"),
        ("multiply", 2, {}, "operation"),
        ("add", 2, {"output": None}, "output"),
    ],
)
def test_options_out_of_range(
    operation: Any, count: int, options: dict[str, Any], where: str, three: tuple[Path, ...], tmp_path: Path
) -> None:
    given = {"output": tmp_path / "new"} | options
    with pytest.raises(UsageError) as caught:
        combine(CombineOptions(operation, three[:count], **given))
    assert caught.value.where == where
    assert not (tmp_path / "new").exists()


def test_the_command(three: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["combine", "add", *map(str, three[:2]), "--output", str(tmp_path / "new"), "--weights", "1", "-0.5"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "q_proj" in shown and "Relative error of all together" in shown and "weights 1, -0.5" in shown
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--json", "--rank", "2"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["ranks"] == [2] and 0.1 < summary["relative_error"] < 1 and len(summary["modules"]) == 6
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["r"] == 2
    (tmp_path / "file").write_text("x")
    assert main(["combine", "add", *map(str, three[:2]), "--output", str(tmp_path / "file")]) == 2
    assert (tmp_path / "file").read_text() == "x"
    assert main(["combine", "add", str(three[0]), str(tmp_path / "nowhere"), "--output", str(tmp_path / "x")]) == 4


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("--weights", "0.5", "2", "one", "two"), "'one' is not a number"),
        (("one", "two", "--weights", "0.5", "x"), "'x' is not a number"),
        (("one", "two", "--weights", "0.5,,2"), "'' is not a number"),
        (("one", "two", "--weights", "0.5"), "1 weight for 2 adapters"),
        (("one", "two", "--weights", "1", "2", "3"), "3 weights for 2 adapters"),
    ],
)
def test_weights_that_are_none_or_come_before_the_adapters(
    words: tuple[str, ...], shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["combine", "add", *words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"--weights: {shown}" in said and "next: " in said


def test_weights_with_commas_between_them(three: tuple[Path, ...], tmp_path: Path) -> None:
    outputs = [tmp_path / "spaces", tmp_path / "commas"]
    for words, output in ((["0.5", "2"], outputs[0]), (["0.5,2"], outputs[1])):
        assert main(["combine", "add", *map(str, three[:2]), "--weights", *words, "--output", str(output)]) == 0
    first, second = (path / "adapter_model.safetensors" for path in outputs)
    assert first.read_bytes() == second.read_bytes()
