"""The command: its output, its files and its errors."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from backhand.errors import CheckError, DataError, UsageError
from backhand.lab.sine import experiment as sine_run
from backhand.lab.sine.command import sine_command
from backhand.lab.sine.network import Network
from backhand.lab.sine.options import ShiftedTargetOptions, SineOptions

SHORT = SineOptions(
    base_epochs=250,
    lora_epochs=300,
    second=ShiftedTargetOptions(
        shifted_widths=(12, 9), shifted_ranks=(1, 3), shifted_seeds=2, shifted_base_epochs=40, shifted_epochs=40
    ),
)


def test_leaves_losses_pictures_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = sine_command(replace(SHORT, output=tmp_path / "new" / "run", check=True))
    directory = tmp_path / "new" / "run"
    with (directory / "losses.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["part"], int(line["epoch"])) for line in lines] == [
        *(("base", epoch) for epoch in (0, 100, 200, 249)),
        *(("lora", epoch) for epoch in (0, 100, 200, 299)),
    ]
    assert float(lines[1]["loss"]) == result.base.losses[100]
    assert float(lines[-1]["loss"]) == result.lora.losses[-1]
    for name in ("predictions.png", "losses.png", "shifted_target.png"):
        picture = imread(directory / name)
        assert picture.shape[0] >= 400 and picture.shape[1] >= 900 and picture[..., :3].std() > 0.05
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["base"]["final_loss"] == result.base.final_loss == result.lora.losses[0]
    assert summary["base"]["trained_parameters"] == 60 and summary["lora"]["trained_parameters"] == 168
    assert summary["frozen"]["unchanged"] is True
    assert summary["check_summary"]["comparisons"] == len(result.check) == 4 * 11 + 4 * 13
    assert [row["trained"] for row in summary["shifted_target"]["rows"]] == ["rank 1", "rank 3", "full"]
    assert sorted(summary["files"]) == sorted(path.name for path in directory.iterdir())
    with (directory / "shifted_target.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 2 * 5
    assert len(json.loads((directory / "check.json").read_text())) == len(result.check)
    printed = capsys.readouterr().out
    for text in ("dlora_w", "Xᵀ @ dlora_o1", "262,144", "not one bit moved", "cheaper", "rank 3", "losses.csv"):
        assert text in printed
    assert "\\n" not in printed


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    sine_command(replace(SHORT, json=True, check=True, step=True, check_epochs=(0, -1, 1000)))
    found = json.loads(capsys.readouterr().out)
    assert len(found["check"]) == 2 * 11 + 2 * 13
    assert {"part", "epoch", "name", "shape", "formula", "exact", "approximate", "largest_difference", "passed"} <= set(
        found["check"][0]
    )
    assert {row["epoch"] for row in found["check"] if row["part"] == "lora"} == {0, 299}
    assert [line["name"] for line in found["step"]["base"]][:3] == ["o1", "o2", "o3"]
    assert found["options"]["seed"] == 0 and found["files"] == []


def test_prints_the_walk(capsys: pytest.CaptureFixture[str]) -> None:
    sine_command(replace(SHORT, step=True, second=ShiftedTargetOptions(shifted=False)))
    printed = capsys.readouterr().out
    assert "epoch 1, formula by formula" in printed
    assert "dl0w = do1ᵀ @ X" in printed and "dB = s · Xᵀ @ dz" in printed and "A ← A − lr · dA" in printed


def test_runs_again_into_the_same_directory(tmp_path: Path) -> None:
    options = replace(SHORT, output=tmp_path, json=True)
    sine_command(options)
    before = (tmp_path / "losses.csv").read_bytes()
    sine_command(options)
    assert (tmp_path / "losses.csv").read_bytes() == before


def test_output_that_is_a_file_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("backhand.lab.sine.command.run_sine", lambda *_: pytest.fail("ran"))
    with pytest.raises(UsageError):
        sine_command(replace(SHORT, output=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_moved_weight_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    digests = iter(["before", "after"])
    monkeypatch.setattr(Network, "digest", lambda _: next(digests))
    with pytest.raises(CheckError, match="frozen"):
        sine_command(replace(SHORT, second=ShiftedTargetOptions(shifted=False)))
    assert "THEY MOVED" in capsys.readouterr().out


def test_a_failed_comparison_is_printed_before_it_is_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoiled(*arguments: object) -> list[object]:
        rows = check_gradients(*arguments)  # type: ignore[arg-type]
        return [replace(rows[0], relative_error=float("inf"), passed=False), *rows[1:]]

    check_gradients = sine_run.check_gradients
    monkeypatch.setattr(sine_run, "check_gradients", spoiled)
    for json_expected in (False, True):
        with pytest.raises(CheckError, match="dL the most"):
            sine_command(replace(SHORT, check=True, json=json_expected, second=ShiftedTargetOptions(shifted=False)))
        printed = capsys.readouterr().out
        assert json.loads(printed)["check"][0]["relative_error"] is None if json_expected else "dL FAILED" in printed


def test_a_square_wave_and_a_table_of_points_and_other_widths(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savetxt(tmp_path / "points.csv", rng.uniform(-1, 1, (12, 2)), delimiter=",", header="x,y", comments="")
    for target, dtype in (("square2", "float32"), (str(tmp_path / "points.csv"), "float64")):
        options = replace(SHORT, target=target, dtype=dtype, widths=(6, 5), rank=2, check=True, output=tmp_path / "run")
        result = sine_command(options)
        assert result.lora.losses[-1] < result.base.losses[0]
        assert result.lora.predictions.dtype == dtype


def test_diverging_run_is_a_failed_check() -> None:
    with pytest.raises(CheckError, match="not finite"):
        sine_command(replace(SHORT, base_learning_rate=1e200))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("points", 1),
        ("widths", ()),
        ("widths", (0,)),
        ("rank", 0),
        ("rank", 10**6),
        ("scaling", -1.0),
        ("base_epochs", 0),
        ("lora_epochs", True),
        ("base_learning_rate", float("inf")),
        ("dtype", "bfloat16"),
        ("seed", -1),
        ("seed", 2**63),
        ("log_every", 0),
        ("step_epoch", -1),
        ("target", "tan"),
    ],
)
def test_bad_option_names_itself(field: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        sine_command(replace(SHORT, **{field: value}))  # type: ignore[arg-type]
    assert caught.value.where == field


def test_step_past_the_end() -> None:
    with pytest.raises(UsageError, match="past the last epoch"):
        replace(SHORT, step=True, step_epoch=250).validate()


@pytest.mark.parametrize("epochs", [(), (999_999,), (-301, 300), (299,)])
def test_a_check_that_would_compare_nothing(epochs: tuple[int, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        replace(SHORT, check=True, check_epochs=epochs).validate()
    assert caught.value.where == "check_epochs"
    replace(SHORT, check_epochs=epochs).validate()


def test_a_check_of_epochs_that_one_part_alone_has() -> None:
    replace(SHORT, check=True, check_epochs=(0, 299)).validate()


def test_missing_start_file(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        sine_command(replace(SHORT, start=tmp_path / "missing.npz"))


def test_options_import_neither_torch_nor_numpy() -> None:
    code = "import sys, backhand.lab.sine.options; sys.exit(bool({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
