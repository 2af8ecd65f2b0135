"""What is said when the system does not write: why, and what can be done about that very reason."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from backhand.errors import ResourceError
from backhand.files import FileLayer, resource_error, save_errors, staged, write_file


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EFBIG, "raise the limit (ulimit -f)"),
        (errno.EROFS, "make the directory writable"),
        (errno.EACCES, "make the directory writable"),
        (errno.EIO, "check the disk"),
    ],
)
def test_the_remedy_is_that_of_the_reason(number: int, remedy: str, tmp_path: Path) -> None:
    error = resource_error("cannot be written", tmp_path, OSError(number, os.strerror(number)))
    assert error.next_step == f"{remedy}, or choose another directory"


def test_a_short_write_of_numpy_is_a_full_disk(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ResourceError) as caught, staged(tmp_path / "a.gguf") as place, place.open("wb") as file:
            np.zeros(9000, np.uint8).tofile(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.why == "the disk is full, or the file-size limit is reached"
    assert caught.value.next_step == "free space, or raise the limit (ulimit -f), or choose another directory"
    assert list(tmp_path.iterdir()) == []


def test_what_is_saved_is_on_the_disk_before_it_is_relied_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file and its directory's names by the layer, and all that is staged: the system is asked for each."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    files = FileLayer()
    write_file(files, tmp_path / "state", b"x")
    assert synced == [(tmp_path / "state").stat().st_ino]
    files.sync_directory(tmp_path)
    assert synced[1:] == [tmp_path.stat().st_ino]
    synced.clear()
    with staged(tmp_path / "model") as place:
        place.mkdir()
        (place / "weights").write_bytes(b"x")
    model = tmp_path / "model"
    assert synced == [path.stat().st_ino for path in (model / "weights", model, tmp_path)]


def test_a_directory_that_is_gone_is_no_full_disk(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ResourceError) as caught, save_errors("metrics.jsonl", run, 239):
        write_file(FileLayer(), run / "metrics.jsonl", b"x")
    assert caught.value.where == str(run)
    assert "it was removed or renamed while this command ran" in str(caught.value.why)
    assert "intact" not in str(caught.value.next_step) and "restore it" in str(caught.value.next_step)


def test_a_failure_leaves_no_parents_that_were_made(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for output in ("new/a/model", "kept/a/model"):
        with pytest.raises(OverflowError), staged(tmp_path / output) as place:
            place.write_bytes((-1).to_bytes())
    assert [one.name for one in tmp_path.iterdir()] == ["kept"] and not list((tmp_path / "kept").iterdir())
