"""The file of a quantized base during a run: any change of it ends the run, and what was saved before remains valid."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as StorageType

from backhand.cli.main import main
from backhand.engines.machine import crowded_note
from backhand.errors import ArtifactError
from backhand.loop.observers import Observer
from backhand.options.config import TrainConfig
from backhand.training import trainer as run_module
from backhand.training.run import train
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import tiny_model
from tests.support.tiny_run import TinyRun, final_bits, with_options

SIZES = {
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama-tied", num_hidden_layers=2, **SIZES)
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    return write_tiny_gguf(model, path, storage=StorageType.Q8_0)


class After(Observer):
    """Does something to a file once a step is done, and lets the run go on."""

    def __init__(self, step: int, change: Callable[[], object]) -> None:
        self.step, self.change = step, change

    def stepped(self, record: dict[str, object]) -> None:
        if record["step"] == self.step:
            self.change()


def written_to(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 5_000_000))


@pytest.mark.parametrize("change", [written_to, Path.unlink], ids=lambda change: change.__name__)
def test_a_change_ends_the_run_and_leaves_what_was_saved(
    change: Callable[[Path], object], whole: Path, tiny: TinyRun, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy2(whole, path)
    config = tiny.config(tmp_path / "run", model=str(path), base="quantized", save_every=1, eval_every=2)
    with pytest.raises(ArtifactError, match="has changed while it was in use") as raised:
        train(config, callbacks=[After(3, lambda: change(path))])
    assert str(path) in str(raised.value) and raised.value.exit_code == 4
    saved = sorted(file.name for file in (tmp_path / "run" / "checkpoints").iterdir() if not file.is_symlink())
    assert "step-3" in saved and "step-4" not in saved
    # The file put back as it was, the run goes on to the bits of one that nothing happened to.
    path.unlink(missing_ok=True)
    shutil.copy2(whole, path)
    train(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True))
    straight = train(tiny.config(tmp_path / "straight", model=str(path), base="quantized", save_every=1, eval_every=2))
    assert straight.steps == 6
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")


def test_a_file_that_does_not_fit_is_warned_of_with_figures(
    whole: Path, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "available_bytes", lambda: 1000)
    train(tiny.config(tmp_path / "run", model=str(whole), base="quantized", quiet=False))
    said = capsys.readouterr().err
    assert "is larger than the memory that is free, " in said
    assert "from the disk again, and is as slow as the disk" in said


def test_what_is_said_of_files_that_fit_or_not() -> None:
    assert crowded_note(5 << 30, 6 << 30) is None
    assert crowded_note(5 << 30, None) is None
    note = crowded_note(5 << 30, 3 << 30)
    assert note is not None
    assert all(figure in note for figure in ("5.0 GiB", "3.0 GiB", "2.0 GiB")), note


def test_the_command_says_so_and_exits_with_4(whole: Path, tiny: TinyRun, tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy2(whole, path)
    monkeypatch.setattr(run_module, "available_bytes", lambda: path.unlink(missing_ok=True) or None)
    arguments = [
        "train",
        "--model",
        str(path),
        "--base",
        "quantized",
        "--data",
        str(tiny.rows),
        "--output",
        str(tmp_path / "run"),
    ]
    assert main([*arguments, "--max-steps", "1", "--threads", "1", "--dtype", "float32"]) == 4
    said = capsys.readouterr().err
    assert f"error: {path} has changed while it was in use" in said
    assert "why: it was removed or renamed" in said
