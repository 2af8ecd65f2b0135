"""`backhand paper` on two adapters of SmolLM2 of different rank: every picture, every table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from backhand.cli.main import main
from backhand.data.demo_task import write_demo_data

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]
RANKS = (2, 6)
LAYERS, MODULES = 30, 60
TRAINING = ("--batch-rows", "2", "--max-steps", "3", "--learning-rate", "3e-4")
PICTURES = (
    "similarity.png",
    "similarity_layers.png",
    "amplification.png",
    "amplification_2.png",
    "merging.png",
    "memory.png",
    "first_updates.png",
    "adam_path.png",
    "sweep.png",
)


def backhand(*words: str | Path) -> None:
    assert main([str(word) for word in words]) == 0


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = Path(tmp_path_factory.mktemp("smollm2"))
    rows, _ = write_demo_data(folder / "data", train_rows=6, held_out_rows=1)
    for rank in RANKS:
        run = ("--rank", str(rank), "--output", folder / f"rank{rank}", "--seed", str(rank), "--quiet")
        targets = ("--target-modules", "q_proj", "v_proj")
        backhand("train", "--data", rows, "--eval-fraction", "0", *TRAINING, *targets, *run)
    return folder / "rank2" / "adapter", folder / "rank6" / "adapter"


def test_two_adapters_give_every_picture_and_table(
    adapters: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_demo_data(tmp_path / "data", train_rows=6, held_out_rows=2)
    sweep = ("--sweep-ranks", "1", "--sweep-targets", "v_proj", "q_proj,v_proj", "--max-new-tokens", "4")
    rows = ("--data", tmp_path / "data/train.jsonl", "--eval-data", tmp_path / "data/valid.jsonl", *TRAINING)
    analyses = ("similarity", "amplification", "merging", "memory", "updates", "sweep")
    output = tmp_path / "paper"
    backhand("paper", "--adapter", *adapters, "--output", output, "--analyses", *analyses, *sweep, *rows)

    summary = json.loads((output / "summary.json").read_text())
    assert [adapter["modules"] for adapter in summary["adapters"]] == [MODULES, MODULES]
    assert set(PICTURES) <= set(summary["files"])
    for name in PICTURES:
        picture = imread(output / name)
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.03, name

    similarity = table(output / "similarity.csv")
    assert len(similarity) == 2 * 2 * RANKS[0] * RANKS[1]  # two kinds of module, two factors
    assert {row["modules"] for row in similarity} == {str(LAYERS)}
    assert len(table(output / "similarity_layers.csv")) == MODULES * 2
    for kind in summary["similarity"]:
        assert kind["modules"] == LAYERS and 0 <= kind["all_directions"] <= 1
    for name in ("amplification.csv", "amplification_2.csv"):
        rows_of = table(output / name)
        assert len(rows_of) == MODULES
        # A trained update lies along directions in which the weight does less than in its own.
        assert all(float(row["along_update"]) < float(row["along_weight"]) for row in rows_of)
    merging, memory, updates = summary["merging"], summary["memory"], summary["updates"]
    assert len(merging["times"]) == 3 and merging["difference"] < 0.05  # bfloat16 where the machine computes in it
    assert memory["memory_ratio"] > 3 and memory["stored_ratio"] > 100
    for step in (memory["adapter"], memory["full"]):
        for measured in step["measured_bytes"]:
            assert measured == pytest.approx(step["computed_bytes"], rel=0.15)
    assert updates["means_agree"] and all(path["passed"] for path in updates["paths"])
    assert len(table(output / "first_updates.csv")) == 4 * 32
    for row in table(output / "sweep.csv"):
        assert 0 < float(row["eval_loss"]) < float(row["base_eval_loss"])

    printed = capsys.readouterr().out
    for text in ("Subspace similarity", "Amplification", "merged / base", "every weight", "same path", "at the budget"):
        assert text in printed
