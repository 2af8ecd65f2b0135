"""The command: tables, pictures, JSON, and errors."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from backhand.cli.main import main
from backhand.errors import ArtifactError, CheckError, UsageError
from backhand.lab.paper import analyses as paper_run
from backhand.lab.paper import memory as paper_memory
from backhand.lab.paper.command import paper_command
from backhand.lab.paper.options import PaperOptions, PaperRunOptions, SweepOptions
from backhand.training.run import train
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import TinyRun


@pytest.fixture(scope="module")
def adapters(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = Path(tmp_path_factory.mktemp("runs"))
    for rank in (2, 5):
        train(tiny.config(folder / f"run-{rank}", rank=rank, seed=rank))
    return folder / "run-2" / "adapter", folder / "run-5" / "adapter"


def options(tiny: TinyRun, *adapters: Path, **run: object) -> PaperOptions:
    config = tiny.config(Path("unused"))
    return PaperOptions(
        run=PaperRunOptions(adapter=adapters, update_seeds=20, **run),  # type: ignore[arg-type]
        model=config.model,
        data=config.data,
        optimization=config.optimization,
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_run, "UPDATE_RANKS", (1, 4))
    monkeypatch.setattr(paper_run, "PATH_STEPS", 20)
    # test_paper_memory.py measures it, each time in a process of its own.
    monkeypatch.setattr(paper_memory, "_measure", lambda frozen, trained, each: frozen * each + trained * 16)


def test_two_adapters_give_every_picture_and_table(
    tiny: TinyRun, adapters: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = paper_command(options(tiny, *adapters, output=tmp_path))
    assert result.similarity is not None and len(result.similarity) == 2 * 14  # two layers, seven kinds, two factors
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert sorted(summary["files"]) == sorted(path.name for path in tmp_path.iterdir())
    pictures = [name for name in summary["files"] if name.endswith(".png")]
    assert sorted(pictures) == [
        "adam_path.png",
        "amplification.png",
        "amplification_2.png",
        "first_updates.png",
        "memory.png",
        "merging.png",
        "similarity.png",
        "similarity_layers.png",
    ]
    for name in pictures:
        picture = imread(tmp_path / name)
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.03
    with (tmp_path / "similarity.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 7 * 2 * 5  # factors, kinds of module, i, j: the cells of similarity.png
    with (tmp_path / "similarity_layers.csv").open() as file:
        by_layer = list(csv.DictReader(file))
    assert len(by_layer) == 2 * 14
    for line in lines:
        assert line["modules"] == "2" and 0 <= float(line["similarity"]) <= 1
        if (line["i"], line["j"]) in {("1", "1"), ("2", "5")}:
            column = "first_direction" if line["i"] == "1" else "all_directions"
            kind, factor = line["kind"], line["factor"]
            both = [row for row in by_layer if row["module"].endswith(kind) and row["factor"] == factor]
            assert [(row["first_rank"], row["second_rank"]) for row in both] == [("2", "5")] * 2
            mean = sum(float(row[column]) for row in both) / 2
            assert float(line["similarity"]) == pytest.approx(mean, rel=1e-5)
    with (tmp_path / "amplification.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 14
    for line in lines:
        assert float(line["factor"]) == pytest.approx(float(line["update_norm"]) / float(line["along_update"]))
        assert float(line["along_weight"]) >= float(line["along_update"])
    with (tmp_path / "adam_path.csv").open() as file:
        steps = list(csv.DictReader(file))
    for path in summary["updates"]["paths"]:
        of_path = [step for step in steps if (float(step["p"]), float(step["q"])) == (path["p"], path["q"])]
        assert [int(step["step"]) for step in of_path] == list(range(1, 21))
        assert max(float(step["difference"]) for step in of_path) == path["difference"]
    assert summary["updates"]["means_agree"] and all(path["passed"] for path in summary["updates"]["paths"])
    assert summary["memory"]["stored_ratio"] > 1 and summary["memory"]["memory_ratio"] is None
    assert summary["merging"]["difference"] < 1e-5
    printed = capsys.readouterr().out
    for text in (
        "run-2, rank 2",
        "run-5, rank 5",
        "q_proj lora_A",
        "amplification",
        "merged / base",
        "(median [quartiles])",
        "measured [range]",
        "too small to measure",
        "same path",
    ):
        assert text in printed


def test_one_adapter_and_json(tiny: TinyRun, adapters: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    paper_command(options(tiny, adapters[0], json=True, analyses=("amplification",)))
    found = json.loads(capsys.readouterr().out)
    assert all(found[name] is None for name in ("similarity", "updates", "memory")) and found["files"] == []
    kinds = [row["kind"] for row in found["amplification"][0]]  # in the order of PEFT's file, which is by name
    assert kinds == ["down_proj", "gate_proj", "up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    assert found["adapters"][0]["modules"] == 14


def test_similarity_alone_needs_no_base(adapters: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = PaperRunOptions(adapter=adapters, analyses=("similarity",))
    paper_command(PaperOptions(run=run, model=replace(PaperOptions().model, model="nowhere/to-be-found")))
    assert "Subspace similarity" in capsys.readouterr().out


def test_sweep_is_drawn(tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = SweepOptions(sweep_ranks=(1, 2), sweep_targets=("q_proj", "v_proj"), max_new_tokens=4)
    paper_command(replace(options(tiny, analyses=("sweep",), output=tmp_path), sweep=sweep))
    assert imread(tmp_path / "sweep.png").shape[0] > 300
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    #  The budget is that of v_proj at rank 2, 352 numbers; q_proj keeps to it at rank 1, which is trained anyway.
    assert [(row["targets"], row["rank"], row["trained_parameters"]) for row in rows] == [
        ("q_proj", "1", "288"),
        ("q_proj", "2", "576"),
        ("v_proj", "1", "176"),
        ("v_proj", "2", "352"),
    ]
    assert all(float(row["eval_loss"]) > 0 for row in rows)
    assert "at the budget" in capsys.readouterr().out


def test_another_base_is_refused(tiny: TinyRun, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_tiny(tiny_model("llama-tied", num_hidden_layers=2, seed=9), tmp_path / "other")
    chosen = options(tiny, adapters[0], analyses=("amplification",))
    with pytest.raises(ArtifactError):
        paper_command(replace(chosen, model=replace(chosen.model, model=str(other))))
    forced = replace(chosen, model=replace(chosen.model, model=str(other), force_base=True))
    assert paper_command(forced).amplification is not None


def test_more_than_factors_is_refused_where_it_would_count(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DoRA's magnitude is not part of lora_B lora_A, so its effect on the weight would be omitted."""
    for name in ("one", "other"):
        train(tiny.config(tmp_path / name, target_modules=("q_proj",), max_steps=1, use_dora=True))
    both = tmp_path / "one" / "adapter", tmp_path / "other" / "adapter"
    for analysis in ("amplification", "merging", "memory"):
        with pytest.raises(ArtifactError, match="DoRA"):
            paper_command(options(tiny, *both, analyses=(analysis,)))
    paper_command(options(tiny, *both, analyses=("similarity",)))
    assert "q_proj lora_A" in capsys.readouterr().out


def test_a_claim_that_fails_is_a_failed_check(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backhand.lab.paper.command.LARGEST_STANDARD_ERRORS", 0.0)
    with pytest.raises(CheckError, match="depends on the rank"):
        paper_command(options(tiny, analyses=("updates",)))
    monkeypatch.undo()
    monkeypatch.setattr("backhand.lab.paper.adam_path.EPSILON", 1e-2)
    monkeypatch.setattr(paper_run, "UPDATE_RANKS", (1, 4))
    with pytest.raises(CheckError, match="path changes"):
        paper_command(options(tiny, analyses=("updates",)))


@pytest.mark.parametrize(
    ("run", "where"),
    [
        ({}, "adapter"),
        ({"adapter": (Path("a"), Path("b"), Path("c"))}, "adapter"),
        ({"adapter": (Path("a"),), "analyses": ("similarity",)}, "adapter"),
        ({"analyses": ("merging",)}, "adapter"),
        ({"analyses": ("sweep",)}, "output"),
        ({"analyses": ("poetry",)}, "analyses"),
        ({"adapter": (Path("a"),), "directions": 0}, "directions"),
        ({"adapter": (Path("a"),), "update_seeds": 19}, "update_seeds"),
    ],
)
def test_bad_option_names_itself(run: dict[str, object], where: str) -> None:
    with pytest.raises(UsageError) as caught:
        PaperOptions(run=PaperRunOptions(**run)).validate()  # type: ignore[arg-type]
    assert caught.value.where == where


def test_adapters_without_a_common_module(tiny: TinyRun, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    for name, targets in (("q", ("q_proj",)), ("v", ("v_proj",))):
        train(tiny.config(tmp_path / name, target_modules=targets, max_steps=1))
    with pytest.raises(UsageError, match="no trained module in common"):
        paper_command(options(tiny, tmp_path / "q" / "adapter", tmp_path / "v" / "adapter", analyses=("similarity",)))


def test_help_does_not_take_an_analysis_for_an_option_of_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "--help"]) == 0
    assert " memory (one)" in " ".join(capsys.readouterr().out.replace("│", "").split())
