"""The adapter that a directory means: its own, a run's, the only one in it, or a clear choice between several."""

from __future__ import annotations

from pathlib import Path

import pytest

from backhand.adapters.contents import find_adapter
from backhand.errors import ArtifactError


def adapters(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).mkdir(parents=True)
        (directory / name / "adapter_config.json").write_text("{}")
    return directory


def test_itself_and_the_only_one_in_it(tmp_path: Path) -> None:
    assert find_adapter(adapters(tmp_path, "own") / "own") == tmp_path / "own"
    assert find_adapter(tmp_path / "own" / "adapter_config.json") == tmp_path / "own"
    assert find_adapter(tmp_path) == tmp_path / "own"


def test_a_run_means_its_own_adapter_whatever_was_made_of_it(tmp_path: Path) -> None:
    """As docs/interop.md has it: `export --output runs/mine/vllm`."""
    assert find_adapter(adapters(tmp_path, "vllm", "adapter", "mlx")) == tmp_path / "adapter"


def test_several_checkpoints_are_named_in_their_order_and_the_newest_proposed(tmp_path: Path) -> None:
    adapters(tmp_path, "step-8", "step-16", "step-120", "step-²")
    with pytest.raises(ArtifactError) as caught:
        find_adapter(tmp_path)
    assert "contains several adapters: step-8, step-16, step-120" in str(caught.value).replace("step-², ", "")
    (tmp_path / "step-²" / "adapter_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"such as \S+/step-120$"):
        find_adapter(tmp_path)


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ArtifactError, match="this run has saved no adapter yet"):
        find_adapter(tmp_path)
    (tmp_path / "config.toml").unlink()
    with pytest.raises(ArtifactError, match="contains no adapter"):
        find_adapter(tmp_path)


def test_a_path_with_one_misspelt_part_is_answered_with_the_right_one(tmp_path: Path) -> None:
    adapters(tmp_path / "topics", "adapter")
    with pytest.raises(ArtifactError) as raised:
        find_adapter(tmp_path / "topic" / "adapter")
    assert raised.value.next_step == f"did you mean {tmp_path / 'topics' / 'adapter'}?"
    with pytest.raises(ArtifactError) as raised:
        find_adapter(tmp_path / "other" / "adapter")
    assert "adapter_config.json" in str(raised.value.next_step)
    (tmp_path / "weights.bin").write_bytes(b"")
    for path in (tmp_path / "weights.bin", tmp_path / "weights.bin" / "adapter"):
        with pytest.raises(ArtifactError) as raised:
            find_adapter(path)
        assert raised.value.next_step == "give the directory that holds adapter_config.json", "a file is no directory"
