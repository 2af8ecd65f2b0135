"""A command whose files cannot be written leaves no empty output directory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from backhand.cli.main import main
from backhand.files import FileLayer
from backhand.training.run import train
from tests.support.tiny_run import TinyRun


@pytest.mark.parametrize("command", ["paper", "inspect", "sine"])
def test_an_empty_output_directory_goes_again(
    command: str, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny.config(tmp_path / "run", max_steps=1, epochs=1))
    adapter = str(tmp_path / "run" / "adapter")
    words = {
        "paper": ["--adapter", adapter, "--model", str(tiny.model), "--analyses", "amplification"],
        "inspect": [adapter],
        "sine": ["--base-epochs", "2", "--lora-epochs", "2", "--shifted-base-epochs", "1", "--shifted-epochs", "1"],
    }

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FileLayer, "write", full)
    code = main([command, *words[command], "--output", str(tmp_path / "new" / "output")])
    error = capsys.readouterr().err
    assert code == 5 and "the disk is full" in error, error
    assert not (tmp_path / "new").exists()
